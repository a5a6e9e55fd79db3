// What this computer sends: its camera, and its screen. Permission, choice, pictures for the worker,
// light off.

const CHOICE = 'livediffusion.camera'

// by name, what getUserMedia throws: words.mjs has a sentence for each
const FAILURES = [
  'NotAllowedError', 'NotFoundError', 'NotReadableError', 'OverconstrainedError', 'AbortError'
]

const GIVES = 8000 // ms in which what was opened gives a picture: some cameras wake for seconds
const STILL = 1 // fps of a screen of which a hidden page cannot say whether it has moved
const REST = 250 // ms after which a picture is taken though the browser told of no new one

// a smaller picture serves nobody: the Live Camera shows it to be looked at
const LEAST = { width: 320, height: 180, fps: 1 }
const UNSAID = { width: 512, height: 512, fps: 30 } // Live Camera's defaults

/** The size and rate that serve all of these; what one does not say as a number is the default. */
export function largest(wishes) {
  const said = (wish, name) => (Number.isFinite(wish[name]) ? wish[name] : UNSAID[name])
  const most = (name) => Math.max(LEAST[name], ...wishes.map((wish) => said(wish, name)))
  return { width: most('width'), height: most('height'), fps: most('fps') }
}

/**
 * What a browser is asked for, so that its pictures cover width x height at this rate.
 *
 * A camera has a few modes, mostly 16:9 or 4:3, of which the smallest that is large enough is
 * wanted, whole: left alone, Chromium would cut the wanted shape out of the picture itself. Nothing
 * is demanded; a camera that cannot gives what it has.
 */
export function constraints({ width, height, fps }) {
  const tall = Math.max(height, Math.ceil((width * 9) / 16))
  return {
    width: { ideal: Math.ceil((tall * 16) / 9) },
    height: { ideal: tall },
    frameRate: { ideal: fps },
    resizeMode: { ideal: 'none' }, // Firefox looks at it here only
    advanced: [
      { resizeMode: 'none' },
      { width: { min: width }, height: { min: height } },
      { frameRate: { min: fps } }
    ]
  }
}

// a camera whose lid is closed, or that nobody feeds, is opened and never gives anything
function soon(awaited) {
  let timer
  const late = new Promise((_, fail) => {
    timer = setTimeout(() => fail(new DOMException('', 'AbortError')), GIVES)
  })
  return Promise.race([awaited, late]).finally(() => clearTimeout(timer))
}

/**
 * A stream of the browser's for as long as somebody uses it. A subclass gives ask(wish), which
 * resolves with the stream, may have settings(wish) for an open one, and failure(error) in words.
 *
 * Events: opened, anew for each way that pictures begin to come; closed; lost, by the other side.
 */
export class Capture extends EventTarget {
  stream = null
  video = null
  users = new Map() // to the wishes of each
  takes = 0 // how often pictures began to come in another way: whoever reads them taps anew
  asks = false // whether the browser asks its user each time that it is opened
  insecure = 'insecure' // what to say of a page that may not
  #opening = null
  #opens = 0 // times that the browser was asked for one; who asked last gets it
  #taps = new Set()
  #asked = null
  #fitting = null
  #fresh = false
  #woken = null
  #taken = 0

  /** @param say see words.mjs */
  constructor(say) {
    super()
    this.say = say
  }

  /** Pictures per second that the open camera gives; 0 where the browser does not say. */
  get rate() {
    return this.track?.getSettings?.().frameRate ?? 0
  }

  /** Whether it was opened, and then unplugged or taken away: its last picture is all there is. */
  get gone() {
    return this.track?.readyState === 'ended'
  }

  /**
   * Open it for a user, also one that is gone; used again with other wishes, it is set to those.
   *
   * @param user any object
   * @param wishes list of {width, height, fps}, all of which its pictures should cover
   * @throws Error with plain words
   */
  async use(user, wishes) {
    if (!window.isSecureContext || !navigator.mediaDevices) throw new Error(this.say(this.insecure))
    // known from the start: who leaves while the browser still asks gets no light afterwards
    this.users.set(user, wishes)
    try {
      if (!this.stream || this.gone) await (this.#opening ?? this.#begin())
      await (this.#fitting ??= this.#fit().finally(() => (this.#fitting = null)))
    } catch (error) {
      this.leave(user)
      throw error
    }
  }

  #begin() {
    const opening = this.#open().finally(() => {
      if (this.#opening === opening) this.#opening = null
    })
    return (this.#opening = opening)
  }

  /** Ask the browser anew for one that is open, as when another was chosen. */
  async reopen() {
    await this.#opening
    if (this.stream) await this.#open()
  }

  get #wish() {
    return largest([...this.users.values()].flat())
  }

  // An open camera is set to another mode: no other question to the user, no light that goes off.
  // A mode holds for all copies of a track, and while there are some Chromium leaves it as it is.
  async #fit() {
    while (this.stream && this.users.size) {
      const asked = JSON.stringify(this.#wish)
      if (asked === this.#asked) return
      this.#asked = asked
      const { stream, track } = this
      for (const tap of this.#taps) tap.stop()
      await soon(track.applyConstraints(this.settings(this.#wish))).catch(() => {})
      // one that was unplugged meanwhile gives no pictures in any mode
      if (this.stream === stream && track.readyState === 'live') this.#began()
    }
  }

  #began() {
    this.takes += 1
    this.dispatchEvent(new Event('opened'))
  }

  /** A user is done; with the last one the light goes off. */
  leave(user) {
    this.users.delete(user)
    if (this.users.size) return
    // a question that its user never answers is waited for by nobody who comes later
    this.#opening = null
    this.#close()
  }

  async #open() {
    const wish = this.#wish
    const mine = (this.#opens += 1)
    let stream
    try {
      stream = await this.ask(wish)
    } catch (error) {
      if (mine !== this.#opens) return
      throw this.failure(error)
    }
    if (!this.users.size || mine !== this.#opens) {
      for (const track of stream.getTracks()) track.stop()
      return
    }
    this.release()
    this.stream = stream
    this.#asked = JSON.stringify(wish)
    this.track = stream.getVideoTracks()[0]
    this.track.onended = () => this.ended()
    // never in the document: Nodes 2.0 moves widgets about, which would stop it
    this.video = document.createElement('video')
    Object.assign(this.video, { muted: true, playsInline: true, srcObject: stream })
    try {
      await soon(this.video.play())
    } catch (error) {
      // closed or replaced meanwhile
      if (this.stream !== stream) return
      this.#close()
      throw this.failure(error)
    }
    if (this.stream !== stream) return
    this.#watch(this.video)
    this.#began()
  }

  #watch(video) {
    const seen = () => {
      if (this.video !== video) return
      this.#fresh = true
      this.#woken?.()
      video.requestVideoFrameCallback(seen)
    }
    video.requestVideoFrameCallback?.(seen)
  }

  /**
   * The video as soon as it has a picture that was not taken, where tap() gives none; null where it
   * is too soon for one.
   *
   * @param fresh null, too, where no new one came for a while
   */
  async next(fresh = false) {
    const { video } = this
    if (!video) return null
    if (document.hidden || !video.requestVideoFrameCallback) {
      // nothing is told of new pictures: there are as many as the camera says, of a still screen none
      const rate = fresh && this.asks ? STILL : this.rate || UNSAID.fps
      if (performance.now() - this.#taken < 1000 / rate) return null
    } else if (!this.#fresh) {
      await new Promise((resolve) => {
        this.#woken = resolve
        setTimeout(resolve, REST)
      })
      if (fresh && !this.#fresh) return null
    }
    this.#fresh = false
    this.#taken = performance.now()
    return this.video
  }

  /** The other side has ended it. */
  ended() {
    this.dispatchEvent(new Event('lost'))
  }

  #close() {
    if (!this.stream) return
    this.release()
    this.dispatchEvent(new Event('closed'))
  }

  /** Let go of the stream, whoever uses it. */
  release() {
    if (!this.stream) return
    for (const track of this.stream.getTracks()) {
      track.onended = null
      track.stop()
    }
    this.video.srcObject = null
    this.stream = this.track = this.video = null
  }

  /** What the worker reads pictures from, until stop() is called; null where a browser has none. */
  tap() {
    if (!this.track || typeof MediaStreamTrackProcessor === 'undefined') return null
    // of its own, because a stream ends cleanly only with its track
    const track = this.track.clone()
    const { readable } = new MediaStreamTrackProcessor({ track, maxBufferSize: 1 })
    const tap = {
      readable,
      stop: () => {
        track.stop()
        this.#taps.delete(tap)
      }
    }
    this.#taps.add(tap)
    return tap
  }

  /** One picture as a JPEG that covers a wish, for an ordinary prompt. */
  async snapshot(wish) {
    const { width, height } = largest([wish])
    const { videoWidth, videoHeight } = this.video
    const scale = Math.min(1, Math.max(width / videoWidth, height / videoHeight))
    const canvas = new OffscreenCanvas(
      Math.max(1, Math.round(videoWidth * scale)),
      Math.max(1, Math.round(videoHeight * scale))
    )
    canvas.getContext('2d').drawImage(this.video, 0, 0, canvas.width, canvas.height)
    return canvas.convertToBlob({ type: 'image/jpeg', quality: 0.95 })
  }
}

/** The camera of this computer. */
export class Camera extends Capture {
  #forgetful = null // the choice, where the browser keeps nothing

  /** Device id chosen by the user on this computer; '' for the browser's choice. */
  get choice() {
    if (this.#forgetful !== null) return this.#forgetful
    try {
      return localStorage.getItem(CHOICE) ?? ''
    } catch {
      return ''
    }
  }

  // a browser that keeps nothing, or has no room left, has it for as long as the page is open
  #keep(device) {
    this.#forgetful = null
    try {
      if (device) localStorage.setItem(CHOICE, device)
      else localStorage.removeItem(CHOICE)
    } catch {
      this.#forgetful = device
    }
  }

  async choose(device) {
    const before = this.choice
    this.#keep(device)
    try {
      await this.reopen()
    } catch (error) {
      this.#keep(before)
      throw error
    }
  }

  /** Cameras by name, which the browser tells only once it has allowed one; none where it tells of none. */
  async devices() {
    const all = (await navigator.mediaDevices?.enumerateDevices?.().catch(() => [])) ?? []
    return all
      .filter((device) => device.kind === 'videoinput')
      .map(({ deviceId, label }, i) => ({
        id: deviceId,
        label: label || this.say('cameraNumber', { number: i + 1 })
      }))
  }

  /** Whether the camera opens without a question to the user. */
  async allowed() {
    try {
      return (await navigator.permissions.query({ name: 'camera' })).state === 'granted'
    } catch {
      return false
    }
  }

  async ask(wish) {
    const video = constraints(wish)
    if (this.choice) video.deviceId = { exact: this.choice }
    try {
      return await navigator.mediaDevices.getUserMedia({ video, audio: false })
    } catch (error) {
      if (error?.name !== 'OverconstrainedError' || !this.choice) throw error
      // the camera chosen last time is not connected now
      this.#keep('')
      return this.ask(wish)
    }
  }

  settings(wish) {
    return constraints(wish)
  }

  /** The reason why a camera does not open, in plain words. */
  failure(error) {
    if (FAILURES.includes(error?.name)) return new Error(this.say(error.name))
    return new Error(this.say('cameraFails', { reason: error?.message ?? error }))
  }
}

/**
 * The screen of this computer, or a window or a tab of it, as its user chooses.
 *
 * The browser asks at each opening, and only just after a click or a key. Sharing that the user has
 * ended is not begun again by itself: who still uses it waits for `choose`.
 */
export class Desktop extends Capture {
  asks = true
  insecure = 'screenInsecure'

  ask({ fps }) {
    if (!navigator.mediaDevices.getDisplayMedia) throw new DOMException('', 'NotSupportedError')
    // sizes are left alone: a window that is made smaller by the browser is not sharp
    const video = { frameRate: { ideal: fps } }
    return navigator.mediaDevices.getDisplayMedia({ video, audio: false, surfaceSwitching: 'include' })
  }

  settings({ fps }) {
    return { frameRate: { ideal: fps } }
  }

  /** What is shared, as the browser calls it; '' for nothing. */
  get name() {
    return this.track?.label ?? ''
  }

  /** Ask which one, anew, for those who use it. Throws Error with plain words. */
  async choose() {
    if (this.stream) return this.reopen()
    const users = [...this.users]
    try {
      for (const [user, wishes] of users) await this.use(user, wishes)
    } catch (error) {
      for (const [user, wishes] of users) this.users.set(user, wishes)
      throw error
    }
  }

  // its users stay, and hear of it when it is opened again
  ended() {
    this.release()
    this.dispatchEvent(new Event('closed'))
    super.ended()
  }

  /** The reason why nothing is shared, in plain words. */
  failure(error) {
    const reasons = {
      NotAllowedError: 'screenNotAllowed', InvalidStateError: 'screenNoPress',
      NotSupportedError: 'screenNotHere', AbortError: 'screenSilent'
    }
    const key = reasons[error?.name]
    if (key) return new Error(this.say(key))
    return new Error(this.say('screenFails', { reason: error?.message ?? error }))
  }
}
