// The frame socket, off the page's thread: camera pictures up, view pictures down.
//
// Nothing queues here. Each lane, the camera or the screen, sends a picture only while fewer than two of
// its own are unanswered; of the others the next one is as good. The layout of a message is in
// docs/live.md, "On the wire".

const HEADER = 24
const CAMERA = 1
const COMPARED = 3
const JPEG = 1
const MOST_AWAY = 2
const EARLY = 8 // ms, or a quarter of the interval where that is less
const LOOK = 4 // ms between two looks whether a picture is due; browsers make less into this
const AGAIN = 250 // ms between two attempts to reach a run whose connection broke
const GIVE_UP = 2000
const LISTEN = 3000 // ms between two looks whether anything was heard: the server says something that often
const SILENT = 5 // looks in a row without a word after which the connection is dead
const STILL = 100 // ms without a picture after which a screen's last is sent again: it has not moved
const QUIET = 500 // ms without a picture after which the page is asked for them
const UNHEARD = 1006 // the code that browsers give to a connection that broke
const FINAL = new Set([1000, 4409, 4410])

let url = null
let socket = null
let lostAt = 0
let tells = false // whether the page is told of each picture that was taken
let sequence = 0 // of pictures, of all lanes together: each has rising ones

const compared = new Set() // views whose pictures are wanted with what they were made from

const tracks = new Set() // views whose pictures come by WebRTC

let turn = Promise.resolve()

const now = () => performance.timeOrigin + performance.now()

function open() {
  const mine = (socket = new WebSocket(url))
  let silent = 0
  socket.binaryType = 'arraybuffer'
  for (const one of lanes.values()) one.away = 0
  socket.onopen = () => {
    lostAt = silent = 0
    for (const view of compared) wish(view)
    for (const view of tracks) leave(view)
  }
  socket.onmessage = ({ data }) => {
    silent = 0
    if (typeof data === 'string') hear(data)
    else show(data)
  }
  socket.onclose = ({ code }) => {
    clearInterval(looks)
    lost(code)
  }
  // nothing tells of a cable that was pulled, or of a network that was left. Looks are counted, not
  // seconds: of a machine that slept there was one, and what has come is heard before the next
  const looks = setInterval(() => {
    silent += 1
    if (silent <= SILENT) return
    mine.onopen = mine.onmessage = mine.onclose = null
    mine.close() // which takes its time, and is not waited for
    clearInterval(looks)
    lost(UNHEARD)
  }, LISTEN)
}

function lost(code) {
  socket = null
  if (FINAL.has(code)) return postMessage({ type: 'closed', code })
  lostAt ||= now()
  if (now() - lostAt > GIVE_UP) return postMessage({ type: 'closed', code })
  setTimeout(() => url && open(), AGAIN)
}

function hear(text) {
  const message = JSON.parse(text)
  if (message.type === 'alive') return
  if (message.type === 'received') answered(message.camera)
  else if (message.type === 'pace') paced(message)
  if (message.type !== 'received' || tells) postMessage({ type: 'message', message })
}

function show(data) {
  const head = new DataView(data)
  const picture = {
    type: 'view',
    view: head.getUint16(2, true),
    seq: head.getUint32(4, true),
    captured: head.getFloat64(8, true),
    version: head.getUint32(16, true),
    source: head.getUint32(20, true)
  }
  const decoded = Promise.all(jpegs(data, head).map(decode))
  // two are decoded at once and may be ready in the other order
  turn = turn.then(async () => {
    const [bitmap, input] = await decoded
    if (bitmap) return postMessage({ ...picture, bitmap, input }, [bitmap, input].filter(Boolean))
    // a picture that cannot be shown is over as well
    input?.close()
    shown(picture.view, picture.seq, null)
  })
}

/** The picture of a message, and the one that it was made from if that is there too. */
function jpegs(data, head) {
  if (head.getUint8(0) !== COMPARED) return [new Uint8Array(data, HEADER)]
  const length = head.getUint32(HEADER, true)
  const begin = HEADER + 4
  return [new Uint8Array(data, begin, length), new Uint8Array(data, begin + length)]
}

const decode = (jpeg) =>
  createImageBitmap(new Blob([jpeg], { type: 'image/jpeg' })).catch(() => null)

function wish(view) {
  if (socket?.readyState !== WebSocket.OPEN) return
  socket.send(JSON.stringify({ type: 'compare', view, on: compared.has(view) }))
}

function leave(view) {
  if (socket?.readyState !== WebSocket.OPEN) return
  socket.send(JSON.stringify({ type: 'elsewhere', view, on: tracks.has(view) }))
}

function shown(view, seq, latency) {
  if (socket?.readyState !== WebSocket.OPEN) return
  socket.send(JSON.stringify({ type: 'shown', view, seq, latency_ms: latency }))
}

/** One kind of pictures on their way up, by their place in the header of a message. */
class Lane {
  away = 0
  pace = 33
  cover = { width: 512, height: 512 }
  #place
  #due = 0
  #encoding = false
  #reader = null
  #timer = null
  #asked = false
  #heard = 0 // when the readable gave something
  #canvas = null
  #last = null
  reading = Promise.resolve()

  constructor(place) {
    this.#place = place
  }

  get #free() {
    return (
      !this.#encoding &&
      this.away < MOST_AWAY &&
      socket?.readyState === WebSocket.OPEN &&
      socket.bufferedAmount === 0
    )
  }

  #wanted(at) {
    return at >= this.#due && this.#free
  }

  async #send(frame, width, height) {
    const captured = now()
    // a camera's own rhythm is kept: the next picture may come a little early
    this.#due = captured + this.pace - Math.min(EARLY, this.pace / 4)
    this.#encoding = true
    try {
      const { cover } = this
      const scale = Math.min(1, Math.max(cover.width / width, cover.height / height))
      const w = Math.max(1, Math.round(width * scale))
      const h = Math.max(1, Math.round(height * scale))
      if (this.#canvas?.width !== w || this.#canvas?.height !== h)
        this.#canvas = new OffscreenCanvas(w, h)
      this.#canvas.getContext('2d', { alpha: false }).drawImage(frame, 0, 0, w, h)
      const blob = await this.#canvas.convertToBlob({ type: 'image/jpeg', quality: 0.85 })
      const data = new Uint8Array(HEADER + blob.size)
      data.set(new Uint8Array(await blob.arrayBuffer()), HEADER)
      this.#put(data, captured)
    } catch {
      // the next one may be well, on a canvas that is whole
      this.#canvas = null
    } finally {
      this.#encoding = false
    }
  }

  #put(data, captured) {
    const head = new DataView(data.buffer)
    head.setUint8(0, CAMERA)
    head.setUint8(1, JPEG)
    head.setUint16(2, this.#place, true)
    head.setUint32(4, sequence, true)
    head.setFloat64(8, captured, true)
    this.#last = { data, captured }
    if (socket?.readyState !== WebSocket.OPEN) return
    socket.send(data)
    sequence += 1
    this.away += 1
  }

  /** Send what a readable gives, to its end. */
  async read(readable, repeats) {
    const mine = (this.#reader = readable.getReader())
    this.#heard = now()
    this.#asked = false
    this.#timer = setInterval(() => {
      if (repeats) this.#again()
      this.#quiet()
    }, STILL / 4)
    // to its end, also when it is not wanted any more: the browser complains of unclosed frames
    for (;;) {
      const { done, value } = await mine.read()
      if (done) break
      this.#heard = now()
      try {
        if (this.#reader === mine && this.#wanted(now()))
          await this.#send(value, value.displayWidth, value.displayHeight)
      } finally {
        value.close()
      }
    }
    if (this.#reader === mine) this.off()
  }

  // a browser gives a screen's pictures when it has changed, but the graph may have, too
  #again() {
    if (this.#last && this.#free && now() - this.#last.captured > Math.max(STILL, this.pace))
      this.#put(this.#last.data, now())
  }

  // Seen in Chromium, of a camera that had been opened and closed a few times: nothing came here for
  // 9 to 15 s, while the page's video of it went on. It gives out no picture while too many of those
  // before are held, and loses some in its streams until it collects its garbage: that is likely why.
  // Of a screen that has not moved the page has no new one either.
  #quiet() {
    if (now() - this.#heard > QUIET) this.#want(true)
  }

  /** Where the browser cannot hand the camera to a worker, the page is asked for each picture. */
  ask() {
    this.#asked = false
    this.#timer = setInterval(() => this.#want(), LOOK)
  }

  /** @param fresh only one that the page has not given before; where there is none it says so */
  #want(fresh = false) {
    if (this.#asked || !this.#wanted(now())) return
    this.#asked = true
    postMessage({ type: 'want', place: this.#place, fresh })
  }

  async take(bitmap) {
    this.#asked = false
    if (!bitmap) return
    if (this.#timer !== null && this.#wanted(now())) await this.#send(bitmap, bitmap.width, bitmap.height)
    bitmap.close()
  }

  off() {
    clearInterval(this.#timer)
    this.#timer = null
    this.#last = null
    // its track is stopped, so it ends by itself; to cancel it would lose a frame unclosed
    this.#reader = null
  }
}

const lanes = new Map()

function lane(place) {
  if (!lanes.has(place)) lanes.set(place, new Lane(place))
  return lanes.get(place)
}

/** The server has taken a picture, or not; of which lane it does not say where it cannot read it. */
function answered(place) {
  const one = place == null ? [...lanes.values()].find(({ away }) => away > 0) : lane(place)
  if (one) one.away = Math.max(0, one.away - 1)
}

function paced({ camera, interval_ms, width, height }) {
  const one = lane(camera ?? 0)
  one.pace = interval_ms
  // a size that is not known yet changes nothing
  if (width > 0 && height > 0) one.cover = { width, height }
}

const orders = {
  open(order) {
    url = order.url
    tells = order.tells ?? false
    open()
  },
  // for the next connection
  address(order) {
    if (url) url = order.url
  },
  camera({ place, readable, repeats }) {
    const one = lane(place)
    one.off()
    if (readable) one.reading = one.read(readable, repeats).catch(() => {})
    else one.ask()
  },
  bitmap: ({ place, bitmap }) => lane(place).take(bitmap),
  cover: ({ place, cover }) => (lane(place).cover = cover),
  off: ({ place }) => lane(place).off(),
  compare({ view, on }) {
    if (on) compared.add(view)
    else compared.delete(view)
    wish(view)
  },
  elsewhere({ view, on }) {
    if (on) tracks.add(view)
    else tracks.delete(view)
    leave(view)
  },
  shown: (order) => shown(order.view, order.seq, order.latency),
  close() {
    for (const one of lanes.values()) one.off()
    url = null
    socket?.close(1000)
    Promise.all([...lanes.values()].map(({ reading }) => reading)).then(() => self.close())
  }
}

onmessage = ({ data }) => orders[data.type](data)
