// What a session sends for one view: drawn with the screen's next refresh, answered, compared.

const OFF = 'off'
const LATE = 200 // ms without a refresh of the screen after which a picture is drawn all the same

export class Picture {
  #session = null
  #place = null
  #waiting = []
  #drawing = 0
  #late = 0
  #wished = false
  #last = null
  #others
  #changed

  /**
   * @param owner {properties}: where compare.mjs keeps its choice
   * @param tools say(key, values), element(), Compare, Screen
   * @param watch others() gives more screens than this one's own, changed() is called after what
   *   is on them may have changed; both may be left out
   */
  constructor(owner, tools, { others = () => [], changed = () => {} } = {}) {
    this.#others = others
    this.#changed = changed
    this.compare = new tools.Compare(owner, tools, () => this.#compared())
    this.screen = new tools.Screen(tools, this.compare)
    this.canvas = this.screen.output
    this.canvas.dataset.frames = 0
  }

  // what waits for a refresh that a hidden page does not get is drawn now
  #hidden = () => document.hidden && this.#draw()

  /** The session's number of the view whose pictures these are; null while there is none. */
  get index() {
    return this.#place
  }

  /** Whether any picture was shown. */
  get begun() {
    return this.canvas.dataset.frames !== '0'
  }

  /** Whether an input is wanted beside the picture, and there is none. */
  get lacking() {
    return this.compare.mode !== OFF && !this.screen.compared
  }

  /** Show what a session sends for the view of this number; the picture before stays till then. */
  attach(session, place) {
    if (this.#session === session && this.#place === place) return
    document.addEventListener('visibilitychange', this.#hidden)
    this.#session = session
    this.#place = place
    this.#last = null
    this.#wished = false
    this.#wish()
  }

  detach() {
    if (!this.#session) return
    document.removeEventListener('visibilitychange', this.#hidden)
    // the run may go on, with another node in this one's place after an undo
    if (this.#wished) this.#session.compare(this.#place, (this.#wished = false))
    for (const picture of this.#waiting.splice(0)) {
      // nobody sees it, but the server waits for an answer, or it would send the next node nothing
      this.#session.shown(picture, true)
      close(picture)
    }
    this.#session = this.#place = null
    this.#changed()
  }

  /** A picture has come: on the screen with its next refresh. */
  take(picture) {
    this.#waiting.push(picture)
    // a hidden page gets no refresh, but its window may be on a stage
    if (document.hidden) return this.#draw()
    this.#drawing ||= requestAnimationFrame(() => this.#draw())
    // nor does one that is covered, in some browsers, or whose display is off
    this.#late ||= setTimeout(() => this.#draw(), LATE)
  }

  #unplan() {
    cancelAnimationFrame(this.#drawing)
    clearTimeout(this.#late)
    this.#drawing = this.#late = 0
  }

  #draw() {
    this.#unplan()
    const pictures = this.#waiting.splice(0)
    const newest = pictures.at(-1)
    if (!newest) return
    // one that comes again brings the input that it went without
    const last = this.#last
    const again = ({ seq }) => seq === last
    this.#last = newest.seq
    try {
      this.paint(newest.bitmap, this.compare.mode === OFF ? null : newest.input)
      Object.assign(this.canvas.dataset, {
        frames: Number(this.canvas.dataset.frames) + !again(newest),
        source: newest.source,
        seq: newest.seq,
        version: newest.version
      })
    } finally {
      // one that could not be drawn is answered, too, or none would come after it
      for (const picture of pictures) {
        this.#session?.shown(picture, again(picture))
        close(picture)
      }
    }
  }

  /** Show a picture that no session sent; arguments as screen.mjs has them. */
  paint(output, input) {
    for (const screen of this.#screens) screen.paint(output, input)
    this.#changed()
  }

  get #screens() {
    return [this.screen, ...this.#others()]
  }

  /** The user has chosen another way to compare, or moved the line. */
  #compared() {
    const off = this.compare.mode === OFF
    // inputs do not come any more: when they do again, this one is of another picture
    for (const screen of this.#screens) off ? screen.alone() : screen.refresh()
    this.#wish()
    this.#changed()
  }

  #wish() {
    const on = this.compare.mode !== OFF
    if (this.#session && on !== this.#wished) this.#session.compare(this.#place, (this.#wished = on))
  }

  /** Its node has gone, and may come back. */
  remove() {
    this.#unplan()
    this.detach()
  }
}

/** Let a picture's bitmaps go. */
export function close(picture) {
  picture.bitmap.close()
  picture.input?.close()
}
