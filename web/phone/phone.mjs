// The phone's page: its camera goes to one Live Camera of one live run, and nothing else goes anywhere.

import { Awake } from '../live/awake.mjs'
import { Capture, constraints } from '../live/camera.mjs'
import { Words } from '../live/words.mjs'

const FACINGS = ['environment', 'user'] // the back, and the front
const WISH = { width: 512, height: 512, fps: 30 } // until the run has said what it wants
const AGAIN = 1500 // ms between two attempts to reach the run
const EVERY = 500 // ms between two figures
const UNUSED = 3000 // ms in which what is sent is not taken, and it is said

// what the pack's modules say of ComfyUI's page, as it is said here
const HERE = {
  NotAllowedError: 'visitNotAllowed', NotFoundError: 'visitNotFound',
  NotReadableError: 'visitNotReadable', insecure: 'phoneInsecure'
}
const KNOWN = ['NotAllowedError', 'NotFoundError', 'NotReadableError', 'AbortError']
// the languages that there are words in, by how a browser's begins; see locales/
const LANGUAGES = {
  es: 'es', fr: 'fr', ja: 'ja', ko: 'ko', pt: 'pt-BR', ru: 'ru', 'zh-tw': 'zh-TW', 'zh-hk': 'zh-TW',
  'zh-hant': 'zh-TW', zh: 'zh'
}

const BUSY = new Set(['opening', 'sending']) // phases that a press ends

const $ = (id) => document.getElementById(id)
const key = location.pathname.split('/').filter(Boolean).at(-1)

function language() {
  for (const tag of navigator.languages ?? [navigator.language]) {
    const low = tag.toLowerCase()
    if (low.startsWith('en')) break
    const found = Object.keys(LANGUAGES).find((one) => low.startsWith(one))
    if (found) return LANGUAGES[found]
  }
  return 'en'
}

/** The back or the front camera; a phone opens one at a time. */
class PhoneCamera extends Capture {
  facing = FACINGS[0]

  ask(wish) {
    const video = { ...constraints(wish), facingMode: { ideal: this.facing } }
    return navigator.mediaDevices.getUserMedia({ video, audio: false })
  }

  settings(wish) {
    return { ...constraints(wish), facingMode: { ideal: this.facing } }
  }

  failure(error) {
    const known = KNOWN.includes(error?.name)
    if (known) return new Error(this.say(error.name))
    return new Error(this.say('cameraFails', { reason: error?.message ?? error }))
  }

  async turn() {
    this.facing = FACINGS.find((one) => one !== this.facing)
    const users = [...this.users]
    this.release()
    for (const [user, wishes] of users) await this.use(user, wishes)
  }
}

const words = new Words({ fetchApi: () => fetch(new URL('../../../i18n', location.href)) }, language)
await words.load()
const say = (name, values) => words.say(HERE[name] ?? name, values)
document.documentElement.lang = language()

const camera = new PhoneCamera(say)
const awake = new Awake()
const self = {} // who has the camera open
let worker = null
let tap = null
let wish = WISH
let run = '' // how it is, as the server says
let connected = false
let sent = [] // times of pictures that were taken
let refused = 0 // since when none is
let timer = 0
let attempt = 0 // to open the camera; one that a press has ended may still get its answer

/**
 * What this phone calls itself: the one that came first stays the only one.
 *
 * Made as a page by plain http can, too, for it has to say what it needs.
 */
function mark() {
  const name = `livediffusion.phone.${key}`
  const bytes = [...crypto.getRandomValues(new Uint8Array(16))]
  const made = bytes.map((n) => n.toString(16).padStart(2, '0')).join('')
  try {
    const kept = sessionStorage.getItem(name)
    if (!kept) sessionStorage.setItem(name, made)
    return kept || made
  } catch {
    return made
  }
}

const me = mark()

// -- what is seen -------------------------------------------------------------------------

function show(phase, problem = '') {
  document.body.dataset.phase = phase
  $('problem').textContent = problem
  $('go').textContent = say(BUSY.has(phase) ? 'stop' : 'visitStart')
  $('seen').classList.toggle('mirror', camera.facing === 'user')
  status()
}

function status() {
  const now = performance.now()
  sent = sent.filter((at) => now - at < 2000)
  const on = document.body.dataset.phase === 'sending'
  const live = on && connected && sent.length > 0
  $('status').dataset.on = live ? 'yes' : 'no'
  $('status').textContent = !on ? '' : told(live, now)
}

function told(live, now) {
  if (!connected) return say('phoneLost')
  if (live) return say('phoneSending', { fps: Math.round(sent.length / 2) })
  if (run === 'live' && refused && now - refused > UNUSED) return say('phoneUnused')
  return say(run === 'live' ? 'starting' : 'phoneQueued')
}

/** It is over for good. @param reason sentences, of which the first is the largest */
function over(reason) {
  stop()
  const [, first, rest] = reason.match(/^(.+?[.\u3002])\s*(.*)$/su) ?? [reason, reason, '']
  $('title').textContent = first
  $('what').textContent = rest
  show('over')
}

// -- what is sent -------------------------------------------------------------------------

async function start() {
  const mine = (attempt += 1)
  show('opening')
  try {
    await camera.use(self, [wish])
  } catch (error) {
    return mine === attempt && show('welcome', error.message)
  }
  if (mine !== attempt) return
  connect()
  awake.keep(true)
  timer = setInterval(status, EVERY)
  show('sending')
}

function stop() {
  attempt += 1
  clearInterval(timer)
  connected = false
  disconnect()
  camera.leave(self)
  awake.keep(false)
}

function connect() {
  disconnect()
  worker = new Worker(new URL('../live/worker.mjs', import.meta.url), { type: 'module' })
  worker.onmessage = ({ data }) => hear(data)
  worker.onerror = ({ message }) => message === undefined && over(say('notLoaded'))
  const url = new URL('frames', location.href)
  url.protocol = url.protocol.replace('http', 'ws')
  url.searchParams.set('phone', me)
  worker.postMessage({ type: 'open', url: url.href, tells: true })
  worker.postMessage({ type: 'cover', place: 0, cover: wish })
  feed()
}

function disconnect() {
  tap?.stop()
  tap = null
  const before = worker
  worker = null
  if (!before) return
  before.onmessage = null
  before.postMessage({ type: 'close' })
  setTimeout(() => before.terminate(), 2000)
}

function feed() {
  $('seen').srcObject = camera.stream
  if (!worker || !camera.stream) return
  tap?.stop()
  tap = camera.tap()
  const readable = tap?.readable
  worker.postMessage({ type: 'camera', place: 0, readable }, readable ? [readable] : [])
}

async function hear(data) {
  if (data.type === 'want') return picture(data.fresh)
  if (data.type === 'closed') return closed(data.code)
  if (data.type !== 'message') return
  const { message } = data
  if (message.type === 'received') taken(message.refused)
  else if (message.type === 'pace') fit(message)
  else if (message.type === 'state') state(message.state)
  else if (message.type === 'refused')
    over(say(message.why === 'taken' ? 'phoneTaken' : 'phoneUnknown'))
  status()
}

function taken(reason) {
  connected = true
  if (!reason) sent.push(performance.now())
  refused = reason ? refused || performance.now() : 0
}

function state(next) {
  run = next
  connected = true
  if (next === 'ended' || next === 'failed') over(say('phoneOver'))
}

// as large and as often as the graph wants them
function fit({ width, height, interval_ms }) {
  const next = { width, height, fps: Math.max(1, Math.round(1000 / interval_ms)) }
  const same = next.width === wish.width && next.height === wish.height
  wish = { ...next, fps: same ? wish.fps : Math.max(wish.fps, next.fps) }
  if (!same && camera.stream) camera.use(self, [wish]).catch(() => {})
}

async function picture(fresh) {
  const video = await camera.next(fresh)
  const bitmap = video && (await createImageBitmap(video).catch(() => null))
  worker?.postMessage({ type: 'bitmap', place: 0, bitmap }, bitmap ? [bitmap] : [])
}

// a code of 4409 or 4410 was told in words before; anything else may come back
function closed(code) {
  connected = false
  if (document.body.dataset.phase !== 'sending') return
  if (code === 4409) return over(say('phoneTaken'))
  if (code === 4410) return over(say('phoneOver'))
  disconnect()
  setTimeout(() => document.body.dataset.phase === 'sending' && !worker && connect(), AGAIN)
}

// -- the page -----------------------------------------------------------------------------

camera.addEventListener('opened', feed)
camera.addEventListener('lost', () => {
  stop()
  show('welcome', say('disconnected'))
})
// a phone that was locked has perhaps lost its connection
document.addEventListener('visibilitychange', () => {
  if (document.hidden || document.body.dataset.phase !== 'sending') return
  if (!worker) connect()
})
const end = () => {
  stop()
  show('welcome')
}
// the browser may show the page again as it was left
window.addEventListener('pagehide', () => BUSY.has(document.body.dataset.phase) && end())
$('go').onclick = () => (BUSY.has(document.body.dataset.phase) ? end() : start())
$('turn').onclick = async () => {
  const mine = attempt
  try {
    await camera.turn()
    if (mine === attempt) show('sending')
  } catch (error) {
    if (mine !== attempt) return
    stop()
    show('welcome', error.message)
  }
}
$('turn').setAttribute('aria-label', say('phoneTurn'))
$('title').textContent = document.title = say('phoneTitle')
$('what').textContent = say('phoneWhat', { host: location.host })
show('welcome', window.isSecureContext ? '' : say('insecure'))
