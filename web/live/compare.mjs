// How a Live View compares its pictures with what they were made from. Kept in the node's
// properties, so in the workflow, and in nothing that is sent to be run.

export const OFF = 'off'
export const SIDE = 'side by side'
export const LINE = 'line'

const CHOICES = [
  [OFF, 'compareOff'],
  [SIDE, 'compareSide'],
  [LINE, 'compareLine']
]
const MIDDLE = 0.5

export class Compare {
  #node
  #changed
  #buttons

  /**
   * @param node a LiveView, or whatever has properties to keep the choice in
   * @param tools say(key), element()
   * @param changed called after each change
   */
  constructor(node, { say, element }, changed) {
    this.#node = node
    this.#changed = changed
    this.#buttons = CHOICES.map(([mode, key]) => {
      const title = say(key)
      const onclick = () => this.choose(mode)
      const made = element('button', { title, onclick, className: 'livediffusion-choice' })
      made.dataset.mode = mode
      made.setAttribute('aria-label', title)
      return made
    })
    /** The three buttons, for the page. */
    this.switch = element('div', { className: 'livediffusion-switch' }, ...this.#buttons)
    this.switch.setAttribute('role', 'group')
    this.switch.setAttribute('aria-label', say('compare'))
    this.#mark()
  }

  /** off, side by side or line. */
  get mode() {
    const { compare } = this.#node.properties
    return CHOICES.some(([mode]) => mode === compare) ? compare : OFF
  }

  /** Where the line is, from 0, all output, to 1, all input. */
  get at() {
    // a workflow may have been written by hand
    const at = this.#node.properties.compare_at
    return Number.isFinite(at) ? Math.min(1, Math.max(0, at)) : MIDDLE
  }

  choose(mode) {
    this.#keep('compare', mode, OFF)
    this.read()
  }

  move(at) {
    // three digits are finer than any screen, and short in a workflow
    this.#keep('compare_at', Math.round(1000 * Math.min(1, Math.max(0, at))) / 1000, MIDDLE)
    this.#changed()
  }

  /** The properties have changed, as when a workflow is loaded. */
  read() {
    this.#mark()
    this.#changed()
  }

  // a node that was never touched is saved as it was
  #keep(name, value, usual) {
    if (value === usual) delete this.#node.properties[name]
    else this.#node.properties[name] = value
  }

  #mark() {
    for (const button of this.#buttons)
      button.setAttribute('aria-pressed', String(button.dataset.mode === this.mode))
  }
}
