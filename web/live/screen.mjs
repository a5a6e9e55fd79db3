// A picture, and beside it or under a line that one drags what it was made from. The node has one,
// its window another. Where things are is left to CSS: dragging the line paints nothing.

const STEP = 0.02
const LEAP = 0.1
const STEPS = {
  ArrowLeft: -STEP, ArrowDown: -STEP, ArrowRight: STEP, ArrowUp: STEP,
  PageDown: -LEAP, PageUp: LEAP, Home: -1, End: 1
}
const SLACK = 4 // px that a press may wander and is no drag yet

export class Screen {
  #say
  #compare
  #compared = false
  #drag = null

  /**
   * @param tools say(key, values), element()
   * @param compare see compare.mjs
   */
  constructor({ say, element }, compare) {
    this.#say = say
    this.#compare = compare
    const part = (name, canvas, text) => {
      const label = element('span', { className: 'livediffusion-label', textContent: text })
      return element('div', { className: `livediffusion-${name}` }, canvas, label)
    }
    this.output = element('canvas', { width: 512, height: 512 })
    this.input = element('canvas', { width: 1, height: 1 })
    this.line = element('div', { className: 'livediffusion-divider', tabIndex: 0 })
    this.line.setAttribute('role', 'slider')
    this.line.setAttribute('aria-label', say('line'))
    this.line.setAttribute('aria-valuemin', 0)
    this.line.setAttribute('aria-valuemax', 100)
    this.line.onkeydown = (event) => this.#key(event)
    this.stage = element(
      'div',
      { className: 'livediffusion-stage' },
      part('output', this.output, say('output')),
      part('input', this.input, say('input')),
      this.line
    )
    this.stage.onpointerdown = (event) => this.#press(event)
    this.stage.onpointermove = (event) => this.#move(event)
    this.stage.onpointerup = this.stage.onpointercancel = () => (this.#drag = null)
    const className = 'livediffusion-screen livediffusion-compare'
    this.root = element('div', { className }, this.stage)
    this.refresh()
  }

  /** Whether there is an input that belongs to the picture. */
  get compared() {
    return this.#compared
  }

  /**
   * Show a picture.
   *
   * @param output a bitmap or canvas
   * @param input what it was made from, if it is known
   */
  paint(output, input = null) {
    let fits = !draw(this.output, output)
    if (input) fits = !draw(this.input, input) && fits
    if (fits && this.#compared === Boolean(input)) return
    this.#compared = Boolean(input)
    this.refresh()
  }

  /** The picture stays, its input is not known any more. */
  alone() {
    this.#compared = false
    this.refresh()
  }

  /** Lay out what compare.mjs says. */
  refresh() {
    const { mode, at } = this.#compare
    const { width, height } = this.output
    const percent = Math.round(100 * at)
    this.root.dataset.compare = this.#compared ? mode : 'off'
    this.stage.style.setProperty('--aspect', width / height)
    this.stage.style.setProperty('--at', `${100 * at}%`)
    this.line.setAttribute('aria-valuenow', percent)
    const shares = { input: percent, output: 100 - percent }
    this.line.setAttribute('aria-valuetext', this.#say('lineAt', shares))
  }

  get #movable() {
    return this.root.dataset.compare === 'line'
  }

  // a press on the picture moves nothing, so that a double click can mean something else
  #press(event) {
    if (!this.#movable || event.button) return
    // Nodes 2.0 would move the node
    event.stopPropagation()
    event.preventDefault()
    this.line.focus({ preventScroll: true })
    this.stage.setPointerCapture(event.pointerId)
    const held = event.target === this.line
    const offset = held ? this.#compare.at - this.#fraction(event) : 0
    this.#drag = { held, offset, from: event.clientX }
  }

  #move(event) {
    const drag = this.#drag
    if (!drag || !this.#movable) return
    event.stopPropagation()
    drag.held ||= Math.abs(event.clientX - drag.from) > SLACK
    if (drag.held) this.#compare.move(this.#fraction(event) + drag.offset)
  }

  #fraction(event) {
    // as it is on the screen, where the canvas may have been zoomed
    const { left, width } = this.stage.getBoundingClientRect()
    return (event.clientX - left) / width
  }

  #key(event) {
    const step = STEPS[event.key]
    if (!step || event.ctrlKey || event.altKey || event.metaKey) return
    // ComfyUI has uses of its own for these keys
    event.preventDefault()
    event.stopPropagation()
    this.#compare.move(this.#compare.at + step * (event.shiftKey ? LEAP / STEP : 1))
  }
}

/** Copy a picture; returns whether the canvas got another size. */
function draw(canvas, picture) {
  const other = canvas.width !== picture.width || canvas.height !== picture.height
  if (other) {
    canvas.width = picture.width
    canvas.height = picture.height
  }
  canvas.getContext('2d').drawImage(picture, 0, 0)
  return other
}
