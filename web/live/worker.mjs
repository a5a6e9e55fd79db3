// The frame socket, off the page's thread: camera pictures up, view pictures down.
//
// Nothing queues here. A camera picture is sent only while fewer than two are unanswered; of the
// others the next one is as good. The layout of a message is in docs/live.md, "On the wire".

const HEADER = 24
const CAMERA = 1
const COMPARED = 3
const JPEG = 1
const MOST_AWAY = 2
const EARLY = 8 // ms, or a quarter of the interval where that is less
const LOOK = 4 // ms between two looks whether a picture is due; browsers make less into this
const AGAIN = 250 // ms between two attempts to reach a run whose connection broke
const GIVE_UP = 2000
const FINAL = new Set([1000, 4409, 4410])

let url = null
let socket = null
let lostAt = 0
let away = 0
let sequence = 0
let due = 0
let pace = 33
let cover = { width: 512, height: 512 }
let encoding = false
let reader = null
let reading = Promise.resolve()
let ticking = null
let asked = false
let canvas = null

const compared = new Set() // views whose pictures are wanted with what they were made from

let turn = Promise.resolve()

const now = () => performance.timeOrigin + performance.now()

function open() {
  socket = new WebSocket(url)
  socket.binaryType = 'arraybuffer'
  away = 0
  socket.onopen = () => {
    lostAt = 0
    for (const view of compared) wish(view)
  }
  socket.onmessage = ({ data }) => (typeof data === 'string' ? hear(data) : show(data))
  socket.onclose = ({ code }) => {
    socket = null
    if (FINAL.has(code)) return postMessage({ type: 'closed', code })
    lostAt ||= now()
    if (now() - lostAt > GIVE_UP) return postMessage({ type: 'closed', code })
    setTimeout(() => url && open(), AGAIN)
  }
}

function hear(text) {
  const message = JSON.parse(text)
  if (message.type === 'received') away = Math.max(0, away - 1)
  else if (message.type === 'pace') pace = message.interval_ms
  else postMessage({ type: 'message', message })
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

function shown(view, seq, latency) {
  if (socket?.readyState !== WebSocket.OPEN) return
  socket.send(JSON.stringify({ type: 'shown', view, seq, latency_ms: latency }))
}

function wanted(at) {
  return (
    !encoding &&
    at >= due &&
    away < MOST_AWAY &&
    socket?.readyState === WebSocket.OPEN &&
    socket.bufferedAmount === 0
  )
}

async function send(frame, width, height) {
  const captured = now()
  // a camera's own rhythm is kept: the next picture may come a little early
  due = captured + pace - Math.min(EARLY, pace / 4)
  encoding = true
  try {
    const scale = Math.min(1, Math.max(cover.width / width, cover.height / height))
    const w = Math.max(1, Math.round(width * scale))
    const h = Math.max(1, Math.round(height * scale))
    if (canvas?.width !== w || canvas?.height !== h) canvas = new OffscreenCanvas(w, h)
    canvas.getContext('2d', { alpha: false }).drawImage(frame, 0, 0, w, h)
    const blob = await canvas.convertToBlob({ type: 'image/jpeg', quality: 0.85 })
    const data = new Uint8Array(HEADER + blob.size)
    const head = new DataView(data.buffer)
    head.setUint8(0, CAMERA)
    head.setUint8(1, JPEG)
    head.setUint32(4, sequence, true)
    head.setFloat64(8, captured, true)
    data.set(new Uint8Array(await blob.arrayBuffer()), HEADER)
    if (socket?.readyState === WebSocket.OPEN) {
      socket.send(data)
      sequence += 1
      away += 1
    }
  } finally {
    encoding = false
  }
}

async function read(readable) {
  const mine = (reader = readable.getReader())
  // to its end, also when it is not wanted any more: the browser complains of unclosed frames
  for (;;) {
    const { done, value } = await mine.read()
    if (done) return
    try {
      if (reader === mine && wanted(now())) await send(value, value.displayWidth, value.displayHeight)
    } finally {
      value.close()
    }
  }
}

// where the browser cannot hand the camera to a worker, the page is asked for each picture
function ask() {
  asked = false
  ticking = setInterval(() => {
    if (asked || !wanted(now())) return
    asked = true
    postMessage({ type: 'want' })
  }, LOOK)
}

function off() {
  clearInterval(ticking)
  ticking = null
  // its track is stopped, so it ends by itself; to cancel it would lose a frame unclosed
  reader = null
}

const orders = {
  open(order) {
    url = order.url
    open()
  },
  // for the next connection
  address(order) {
    if (url) url = order.url
  },
  camera({ readable }) {
    off()
    if (readable) reading = read(readable).catch(() => {})
    else ask()
  },
  async bitmap({ bitmap }) {
    asked = false
    if (!bitmap) return
    if (ticking && wanted(now())) await send(bitmap, bitmap.width, bitmap.height)
    bitmap.close()
  },
  cover: (order) => (cover = order.cover),
  off,
  compare({ view, on }) {
    if (on) compared.add(view)
    else compared.delete(view)
    wish(view)
  },
  shown: (order) => shown(order.view, order.seq, order.latency),
  close() {
    off()
    url = null
    socket?.close(1000)
    reading.then(() => self.close())
  }
}

onmessage = ({ data }) => orders[data.type](data)
