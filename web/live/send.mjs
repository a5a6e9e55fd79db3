// The line below a Live Send: whether its other end takes pictures, how many, and what is wrong.

const SIZE = 50
const STATES = {
  idle: 'sendIdle', connecting: 'sendConnecting', sending: 'sendSending', waiting: 'sendWaiting',
  refused: 'sendRefused'
}

export class Send {
  /**
   * @param node a LiveSend
   * @param tools say(key, values), element(), Allow: see allow.mjs
   */
  constructor(node, tools) {
    const { say, element, Allow } = tools
    this.say = say
    this.allow = new Allow(
      say('LiveSend'), tools, () => this.#allowing(), (address) => this.#given(node, address)
    )
    this.line = element('div', { className: 'livediffusion-figures' })
    this.reason = element('div', { className: 'livediffusion-reason' })
    const box = element('div', { className: 'livediffusion-box' }, this.line, this.reason, this.allow.button)
    this.widget = node.addDOMWidget('livediffusion_send', 'livediffusion.send', box, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => SIZE
    })
    this.widget.serialize = false
    this.widget.label = say('sendWidget')
    this.detach()
  }

  /** @param send how it is, by the server's figures; nothing before its first picture */
  stats(send) {
    if (!send) return
    this.line.textContent = this.say(STATES[send.state] ?? 'sendWaiting', send)
    this.line.dataset.state = send.state
    this.reason.textContent = send.reason ?? ''
    this.reason.title = send.reason ?? ''
  }

  /** The server does not send there before somebody there has said so. @param errors of the node */
  refused(errors) {
    this.allow.refused(errors)
  }

  #allowing() {
    this.reason.textContent = this.allow.words
  }

  #given(node, address) {
    const widget = node.widgets?.find(({ name }) => name === 'address')
    if (widget) widget.value = address
  }

  detach() {
    this.line.textContent = this.say('pressLive')
    delete this.line.dataset.state
    this.reason.textContent = ''
  }
}
