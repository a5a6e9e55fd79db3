// What the pages' modules need of a browser, for Node.js: a clock that the test moves, things of the
// page that say nothing, and storage and crypto as a browser that blocks them has them.

const later = setImmediate

/** Time stands still but for advance(ms), which runs what is due meanwhile, in its order. */
export class Clock {
  #now = 0
  #last = 0
  #jobs = new Map()

  constructor() {
    const set = (call, ms, every) => {
      this.#jobs.set(++this.#last, { at: this.#now + ms, call, every })
      return this.#last
    }
    const clear = (id) => this.#jobs.delete(id)
    const timers = {
      setTimeout: (call, ms = 0) => set(call, ms, 0), setInterval: (call, ms) => set(call, ms, ms),
      clearTimeout: clear, clearInterval: clear
    }
    Object.assign(globalThis, timers)
    put('performance', { now: () => this.#now, timeOrigin: 0 })
  }

  get now() {
    return this.#now
  }

  async advance(ms) {
    const end = this.#now + ms
    for (;;) {
      await settled()
      const due = [...this.#jobs].filter(([, { at }]) => at <= end)
      if (!due.length) break
      const [id, job] = due.reduce((a, b) => (b[1].at < a[1].at ? b : a))
      this.#now = Math.max(this.#now, job.at)
      if (job.every) job.at += job.every
      else this.#jobs.delete(id)
      job.call()
    }
    this.#now = end
  }
}

/** All that needs no time has happened. */
export async function settled() {
  for (let i = 0; i < 3; i += 1) await new Promise((done) => later(done))
}

/** A global as the browser has it, whatever Node.js has there. */
export function put(name, value) {
  Object.defineProperty(globalThis, name, { value, configurable: true, writable: true })
}

/** Storage that the browser's user has blocked: to look at it is an error already. */
export function blockStorage() {
  for (const name of ['localStorage', 'sessionStorage']) {
    const get = () => {
      throw new DOMException('The operation is insecure.', 'SecurityError')
    }
    Object.defineProperty(globalThis, name, { get, configurable: true })
  }
}

/** A page by plain http: no camera, no crypto but random bytes. */
export function insecure() {
  const getRandomValues = (bytes) => bytes.fill(7)
  put('crypto', { getRandomValues })
  put('isSecureContext', false)
}

/** An element that takes everything. */
export class Element extends EventTarget {
  constructor(fields = {}) {
    super()
    Object.assign(this, { dataset: {}, style: {}, textContent: '', ...fields })
    this.classList = { toggle() {}, add() {} }
  }

  setAttribute() {}
  replaceChildren() {}
  append() {}
  async play() {}
}

/** A page: its elements come to be when they are looked for. */
export function page(address = 'http://10.0.0.7/') {
  const there = new Map()
  const document = Object.assign(new Element(), {
    hidden: false, title: '', body: new Element(), documentElement: new Element(),
    createElement: () => new Element(),
    getElementById: (id) => there.get(id) ?? there.set(id, new Element()).get(id)
  })
  put('window', globalThis)
  put('document', document)
  put('location', new URL(address))
  put('navigator', { languages: ['en'], language: 'en' })
  const events = new EventTarget()
  globalThis.addEventListener = events.addEventListener.bind(events)
  globalThis.dispatchEvent = events.dispatchEvent.bind(events)
  return document
}

/** A camera's track, which ends when it is unplugged. */
export class Track {
  readyState = 'live'
  stop() {
    this.readyState = 'ended'
  }
  async applyConstraints() {}
  getSettings() {
    return { frameRate: 30 }
  }
  unplug() {
    this.stop()
    this.onended?.()
  }
}

/** Cameras for navigator.mediaDevices; each that was opened is in `opened`. */
export class Devices extends EventTarget {
  opened = []
  there = true
  async getUserMedia() {
    if (!this.there) throw new DOMException('no camera', 'NotFoundError')
    const track = new Track()
    this.opened.push(track)
    return { getTracks: () => [track], getVideoTracks: () => [track] }
  }
  async enumerateDevices() {
    return [{ kind: 'videoinput', deviceId: 'a', label: 'A' }]
  }
}
