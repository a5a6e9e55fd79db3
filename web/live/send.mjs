// The line below a Live Send: whether its other end takes pictures, how many, and what is wrong.

const SIZE = 50
const STATES = {
  idle: 'sendIdle', connecting: 'sendConnecting', sending: 'sendSending', waiting: 'sendWaiting',
  refused: 'sendRefused'
}

export class Send {
  /**
   * @param node a LiveSend
   * @param tools say(key, values), element()
   */
  constructor(node, { say, element }) {
    this.say = say
    this.line = element('div', { className: 'livediffusion-figures' })
    this.reason = element('div', { className: 'livediffusion-reason' })
    const box = element('div', { className: 'livediffusion-box' }, this.line, this.reason)
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

  detach() {
    this.line.textContent = this.say('pressLive')
    delete this.line.dataset.state
    this.reason.textContent = ''
  }
}
