// One stream, wherever it runs: its sessions at gates, one after the other, without a gap on the screen.
//
// A move is a new session beside the one before: the camera stays open, what is on the screen stays
// there, and the new session takes over with its first picture.

import { Session } from '../web/live/session.mjs'
import { Gate, answers, ways } from './gate.mjs'

const WORKER = new URL('../web/live/worker.mjs', import.meta.url).href
const SILENT = 8000 // ms in which a gate says something, or is taken to be out of reach
const LEAST = 500 // ms between a gate that was lost and the next attempt, twice as many each time
const LONGEST = 8000

/** Makes an error of what a place that did not come to be has said. */
class Unreached extends Error {}

/**
 * Events: took {detail: session} with the first picture of a place; view, stats and moving as the
 * session that is seen has them; lost {detail: {replica}}, a gate that cannot be reached any more;
 * ended {detail: {state, reason, why, code}}, the gate has ended the run; refused {detail: {reason}}, it
 * does not start.
 */
export class Stream extends EventTarget {
  #camera
  #say
  #values
  #kept
  #house
  #client = [...crypto.getRandomValues(new Uint8Array(8))].map((n) => n.toString(16)).join('')
  #seen = null // the place whose pictures are shown
  #next = null // the one that is to take over
  #losses = 0
  #timer = 0

  /**
   * @param tools camera, say, values, kept, house (its address)
   */
  constructor({ camera, say, values, kept, house }) {
    super()
    this.#camera = camera
    this.#say = say
    this.#values = values
    this.#kept = kept
    this.#house = house
  }

  /** The session whose pictures are shown; null while there is none. */
  get session() {
    return this.#seen?.session ?? null
  }

  /** Whether what is seen is of a replica, and no other is to follow. */
  stays(replica) {
    return !this.#next && this.isAt(replica)
  }

  /** Whether it is at a replica, or on its way there. */
  isAt(replica) {
    const place = this.#next ?? this.#seen
    return place?.replica === replica && !place.over
  }

  /** The house has a place for it: there it goes on, if it is not there already. */
  async go(told) {
    const { replica } = told
    if (this.isAt(replica)) return
    this.#drop()
    const place = (this.#next = { replica, gate: null, session: null, over: false, heard: false, last: {} })
    for (const [i, way] of ways(told, this.#kept, this.#house).entries()) {
      const own = i === 0 && way !== told.relay && told.direct?.startsWith(way)
      if (own && !(await answers(way, told.ticket))) {
        this.#kept.set('relayed', true)
        continue
      }
      if (this.#next !== place) return
      try {
        return await this.#begin(place, new Gate(way, told.ticket, this.#client))
      } catch (error) {
        if (place.over || this.#next !== place) return
        // the other way leads to the same run, so it is not to be stopped by this one
        place.session?.close(false)
        // nor does another place give a camera back that was unplugged; a place that is not
        // reached, or that is going, says nothing about the camera
        const here = error.status === undefined && !(error instanceof Unreached)
        if (error.status === 400 || (here && this.#camera.gone)) {
          this.#next = null
          return this.#tell('refused', { reason: error.message })
        }
        // its address answers, and yet its socket does not: something between them is in the way
        if (own && error instanceof Unreached) this.#kept.set('relayed', true)
      }
    }
    if (this.#next === place) this.#next = null
    this.#lost(replica)
  }

  /** The ticket of a stream was renewed: for what is asked next; what is open stays open. */
  renew(ticket) {
    const place = this.#next ?? this.#seen
    if (!place?.gate) return
    place.gate.ticket = ticket
    place.session.renew()
  }

  /** All of it is over; the picture stays where it was drawn. */
  stop() {
    clearTimeout(this.#timer)
    this.#losses = 0
    const before = this.#seen
    this.#seen = null
    this.#drop()
    this.#close(before)
  }

  // start it there, and wait until it is heard of
  #begin(place, gate) {
    place.gate = gate
    const session = (place.session = new Session(gate, this.#camera, WORKER, this.#say))
    return new Promise((resolve, reject) => {
      const silent = setTimeout(() => reject(new Unreached()), SILENT)
      const heard = () => {
        clearTimeout(silent)
        place.heard = true
        resolve()
      }
      session.addEventListener('view', ({ detail }) => {
        heard()
        this.#view(place, session, detail)
      })
      session.addEventListener('state', ({ detail }) => {
        place.last = detail
        if (detail.code === undefined && detail.state !== 'stopping') heard()
      })
      for (const type of ['stats', 'moving', 'problem'])
        session.addEventListener(type, ({ detail }) => {
          if (place === this.#seen || !this.#seen) this.#tell(type, detail)
        })
      session.addEventListener('over', ({ detail }) => {
        // the gate's last word; the session's own comes when its socket is closed
        if (detail) return (place.why = detail.reason)
        clearTimeout(silent)
        this.#values.end(session)
        if (place.heard) this.#over(place, session)
        reject(new Unreached())
      })
      this.#values.begin(session).catch(reject)
    })
  }

  #view(place, session, detail) {
    if (place === this.#next) {
      const before = this.#seen
      this.#seen = place
      this.#next = null
      this.#losses = 0
      this.#tell('took', session)
      this.#close(before)
    }
    if (place === this.#seen) return this.#tell('view', detail)
    detail.bitmap.close()
    detail.input?.close()
  }

  #over(place, session) {
    if (place.session !== session || place.over) return
    place.over = true
    const current = place === this.#next || (place === this.#seen && !this.#next)
    if (place === this.#next) this.#next = null
    // one that another has followed already is missed by nobody
    if (!current) return
    if (place.last.code === undefined || place.last.code === 4409)
      return this.#tell('ended', { ...place.last, why: place.why })
    this.#lost(place.replica)
  }

  // at once, then less and less often
  #lost(replica) {
    const wait = this.#losses ? Math.min(LONGEST, LEAST * 2 ** (this.#losses - 1)) : 0
    this.#losses += 1
    clearTimeout(this.#timer)
    this.#timer = setTimeout(() => this.#tell('lost', { replica }), wait)
  }

  #drop() {
    const next = this.#next
    this.#next = null
    this.#close(next)
  }

  #close(place) {
    if (!place || place.over) return
    place.over = true
    if (place.session) this.#values.end(place.session)
    place.session?.close()
  }

  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }))
  }
}
