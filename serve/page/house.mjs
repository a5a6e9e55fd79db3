// The socket to the house: a place in it that outlives the socket, and the page.

const KEPT = 'livediffusion.visit' // in sessionStorage: this tab's, over reloads, no longer
const FIRST = 250 // ms before the first attempt to come back
const LONGEST = 8000
const SLOW = 5000 // ms after which a socket that does not open is given up
const SILENT = 65000 // ms: the house renews tickets every 30 s, see serve/ingress/visits.py
const LOOK = 5000 // ms between two looks whether it still says anything
const ELSEWHERE = 4409 // another page has this place

/** What this tab keeps; a browser that keeps nothing forgets it with the page. */
export class Kept {
  #all = {}

  constructor() {
    try {
      this.#all = JSON.parse(sessionStorage.getItem(KEPT)) ?? {}
    } catch {
      // nothing is kept here, or it was not ours
    }
  }

  get(name) {
    return this.#all[name]
  }

  set(name, value) {
    this.#all[name] = value
    try {
      sessionStorage.setItem(KEPT, JSON.stringify(this.#all))
    } catch {
      // then a reload begins anew
    }
  }
}

/**
 * Events: what the house says, by its type (welcome, ticket, place, go, moving, over, refused), the
 * message as detail; down {detail: {full}} and up when the socket broke, or is one too many, and is back; elsewhere when another page has the place.
 */
export class House extends EventTarget {
  #url
  #kept
  #socket = null
  #tries = 0
  #timer = 0
  #down = false
  #full = false // it is refused only because there are too many
  #final = false
  #greeted = false
  #leaving = 0
  #heard = 0 // when it said something, by Date: that goes on while a computer sleeps
  #silent = 0 // looks in a row that found it silent

  /**
   * @param url of /visit, ws: or wss:
   * @param kept see Kept
   */
  constructor(url, kept) {
    super()
    this.#url = url
    this.#kept = kept
    addEventListener('online', () => this.#now())
    addEventListener('offline', () => this.#drop())
    setInterval(() => this.#look(), LOOK)
    document.addEventListener('visibilitychange', () => document.hidden || this.#now())
  }

  /** Whether this page wants a place, or has one: said again whenever the socket is back. */
  get wanting() {
    return this.#kept.get('wanting') === true
  }

  open() {
    this.#final = false
    this.#connect()
  }

  want() {
    this.#kept.set('wanting', true)
    if (this.#final) return this.open()
    this.#send({ type: 'want' })
  }

  leave() {
    this.#kept.set('wanting', false)
    if (this.#send({ type: 'leave' })) this.#leaving += 1
  }

  /** The place is over: nothing is wanted until somebody asks again. */
  over() {
    this.#kept.set('wanting', false)
  }

  /** Another page has the place: nothing is asked for, nothing comes back by itself. */
  rest() {
    this.#final = true
    this.over()
    this.#socket?.close()
  }

  /** A replica cannot be reached: another one, or the same if the house has heard of it since. */
  lost(replica) {
    this.#send({ type: 'lost', replica })
    if (this.wanting) this.#send({ type: 'want' })
  }

  #connect() {
    clearTimeout(this.#timer)
    const socket = (this.#socket = new WebSocket(this.#url))
    this.#greeted = false
    this.#leaving = this.#silent = 0
    this.#heard = Date.now()
    this.#timer = setTimeout(() => socket.close(), SLOW)
    socket.onopen = () => {
      clearTimeout(this.#timer)
      socket.send(JSON.stringify({ type: 'hello', ticket: this.#kept.get('ticket') ?? null }))
    }
    socket.onmessage = ({ data }) => socket === this.#socket && this.#hear(JSON.parse(data))
    socket.onclose = ({ code }) => this.#closed(socket, code)
  }

  // A connection may be gone without a word. A page that slept looks before it reads what has come
  // meanwhile: so two looks have to agree.
  #look() {
    const silent = this.#socket && Date.now() - this.#heard > SILENT
    this.#silent = silent ? this.#silent + 1 : 0
    if (this.#silent > 1) this.#drop()
  }

  // a goodbye may never be answered: it is not waited for
  #drop() {
    const socket = this.#socket
    if (!socket) return
    socket.close()
    this.#closed(socket)
  }

  #hear(message) {
    this.#heard = Date.now()
    if (message.type === 'welcome') {
      this.#greeted = true
      this.#full = false
      this.#tries = 0
      this.#kept.set('ticket', message.ticket)
      if (this.wanting) this.#send({ type: 'want' })
      if (this.#down) this.#tell('up')
      this.#down = false
    }
    // the answer to having left is no news, and who has come again meanwhile is not meant
    if (message.type === 'over' && message.reason === 'left' && this.#leaving) {
      this.#leaving -= 1
      return
    }
    if (message.type === 'ticket') this.#kept.set('ticket', message.ticket)
    // it is tried again, with the ticket: whoever has a place keeps it
    if (message.type === 'refused' && message.full) {
      if (!this.#full) this.#down = false
      this.#full = true
      return
    }
    // a ticket of a house that is no more: this page comes as a new one
    if (message.type === 'refused' && !this.#greeted) {
      const had = this.#kept.get('ticket')
      this.#kept.set('ticket', null)
      if (had) return this.#socket?.close()
    }
    this.#tell(message.type, message)
  }

  #closed(socket, code) {
    if (socket !== this.#socket) return
    this.#socket = null
    clearTimeout(this.#timer)
    if (this.#final) return
    if (code === ELSEWHERE) {
      this.#final = true
      this.over()
      return this.#tell('elsewhere')
    }
    if (!this.#down) this.#tell('down', { full: this.#full })
    this.#down = true
    // all pages of a house that went down would come back in the same moment
    const wait = Math.min(LONGEST, FIRST * 2 ** this.#tries++)
    this.#timer = setTimeout(() => this.#connect(), wait * (0.5 + Math.random() / 2))
  }

  #now() {
    this.#look()
    if (this.#socket || this.#final || !this.#down) return
    this.#tries = 0
    this.#connect()
  }

  #send(message) {
    const open = this.#greeted && this.#socket?.readyState === WebSocket.OPEN
    if (open) this.#socket.send(JSON.stringify(message))
    return open
  }

  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }))
  }
}
