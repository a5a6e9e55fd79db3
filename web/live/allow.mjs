// What a node names and the server does not open yet: said, and allowed, on the server's own page.

const HERE = ['localhost', '127.0.0.1', '[::1]']

export class Allow {
  what = null // {kind, what}, as the server asked for it

  /**
   * @param title of the node's kind, in words
   * @param tools say(key, values), element(), notify(severity, summary, detail), ask(route, body)
   * @param changed called when there is something else to allow, or nothing any more
   * @param allowed called with the address as the node is to have it: its secrets stay at the server
   */
  constructor(title, { say, element, notify, ask }, changed, allowed) {
    this.title = title
    this.tools = { say, notify, ask }
    this.changed = changed
    this.allowed = allowed
    this.button = element('button', {
      textContent: say('allow'), title: say('allowTip'), hidden: true, onclick: () => this.#press()
    })
  }

  /** Words for the node; '' where there is nothing to allow. */
  get words() {
    return this.what ? this.tools.say('notAllowed', { what: this.what.what }) : ''
  }

  /** The server does not open it before somebody there has said so. @param errors of the node */
  refused(errors) {
    const found = errors.map(({ extra_info }) => extra_info?.allow).find(Boolean)
    this.set(found && HERE.includes(location.hostname) ? found : null)
  }

  set(what) {
    this.what = what
    this.button.hidden = !what
    this.changed()
  }

  async #press() {
    const { say, notify, ask } = this.tools
    const { what } = this
    try {
      const { address } = await ask('allow', what)
      if (address) this.allowed(address)
      this.set(null)
      notify('success', this.title, say('nowAllowed', { what: what.what }))
    } catch (error) {
      notify('error', this.title, error.message)
    }
  }
}
