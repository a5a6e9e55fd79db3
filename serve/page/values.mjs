// What the visitor has set: sent a moment after the last touch, refused one by one, kept over moves.

const PACE = 110 // ms between two edits at least: a gate takes ten in a second, see serve/gate/stream.py
const AGAIN = 1000 // ms after which an edit that did not arrive is sent once more

/** Events: refused {detail: {name, reason}}, taken {detail: {name}}. */
export class Values extends EventTarget {
  #wanted
  #good
  #before // what was good before the last edit
  #bad = new Map()
  #kept
  #session = null
  #timer = 0
  #due = Infinity // when what does not wait for a rest is sent, in performance.now()'s time
  #sending = null // the session to which changes are on their way
  #refusal

  /**
   * @param kept see house.mjs
   * @param refusal whether an error says that what was sent cannot be
   */
  constructor(kept, refusal) {
    super()
    this.#kept = kept
    this.#refusal = refusal
    this.#wanted = { ...kept.get('values') }
    this.#good = this.#before = { ...this.#wanted }
  }

  /** What was set by hand: the others are as the workflow has them. */
  get wanted() {
    return { ...this.#wanted }
  }

  /**
   * Set a value; sent after a while.
   *
   * @param wait ms
   * @param typed whether it is not sent before nothing was set for as long; else what is set in a
   *   stream, by a slider that is dragged, is followed all the way
   */
  set(name, value, wait, typed = false) {
    this.#bad.delete(name)
    this.#wanted[name] = value
    const now = performance.now()
    if (!typed) this.#due = Math.min(this.#due, now + wait)
    clearTimeout(this.#timer)
    this.#timer = setTimeout(() => this.#send(), Math.max(0, Math.min(this.#due - now, wait)))
  }

  /** Forget what inputs are not there any more. */
  only(names) {
    for (const name of Object.keys(this.#wanted)) {
      if (names.includes(name)) continue
      delete this.#wanted[name]
      delete this.#good[name]
      delete this.#before[name]
    }
  }

  /**
   * Start a session with what is set; what it does not take is told, and left out.
   *
   * @throws what the session throws, if it does not start without any
   */
  async begin(session) {
    const all = Object.fromEntries(
      Object.entries(this.#wanted).filter(([name, value]) => this.#bad.get(name) !== value)
    )
    const tries = [all, this.#good, {}].map((values) => JSON.stringify(values))
    for (const text of new Set(tries)) {
      try {
        await session.start({ values: JSON.parse(text) }, null)
        this.#good = this.#before = JSON.parse(text)
        this.#kept.set('values', this.#good)
        this.#session = session
        this.#send()
        return
      } catch (error) {
        if (!this.#refusal(error) || text === '{}') throw error
      }
    }
  }

  /** The last edit was taken, and then did not run: what was before it goes on. */
  takeBack(reason) {
    const last = this.#good
    this.#good = this.#before
    this.#kept.set('values', this.#good)
    for (const name of Object.keys(last)) {
      if (last[name] === this.#good[name]) continue
      this.#bad.set(name, last[name])
      this.#tell('refused', { name, reason })
    }
  }

  /** The session is over, or not the one that is seen. */
  end(session) {
    if (this.#session === session) this.#session = null
  }

  get #changes() {
    return Object.keys(this.#wanted).filter(
      (name) => this.#wanted[name] !== this.#good[name] && this.#bad.get(name) !== this.#wanted[name]
    )
  }

  async #send() {
    clearTimeout(this.#timer)
    this.#due = Infinity
    const session = this.#session
    // what a place that was left owes an answer to holds up no other place
    if (!session || this.#sending === session) return
    this.#sending = session
    try {
      for (let names; (names = this.#changes).length && this.#session === session; ) {
        const next = performance.now() + PACE
        // one that is refused takes no other along
        if (!(await this.#take(session, names)))
          for (const name of names.length > 1 ? names : []) await this.#take(session, [name])
        await new Promise((done) => setTimeout(done, Math.max(0, next - performance.now())))
      }
    } catch {
      this.#timer = setTimeout(() => this.#send(), AGAIN)
    } finally {
      if (this.#sending === session) this.#sending = null
    }
  }

  async #take(session, names) {
    if (this.#session !== session) return false // between two places
    const values = Object.fromEntries(names.map((name) => [name, this.#wanted[name]]))
    try {
      await session.update({ values: { ...this.#good, ...values } }, null)
    } catch (error) {
      if (this.#session !== session) return false
      if (!this.#refusal(error)) throw error
      if (names.length > 1) return false
      const [name] = names
      this.#bad.set(name, values[name])
      // only if it is still what stands there
      if (this.#wanted[name] === values[name])
        this.#tell('refused', { name, reason: error.message })
      return false
    }
    if (this.#session !== session) return false // the next place began with what is wanted
    this.#before = this.#good
    this.#good = { ...this.#good, ...values }
    this.#kept.set('values', this.#good)
    for (const name of names) this.#tell('taken', { name })
    return true
  }

  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }))
  }
}
