// The camera of this computer: permission, choice, pictures for the worker, light off.

const CHOICE = 'livediffusion.camera'

const WORDS = {
  NotAllowedError:
    'The browser does not allow this page to use the camera. Allow it with the camera symbol in the address bar, then press Live again.',
  NotFoundError: 'No camera was found. Connect one, or set the Live Camera to a file.',
  NotReadableError:
    'The camera is in use by another program. Close that program, then press Live again.',
  OverconstrainedError: 'The chosen camera is gone. Choose another one on the Live Camera.',
  AbortError: 'The camera stopped before it gave a picture. Try again.'
}
const INSECURE =
  'The camera needs https or localhost. Open ComfyUI as http://localhost or start it with --tls-keyfile and --tls-certfile.'

/** The reason why a camera does not open, in plain words. */
export function reason(error) {
  return WORDS[error?.name] ?? `The camera does not open: ${error?.message ?? error}`
}

export class Camera extends EventTarget {
  stream = null
  video = null
  users = new Set()
  #opening = null

  /** Device id chosen by the user on this computer; '' for the browser's choice. */
  get choice() {
    return localStorage.getItem(CHOICE) ?? ''
  }

  async choose(device) {
    const before = this.choice
    localStorage.setItem(CHOICE, device)
    try {
      await this.#opening
      if (this.stream) await this.#open()
    } catch (error) {
      localStorage.setItem(CHOICE, before)
      throw error
    }
  }

  /** Cameras by name; the browser tells names only once it has allowed a camera. */
  async devices() {
    const all = (await navigator.mediaDevices?.enumerateDevices?.()) ?? []
    return all
      .filter((device) => device.kind === 'videoinput')
      .map((device, i) => ({ id: device.deviceId, label: device.label || `Camera ${i + 1}` }))
  }

  /** Whether the camera opens without a question to the user. */
  async allowed() {
    try {
      return (await navigator.permissions.query({ name: 'camera' })).state === 'granted'
    } catch {
      return false
    }
  }

  /** Open the camera for a user (any object); throws an Error with plain words. */
  async use(user) {
    if (!window.isSecureContext || !navigator.mediaDevices) throw new Error(INSECURE)
    // known from the start: who leaves while the browser still asks gets no light afterwards
    this.users.add(user)
    try {
      if (!this.stream) await (this.#opening ??= this.#open())
    } catch (error) {
      this.users.delete(user)
      throw error
    } finally {
      this.#opening = null
    }
  }

  /** A user is done; with the last one the light goes off. */
  leave(user) {
    this.users.delete(user)
    if (this.users.size === 0) this.#close()
  }

  async #open() {
    const video = { width: { ideal: 1280 }, height: { ideal: 720 } }
    if (this.choice) video.deviceId = { exact: this.choice }
    let stream
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video, audio: false })
    } catch (error) {
      if (error?.name !== 'OverconstrainedError' || !this.choice) throw new Error(reason(error))
      // the camera chosen last time is not connected now
      localStorage.removeItem(CHOICE)
      return this.#open()
    }
    if (!this.users.size) {
      for (const track of stream.getTracks()) track.stop()
      return
    }
    this.#release()
    this.stream = stream
    this.track = stream.getVideoTracks()[0]
    this.track.onended = () => this.dispatchEvent(new Event('lost'))
    // never in the document: Nodes 2.0 moves widgets about, which would stop it
    this.video = document.createElement('video')
    Object.assign(this.video, { muted: true, playsInline: true, srcObject: stream })
    try {
      await this.video.play()
    } catch (error) {
      // closed or replaced meanwhile
      if (this.stream !== stream) return
      this.#close()
      throw new Error(reason(error))
    }
    if (this.stream === stream) this.dispatchEvent(new Event('opened'))
  }

  #close() {
    if (!this.stream) return
    this.#release()
    this.dispatchEvent(new Event('closed'))
  }

  #release() {
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
    return { readable, stop: () => track.stop() }
  }

  /** One picture as a JPEG that covers width x height, for an ordinary prompt. */
  async snapshot(width, height) {
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
