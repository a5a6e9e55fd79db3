// One live run as the page drives it: start, edits, stop, and what comes back.

export class Invalid extends Error {
  /**
   * @param answer what ComfyUI's /prompt would answer: error and node_errors
   * @param say see words.mjs
   * @param status of the answer; 400 where it is about what was sent
   */
  constructor(answer, say, status) {
    const details = Object.values(answer.node_errors ?? {})
      .flatMap((node) => node.errors)
      .map((error) => [error.message, error.details].filter(Boolean).join(': '))
    const message = answer.error?.message ?? String(answer.error ?? say('refused'))
    super([message, ...details.filter((detail) => detail !== message)].join('\n'))
    this.nodes = answer.node_errors ?? {}
    this.status = status
  }
}

/** A file in the output folder, as people read it. */
export const fileName = (name, subfolder) => (subfolder ? `${subfolder}/${name}` : name)

/** What the addresses of views as streams are made from: whoever has it gets the same again. */
function viewSecret() {
  const name = 'livediffusion.views'
  try {
    const kept = localStorage.getItem(name)
    if (kept) return kept
    const made = [...crypto.getRandomValues(new Uint8Array(24))]
    const secret = btoa(String.fromCharCode(...made))
    localStorage.setItem(name, secret)
    return secret
  } catch {
    // a page that may keep nothing: the server makes one for this run
    return undefined
  }
}

/** What the page sends of one kind: pictures of its camera, or of its screen. */
class Lane {
  #session
  #capture
  #source
  #place
  #reading = null
  #tap = null
  #asked = false

  /**
   * @param session the run
   * @param capture see camera.mjs
   * @param source of the Live Cameras that show it
   * @param place of it in the header of a message, as live/cameras.py has it
   */
  constructor(session, capture, source, place) {
    this.#session = session
    this.#capture = capture
    this.#source = source
    this.#place = place
    capture.addEventListener('opened', this.#opened)
    capture.addEventListener('lost', this.#lost)
  }

  get #wishes() {
    return this.#session.cameras.filter((camera) => camera.source === this.#source)
  }

  // what has been opened, or set to another mode; who opened it says what is wrong
  #opened = () => this.feed().catch(() => {})
  #lost = () => {
    this.#untap()
    this.#reading = null
  }

  /** Tell the worker what size is wanted. */
  cover() {
    const wishes = this.#wishes
    if (!wishes.length) return
    const cover = {
      width: Math.max(...wishes.map(({ width }) => width)),
      height: Math.max(...wishes.map(({ height }) => height))
    }
    this.#session.order({ type: 'cover', place: this.#place, cover })
  }

  /** It is open for as long as the graph has a place for it. */
  async feed() {
    const session = this.#session
    const wishes = this.#wishes
    if (session.leaving) return
    if (!wishes.length) return this.leave()
    const capture = this.#capture
    // sharing that its user has ended, or not allowed, is not asked for again by an edit
    if (capture.asks && this.#asked && !capture.stream) return
    this.#asked = true
    await capture.use(session, wishes)
    if (session.leaving) return capture.leave(session)
    if (this.#reading === capture.takes) return
    this.#reading = capture.takes
    this.#tap?.stop()
    this.#tap = null
    // it may go as a track of its own
    if (session.rtc?.send(this.#place, capture.track, wishes[0].send)) {
      return session.order({ type: 'off', place: this.#place })
    }
    this.#tap = capture.tap()
    const readable = this.#tap?.readable
    const order = { type: 'camera', place: this.#place, readable, repeats: capture.asks }
    session.order(order, readable ? [readable] : [])
  }

  /** The worker has no way to read it: one picture. See Capture.next. */
  async picture(fresh) {
    // a video that has no picture yet, or none any more, is no bitmap
    const video = await this.#capture.next(fresh)
    const bitmap = video && (await createImageBitmap(video).catch(() => null))
    this.#session.order({ type: 'bitmap', place: this.#place, bitmap }, bitmap ? [bitmap] : [])
  }

  /** Its track is over: pictures go by the worker. */
  async again() {
    this.#reading = null
    await this.feed()
  }

  #untap() {
    this.#session.rtc?.unsend(this.#place)
    this.#session.order({ type: 'off', place: this.#place })
    this.#tap?.stop()
    this.#tap = null
  }

  /** It is not wanted now. */
  leave() {
    this.#reading = null
    this.#asked = false
    this.#untap()
    this.#capture.leave(this.#session)
  }

  end() {
    this.#capture.removeEventListener('opened', this.#opened)
    this.#capture.removeEventListener('lost', this.#lost)
    this.leave()
  }
}

const LAST = 5000 // ms after which a worker that does not end is ended
const SOON = 500 // ms before the first question whether a kept run has begun anew
const LATER = 5000
const ANSWERED = 10000 // ms in which a server that is there answers to the end of a run
const TAKEN = 35000 // ms in which it takes an edit: a house's gate gives its ComfyUI 30 s of them
const CLOSED = 5000 // ms in which it closes the socket of what is over: recordings take 3 s of them
const TAKEN_OVER = 4409 // the code of a socket in whose place another one has come
const ENDED = new Set(['ended', 'failed'])
const OVER = new Set(['stopping', 'ended', 'over'])
const LEAVING = new Set(['stopping', 'ended', 'failed', 'over'])

/**
 * Events: state {detail: {state, ahead, reason, node, final}}, stats, problem, recorded, view, over; unfed
 * {detail: error}, the camera or the screen does not open for an edit that was taken.
 *
 * A state that the socket's end brought has its code, too: 4409 another page has the camera.
 */
export class Session extends EventTarget {
  #api
  #lanes
  #worker = null
  #begun = null
  #say
  #ended = false
  #pause = SOON
  state = 'starting'
  /** What goes by WebRTC, see webrtc.mjs; null where nothing does. */
  rtc = null

  /**
   * @param api ComfyUI's api
   * @param camera see camera.mjs
   * @param workerUrl of worker.mjs
   * @param say see words.mjs
   * @param desktop see camera.mjs; a page that sends no screen has none
   * @param WebRtc see webrtc.mjs; where there is none, pictures go by the WebSocket
   */
  constructor(api, camera, workerUrl, say, desktop = null, WebRtc = null) {
    super()
    this.#api = api
    this.#say = say
    this.#lanes = [new Lane(this, camera, 'browser', 0)]
    if (desktop) this.#lanes.push(new Lane(this, desktop, 'screen', 1))
    this.#worker = new Worker(workerUrl, { type: 'module' })
    this.#worker.onmessage = ({ data }) => this.#hear(data)
    // what goes wrong in it has a message, a script that does not load has none
    this.#worker.onerror = ({ message }) => message === undefined && this.#unloaded()
    if (WebRtc) {
      this.rtc = new WebRtc({
        post: (path, offer, mine) => this.#offer(path, offer, mine),
        take: (picture) => this.#tell('view', picture),
        elsewhere: (view, on) => this.order({ type: 'elsewhere', view, on }),
        lost: (place) => this.#lanes[place]?.again().catch(() => {})
      })
    }
  }

  /** The Live Cameras that feed it, as the server says them. */
  get cameras() {
    return this.#begun?.cameras ?? []
  }

  /** Whether nothing is to be sent to it: not yet, or not any more. */
  get leaving() {
    return !this.#begun || LEAVING.has(this.state)
  }

  /** Tell the worker something, and hand over what goes with it. */
  order(order, moved = []) {
    this.#worker?.postMessage(order, moved)
  }

  get views() {
    return this.#begun?.views ?? []
  }

  get idle() {
    return this.#begun?.idle ?? []
  }

  get prompt() {
    return this.#begun?.prompt_id
  }

  /** What names it where it goes on without a page, else null. */
  get run() {
    return this.#begun?.run ?? null
  }

  /** What the nodes are to have in place of secrets that were typed; see concealed.mjs. */
  get concealed() {
    return this.#begun?.concealed ?? {}
  }

  /** A sentence about how it is kept, if there is one. */
  get warning() {
    return this.#begun?.warning ?? null
  }

  /**
   * Queue the run, or come to one that is kept. Throws Invalid.
   *
   * @param how {unattended, name} to have it go on without a page, {run} for one that does
   */
  async start(prompt, workflow, how = {}) {
    const { run } = how
    const body = { client_id: this.#api.clientId, prompt, workflow, secret: viewSecret(), ...how }
    this.#begun = await (run ? this.#post('attach', { run }) : this.#post('start', body))
    if (this.state === 'over') return this.run || this.#post('stop', this.#keys).catch(() => {})
    if (!this.#begun.session) return this.#again()
    this.#worker.postMessage({ type: 'open', url: this.#frames })
    this.rtc?.watch(this.views)
    for (const lane of this.#lanes) {
      lane.cover()
      await lane.feed()
    }
  }

  /** Send an edited graph; returns its version. Throws Invalid; the old graph goes on. */
  async update(prompt, workflow) {
    const answer = await this.#post('update', { ...this.#keys, prompt, workflow }, TAKEN)
    Object.assign(this.#begun, answer)
    this.rtc?.watch(this.views)
    for (const lane of this.#lanes) {
      lane.cover()
      await lane.feed().catch((error) => this.#tell('unfed', error))
    }
    return answer.version
  }

  /** Have it go on without a page from now on. Throws Invalid. */
  async keep(name) {
    Object.assign(this.#begun, await this.#post('keep', { ...this.#keys, name }))
    // from now on it comes again as one page of several
    this.renew()
  }

  /** End it, for everybody. */
  async stop() {
    const between = this.state === 'again'
    this.#told('stopping')
    try {
      if (this.run) await this.#post('end', { run: this.run }, ANSWERED)
      else if (this.#begun && ENDED.has((await this.#post('stop', this.#keys, ANSWERED)).state))
        this.#soonClosed()
    } catch (error) {
      // it is over already, or nobody answers: one that is kept goes on then
      const reason = error.status ? error.message : this.#say('broke')
      if (this.run && error.status !== 410) this.#tell('problem', { node: null, reason })
      this.#soonClosed()
    }
    if (!this.#begun || between) this.close()
  }

  // the socket's close is the end of it, but may never come where the connection is dead
  #soonClosed() {
    setTimeout(() => this.close(), CLOSED)
  }

  /** The page is for something else now: end it, unless it is kept. */
  leave() {
    return this.run ? this.close() : this.stop()
  }

  /**
   * Leave at once, as when the page goes away.
   *
   * @param stop whether the run is to end now; else it does when nobody has come for it
   */
  close(stop = true) {
    if (this.state === 'over') return
    this.state = 'over'
    if (stop && this.#begun && !this.run && !this.#ended) {
      const body = JSON.stringify(this.#keys)
      const url = this.#api.apiURL('/livediffusion/stop')
      fetch(url, { method: 'POST', body, keepalive: true }).catch(() => {})
    }
    this.#dark()
    this.#farewell(this.#worker)
    this.#worker = null
    this.dispatchEvent(new Event('over'))
  }

  // the worker ends by itself when it has closed the frames it holds
  #farewell(worker) {
    worker.onmessage = null
    worker.postMessage({ type: 'close' })
    setTimeout(() => worker.terminate(), LAST)
  }

  // at once, though the server may still be busy with a frame or a model
  #dark() {
    this.rtc?.end()
    for (const lane of this.#lanes.splice(0)) lane.end()
  }

  /** Offer a connection by WebRTC; gives the answer. */
  async #offer(path, offer, mine) {
    const query = mine ? `?${new URLSearchParams(this.#keys)}` : ''
    const reply = await this.#api.fetchApi(path + query, {
      method: 'POST',
      headers: { 'Content-Type': 'application/sdp' },
      body: offer
    })
    const text = await reply.text()
    if (reply.ok) return text
    throw Object.assign(new Error(text), { status: reply.status })
  }

  /** Write the picture that a view shows to a file; gives its name. Throws Invalid. */
  async save(node) {
    const { filename, subfolder } = await this.#post('picture', { ...this.#keys, node })
    return fileName(filename, subfolder)
  }

  /** Another one-time address for the phone of a Live Camera. Throws Invalid. */
  async renewPhone(node) {
    const { phone } = await this.#post('phone', { ...this.#keys, node })
    this.cameras.find((camera) => camera.node === node).phone = phone
    return phone
  }

  /** Whether a view's pictures are wanted with what they were made from. */
  compare(view, on) {
    this.rtc?.compare(view, on)
    this.#worker?.postMessage({ type: 'compare', view, on })
  }

  /** A picture was drawn; one that came again says nothing of the latency. */
  shown(picture, again = false) {
    const timed = !again && Number.isFinite(picture.captured)
    const latency = !timed ? null : performance.timeOrigin + performance.now() - picture.captured
    this.#worker?.postMessage({ type: 'shown', view: picture.view, seq: picture.seq, latency })
    return latency
  }

  /** The api's addresses are others now, as when they carry a ticket that was renewed. */
  renew() {
    if (this.#begun) this.#worker?.postMessage({ type: 'address', url: this.#frames })
  }

  get #frames() {
    // a kept run takes no camera from a page, and several pages may be on it
    const role = this.run ? 'watch' : 'owner'
    const query = new URLSearchParams({ ...this.#keys, role })
    const url = new URL(this.#api.apiURL(`/livediffusion/frames?${query}`), location.href)
    url.protocol = url.protocol.replace('http', 'ws')
    return url.href
  }

  get #keys() {
    return { session: this.#begun.session, token: this.#begun.token }
  }

  #hear(data) {
    if (data.type === 'view') this.#tell('view', data)
    else if (data.type === 'want') this.#lanes[data.place]?.picture(data.fresh)
    else if (data.type === 'closed') this.#closed(data.code)
    else if (data.type === 'message') this.#message(data.message)
  }

  #message(message) {
    if (message.type === 'state') this.#told(message.state, message)
    else if (message.type === 'refused') this.#told('failed', { reason: message.reason, final: true })
    else if (message.type === 'drawn') this.rtc?.told(message)
    else {
      if (message.type === 'pace') this.rtc?.pace(message)
      this.#tell(message.type, message)
    }
  }

  #told(state, rest = {}) {
    if (this.state === 'over') return
    // what the server said before it heard of it
    if (this.state === 'stopping' && !LEAVING.has(state)) return
    this.state = state
    if (state === 'live') this.#pause = SOON
    this.#ended ||= ENDED.has(state)
    // one that is kept begins anew
    if (ENDED.has(state) && !this.run) this.#soonClosed()
    if (LEAVING.has(state)) this.#dark()
    this.#tell('state', { ...rest, state })
  }

  // One that is kept begins anew after a failure, and after ComfyUI did. The pauses grow until it is
  // live again: where a proxy lets no WebSocket through, each answer is followed by the next loss.
  async #again() {
    this.#told('again')
    for (;;) {
      await new Promise((done) => setTimeout(done, this.#pause))
      if (!this.run || OVER.has(this.state)) return
      this.#pause = Math.min(2 * this.#pause, LATER)
      try {
        const begun = await this.#post('attach', { run: this.run })
        if (OVER.has(this.state)) return
        if (begun.session) {
          this.#begun = begun
          this.#ended = false
          this.#told('starting')
          this.order({ type: 'open', url: this.#frames })
          return this.#tell('begun')
        }
        this.#told('again', { reason: begun.reason, node: begun.node })
      } catch (error) {
        // where nobody answers, ComfyUI may be starting
        if (error.status === 410) {
          this.#told('ended')
          return this.close()
        }
        this.#told('again')
      }
    }
  }

  #closed(code) {
    if (this.run && code !== TAKEN_OVER && !OVER.has(this.state)) return this.#again()
    if (code !== 4410 && !this.#ended)
      this.#told('failed', { reason: this.#say('broke'), code })
    this.#ended = true
    this.close()
  }

  // nothing would come or go, however often it began anew
  #unloaded() {
    this.#told('failed', { reason: this.#say('notLoaded'), final: true })
    this.#ended = Boolean(this.run)
    this.close()
  }

  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }))
  }

  /** @param within ms in which it answers; else it throws as where nobody does */
  async #post(route, body, within = null) {
    const reply = await this.#api.fetchApi(`/livediffusion/${route}`, {
      method: 'POST',
      headers: { 'Content-Type': 'application/json' },
      body: JSON.stringify(body),
      signal: within && AbortSignal.timeout(within)
    })
    const answer = await reply.json().catch(() => ({ error: { message: reply.statusText } }))
    if (!reply.ok) throw new Invalid(answer, this.#say, reply.status)
    return answer
  }
}
