// The display stays on while there are pictures, though nobody touches anything.

const AGAIN = 1000 // ms after a browser has let it go dark until it is asked once more

export class Awake {
  #windows
  #on = false
  #asking = false
  #lock = null
  #of = null // the window that it was asked of

  /**
   * @param windows gives those that show pictures, the first choice first; a browser keeps a
   *   display on only for one that can be seen
   */
  constructor(windows = () => [window]) {
    this.#windows = windows
    document.addEventListener('visibilitychange', () => this.#hold())
  }

  /** Whether it is to stay on; said again, it is asked of the browser again where that is needed. */
  keep(on) {
    this.#on = on
    if (on) return this.#hold()
    this.#lock?.release().catch(() => {})
    this.#lock = null
  }

  async #hold() {
    // a window that was closed need not have said that its lock is gone
    const held = this.#lock && !this.#lock.released && !this.#of.closed
    if (!this.#on || this.#asking || held) return
    this.#asking = true
    const lock = await this.#ask()
    this.#asking = false
    this.#lock = lock
    if (lock && !this.#on) return this.keep(false)
    lock?.addEventListener('release', () => setTimeout(() => this.#hold(), AGAIN))
  }

  async #ask() {
    for (const one of this.#windows()) {
      try {
        if (one.closed || one.document.hidden) continue
        const lock = await one.navigator.wakeLock.request('screen')
        this.#of = one
        return lock
      } catch {
        // there is none by plain http, and where its user, or a battery that is low, allows none
      }
    }
    return null
  }
}
