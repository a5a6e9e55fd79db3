// WebRTC in place of JPEGs on the WebSocket: the page's camera as a track up, views as tracks down.
//
// Each track has a connection of its own, made as any program makes one (WHIP, WHEP: live/whip.py),
// so that an edit of the graph is nothing to negotiate again. The WebSocket stays for all that is
// said, and says of each picture of a track what it is, by its RTP time. What does not work by
// WebRTC goes by the WebSocket as ever.

const GATHER = 500 // ms that addresses of this computer are waited for
const COMES = 6000 // ms in which a connection must be there, and a view's first picture
const LATE = 60 // ms that what is said of a picture may come after it
const LOOK = 1000 // ms between two looks at the figures, and at what has come
const STANDS = 3000 // ms without a picture; the server repeats its last one twice a second
const REMEMBERED = 64 // pictures of which what is said is kept
const MOST = 8e6 // bit/s that the camera may take
const START = 2500 // kbit/s that Chromium begins with, which would take 300 and seconds to grow

const SETTING = 'livediffusion.transport'
const [SOCKET, TRACKS] = ['WebSocket', 'WebRTC']

/** The setting in ComfyUI's dialog; it holds from the next start of Live on. */
export const transport = (say) => ({
  id: SETTING,
  name: say('transport'),
  tooltip: say('transportTip'),
  category: ['LiveDiffusion', 'Live', 'transport'],
  type: 'combo',
  options: [SOCKET, TRACKS],
  defaultValue: SOCKET
})

/** The class below where the setting asks for it and the browser can; else null. */
export function chosen(app) {
  const wanted = app.extensionManager?.setting?.get?.(SETTING) === TRACKS
  return wanted && typeof RTCPeerConnection !== 'undefined' ? WebRtc : null
}

/** One connection with one track. */
class Link {
  #connection = new RTCPeerConnection()
  #broke
  #before = null
  figures = { mbps: null, trip: null }

  /** @param broke called once when it is there no more, or never was */
  constructor(broke) {
    this.#broke = broke
    this.#connection.onconnectionstatechange = () => {
      if (this.#connection.connectionState === 'failed') this.#end()
      if (this.#connection.connectionState === 'connected') clearTimeout(this.waiting)
    }
    this.waiting = setTimeout(() => this.#end(), COMES)
    this.looking = setInterval(() => this.#look(), LOOK)
  }

  get connection() {
    return this.#connection
  }

  #end() {
    const broke = this.#broke
    this.close()
    broke?.()
  }

  /**
   * Offer what has been added, and take what is answered.
   *
   * @param post sends an offer, gives the answer
   */
  async open(post) {
    const link = this.#connection
    await link.setLocalDescription(await link.createOffer())
    await gathered(link)
    const answer = await post(link.localDescription.sdp)
    if (link.signalingState === 'closed') return
    await link.setRemoteDescription({ type: 'answer', sdp: started(answer) })
    // the other end's goodbye: ICE would look for it for half a minute. An edit that wants this
    // track no more may be told of in a moment
    const way = link.getSenders()[0]?.transport
    way?.addEventListener('statechange', () => {
      if (way.state === 'closed') setTimeout(() => this.#end(), LOOK)
    })
  }

  // bytes since the last look, and the round trip of the pair that is used
  async #look() {
    const all = [...(await this.#connection.getStats()).values()]
    const media = all.filter(({ type }) => type === 'inbound-rtp' || type === 'outbound-rtp')
    const bytes = media.reduce((sum, one) => sum + (one.bytesReceived ?? one.bytesSent ?? 0), 0)
    const at = performance.now()
    if (this.#before) {
      const [before, since] = this.#before
      this.figures.mbps = (8e-3 * (bytes - before)) / (at - since)
    }
    this.#before = [bytes, at]
    const pair = all.find(({ type, nominated, state }) =>
      type === 'candidate-pair' && nominated && state === 'succeeded')
    if (pair?.currentRoundTripTime != null) this.figures.trip = 1000 * pair.currentRoundTripTime
  }

  close() {
    this.#broke = null
    clearTimeout(this.waiting)
    clearInterval(this.looking)
    this.#connection.onconnectionstatechange = null
    this.#connection.close()
  }
}

/** The server wants all addresses with the offer. */
function gathered(link) {
  if (link.iceGatheringState === 'complete') return
  return new Promise((resolve) => {
    setTimeout(resolve, GATHER)
    link.onicegatheringstatechange = () => link.iceGatheringState === 'complete' && resolve()
  })
}

// what Chromium begins with is said in the other side's description of a codec
const started = (answer) => {
  const begin = `x-google-start-bitrate=${START}`
  const types = [...answer.matchAll(/^a=rtpmap:(\d+) (?:H264|VP8)\/90000/gim)].map(([, type]) => type)
  return types.reduce((text, type) => {
    const said = new RegExp(`^a=fmtp:${type} .*$`, 'm')
    if (said.test(text)) return text.replace(said, (line) => `${line};${begin}`)
    const map = new RegExp(`^a=rtpmap:${type} .*$`, 'm')
    return text.replace(map, (line) => `${line}\r\na=fmtp:${type} ${begin}`)
  }, answer)
}

/** A view's pictures, as they come. */
class Player {
  #take
  #about = new Map() // RTP time -> what is said of that picture
  #last = null
  #waiting = null
  #over = false
  #video = null
  #before = { came: 0, at: performance.now(), looks: 0 }
  /** Pictures that came, those that were sent again included. */
  came = 0

  /** @param take called with {bitmap, ...what is said of it} */
  constructor(take) {
    this.#take = take
  }

  /**
   * Whether nothing comes any more, asked at every look. A page that was hidden or asleep is late
   * with its timers, and looks before it reads what has come meanwhile: so two looks have to agree.
   */
  get stands() {
    const at = performance.now()
    const unseen = this.#video && document.hidden
    if (unseen || this.came !== this.#before.came) this.#before = { came: this.came, at, looks: 0 }
    else if (at - this.#before.at > STANDS) this.#before.looks += 1
    return this.#before.looks > 1
  }

  /** Something is said of a picture. */
  told({ rtp, seq, captured, version, source }) {
    this.#about.set(rtp, { seq, captured: 1000 * captured, version, source })
    if (this.#about.size > REMEMBERED) this.#about.delete(this.#about.keys().next().value)
    if (this.#waiting?.rtp === rtp) this.#waiting.come()
  }

  play(track) {
    if (typeof MediaStreamTrackProcessor === 'undefined') return this.#watch(track)
    const { readable } = new MediaStreamTrackProcessor({ track, maxBufferSize: 1 })
    this.#read(readable.getReader()).catch(() => {})
  }

  async #read(reader) {
    for (;;) {
      const { done, value } = await reader.read()
      if (done) return
      const { rtpTimestamp } = value.metadata?.() ?? {}
      const bitmap = this.#over ? null : await createImageBitmap(value).catch(() => null)
      value.close()
      if (bitmap) await this.#came(bitmap, rtpTimestamp)
    }
  }

  // where a browser hands no pictures out: those that it shows; it shows none in a hidden page
  #watch(track) {
    this.#video = document.createElement('video')
    const stream = new MediaStream([track])
    Object.assign(this.#video, { muted: true, playsInline: true, srcObject: stream })
    this.#video.play().catch(() => {})
    const next = () => this.#video?.requestVideoFrameCallback(async (_, { rtpTimestamp }) => {
      next()
      const bitmap = this.#video && (await createImageBitmap(this.#video).catch(() => null))
      if (bitmap) await this.#came(bitmap, rtpTimestamp)
    })
    next()
  }

  async #came(bitmap, rtp) {
    this.came += 1
    if (rtp !== undefined && !this.#about.has(rtp)) {
      await new Promise((come) => {
        this.#waiting = { rtp, come }
        setTimeout(come, LATE)
      })
      this.#waiting = null
    }
    // one of which nothing is said is the one before, sent again
    const about = this.#about.get(rtp) ?? this.#last
    this.#about.delete(rtp)
    if (this.#over || !about) return bitmap.close()
    this.#last = about
    this.#take({ ...about, bitmap })
  }

  end() {
    this.#over = true
    this.#waiting?.come()
    if (this.#video) this.#video.srcObject = null
    this.#video = null
  }
}

/** The tracks of one run. */
export class WebRtc {
  #post
  #take
  #elsewhere
  #lost
  #up = new Map() // place of a lane -> {link, sender, track}
  #down = new Map() // index of a view -> {link, player, seen, looking}
  #failed = new Set() // what is not tried again in this run
  #compared = new Set()
  #paces = new Map()
  #views = new Map() // index -> path, of those that are wanted
  #over = false

  /**
   * @param tools post(path, offer) gives the answer; take(picture) shows one of a view;
   *   elsewhere(view, on) tells the server that a view's pictures come by a track; lost(place) a
   *   lane's track is over: its pictures go by the WebSocket
   */
  constructor({ post, take, elsewhere, lost }) {
    this.#post = post
    this.#take = take
    this.#elsewhere = elsewhere
    this.#lost = lost
  }

  /**
   * Send a track in place of a lane's pictures; again with another, or with the same.
   *
   * @param path where the offer goes; undefined where the server has no WebRTC
   * @returns whether it is sent this way
   */
  send(place, track, path) {
    if (!path || !track || this.#over || this.#failed.has(path)) return false
    const there = this.#up.get(place)
    if (there) {
      if (there.track !== track) there.sender.replaceTrack(track).catch(() => {})
      there.track = track
      return true
    }
    const broke = () => {
      this.#failed.add(path)
      this.unsend(place)
      this.#lost(place)
    }
    const link = new Link(broke)
    track.contentHint = 'motion'
    const { sender } = link.connection.addTransceiver(track, { direction: 'sendonly' })
    this.#up.set(place, { link, sender, track })
    link.open((offer) => this.#post(path, offer)).then(() => this.#pace(place), broke)
    return true
  }

  unsend(place) {
    this.#up.get(place)?.link.close()
    this.#up.delete(place)
  }

  /** How fast and how large the server wants a lane's pictures. */
  pace(message) {
    this.#paces.set(message.camera, message)
    this.#pace(message.camera)
  }

  #pace(place) {
    const { sender, track } = this.#up.get(place) ?? {}
    const wish = this.#paces.get(place)
    const parameters = sender?.getParameters()
    if (!wish || !parameters?.encodings?.length) return
    const { width, height } = track.getSettings()
    const scale = Math.min((width ?? 0) / wish.width, (height ?? 0) / wish.height)
    Object.assign(parameters.encodings[0], {
      maxBitrate: MOST,
      maxFramerate: Math.max(1, 1000 / wish.interval_ms),
      scaleResolutionDownBy: Math.max(1, scale || 1)
    })
    sender.setParameters(parameters).catch(() => {})
  }

  /** Have these views, and no others, come as tracks: [{index, whep}]. */
  watch(views) {
    const wanted = new Map(views.map(({ index, whep }) => [index, whep]))
    for (const index of this.#down.keys()) if (!wanted.has(index)) this.#leave(index)
    this.#views = wanted
    for (const [index, path] of wanted) this.#play(index, path)
  }

  #play(index, path) {
    const busy = this.#down.has(index) || this.#compared.has(index)
    if (!path || busy || this.#over || this.#failed.has(path)) return
    const broke = () => {
      this.#failed.add(path)
      this.#leave(index)
    }
    const link = new Link(broke)
    const player = new Player((picture) => this.#came(index, picture))
    const one = { link, player, seen: false }
    one.looking = setInterval(() => player.stands && one.seen && broke(), LOOK)
    this.#down.set(index, one)
    const { receiver } = link.connection.addTransceiver('video', { direction: 'recvonly' })
    // pictures are shown as soon as they are there
    receiver.jitterBufferTarget = 0
    receiver.playoutDelayHint = 0
    link.connection.ontrack = ({ track }) => player.play(track)
    // a run that is not live yet has no view to play
    const open = () => link.open((offer) => this.#post(path, offer, true))
    open().catch((error) => (error.status === 409 ? this.#later(index, path) : broke()))
  }

  #later(index, path) {
    this.#leave(index)
    setTimeout(() => this.#views.get(index) === path && this.#play(index, path), LOOK)
  }

  #came(index, picture) {
    const one = this.#down.get(index)
    if (!one) return picture.bitmap.close()
    if (!one.seen) this.#elsewhere(index, (one.seen = true))
    this.#take({ type: 'view', view: index, ...picture })
  }

  #leave(index) {
    const one = this.#down.get(index)
    if (!one) return
    this.#down.delete(index)
    clearInterval(one.looking)
    one.player.end()
    one.link.close()
    if (one.seen) this.#elsewhere(index, false)
  }

  /** What the server says of a picture that comes by a track. */
  told(message) {
    this.#down.get(message.view)?.player.told(message)
  }

  /**
   * A view that compares gets its pictures on the WebSocket: each with the frame that it was made
   * from, which belong together.
   */
  compare(index, on) {
    if (on) {
      this.#compared.add(index)
      this.#leave(index)
    } else {
      this.#compared.delete(index)
      this.#play(index, this.#views.get(index))
    }
  }

  /** Mbit/s and the round trip in ms of a view's track, and of all that goes up; null without. */
  figures(index) {
    const down = this.#down.get(index)
    if (!down?.seen) return null
    const up = [...this.#up.values()].map(({ link }) => link.figures.mbps ?? 0)
    return { ...down.link.figures, up: up.reduce((sum, one) => sum + one, 0) }
  }

  end() {
    this.#over = true
    for (const place of [...this.#up.keys()]) this.unsend(place)
    for (const index of [...this.#down.keys()]) this.#leave(index)
  }
}
