// The visitor's page: from the first look to the last picture.

import { Awake } from '../web/live/awake.mjs'
import { Camera } from '../web/live/camera.mjs'
import { Compare } from '../web/live/compare.mjs'
import { Picture, close } from '../web/live/picture.mjs'
import { Screen } from '../web/live/screen.mjs'
import { Invalid } from '../web/live/session.mjs'
import { addStyle, element } from '../web/live/style.mjs'
import { Words } from '../web/live/words.mjs'
import { Controls } from './controls.mjs'
import { House, Kept } from './house.mjs'
import { Stream } from './stream.mjs'
import { about, chosen, clock, spoken } from './text.mjs'
import { Values } from './values.mjs'

const DECIDES = 3000 // ms in which the house says what comes after a run that has ended
const LAST = [30, 10] // seconds before the end that are said aloud
const SECOND = 1000

const language = chosen(navigator.languages ?? [navigator.language])
const base = new URL('.', document.baseURI)
const words = new Words(
  { fetchApi: (path) => fetch(new URL(path.slice(1), base)) },
  () => language
)
await words.load()
const say = spoken(words)
document.documentElement.lang = language
addStyle(document)

const $ = (id) => document.getElementById(id)
const kept = new Kept()
const camera = new Camera(say)
const values = new Values(kept, (error) => error instanceof Invalid && error.status === 400)
const visit = new URL('visit', base)
visit.protocol = visit.protocol.replace('http', 'ws')
const house = new House(visit.href, kept)
const stream = new Stream({ camera, say, values, kept, house: base.href })
const controls = new Controls($('controls'), { words, say, element, values, camera })
const notes = new Map() // what is to be said over the picture, the most urgent first
const awake = new Awake() // a phone that nobody touches would go dark before the picture does
const self = {} // who has the camera open, whoever streams it

let welcome = null
let phase = 'loading'
let pictures = [] // of the views, in their order
let begun = 0 // times that somebody has pressed start
let until = null // when the time is up, in performance.now()'s time
let deciding = 0
let reason = null // why it moves, while it does
let queued = '' // its place in the line meanwhile
let failure = '' // what a gate said of a run that it has ended

// -- what is seen -----------------------------------------------------------------------------

/** Everything that depends on where the visitor is. */
function show(next, { lead = '', line = '', problem = '' } = {}) {
  const before = phase
  phase = next
  if (next !== before) document.body.dataset.phase = next
  const live = next === 'running' || next === 'moving'
  const waits = next === 'waiting' || next === 'starting' || next === 'asking'
  write('title', welcome?.title ?? '')
  write('lead', lead)
  write('line', line)
  write('problem', problem)
  $('front').hidden = live
  $('start').hidden = waits || next === 'offline'
  $('start').textContent = say(next === 'over' ? 'visitAgain' : 'visitStart')
  $('leave').hidden = !waits
  $('privacy').hidden = next !== 'idle' && next !== 'over'
  $('bar').hidden = !live
  $('own').hidden = !(waits && camera.stream)
  fold()
  if (!live) notes.clear()
  if (camera.gone) notes.set('camera', say('disconnected')) // in the line, too
  note()
  document.title = next === 'running' ? `\u25cf ${welcome?.title}` : welcome?.title ?? document.title
  if (next !== before) moveFocus()
  awake.keep(live)
}

function write(id, text) {
  const there = $(id)
  if (there.textContent !== text) there.textContent = text
  there.hidden = !text
}

// where the focus was may be hidden now
function moveFocus() {
  const there = document.activeElement
  const lost = there === document.body || !there?.getClientRects().length
  if (lost && phase === 'over') $('start').focus({ preventScroll: true })
}

/** For those who do not see it. */
function tell(text) {
  if ($('status').textContent !== text) $('status').textContent = text
}

const ORDER = ['moving', 'camera', 'house', 'silent']

function note(kind, text) {
  if (kind && text) notes.set(kind, text)
  else if (kind) notes.delete(kind)
  const first = ORDER.find((one) => notes.has(one))
  const shown = first ? notes.get(first) : ''
  if (shown && $('note').firstChild?.textContent !== shown) tell(shown)
  if ($('note').dataset.kind === first && $('note').dataset.text === shown) return
  Object.assign($('note').dataset, { kind: first ?? '', text: shown })
  const parts = [element('span', { textContent: shown })]
  if (first === 'camera')
    parts.push(
      element('button', { type: 'button', textContent: say('visitCameraAgain'), onclick: reopen })
    )
  $('note').replaceChildren(...parts)
  $('note').hidden = !shown
}

/** The controls: always there on a large window, below the picture on a small one, or put away. */
function fold() {
  const live = phase === 'running' || phase === 'moving'
  const open = !kept.get('folded')
  $('controls').hidden = !(live && open && controls.any)
  $('settings').hidden = !controls.any
  $('settings').setAttribute('aria-expanded', String(open))
}

// -- the first words of the house ---------------------------------------------------------------

house.addEventListener('welcome', ({ detail }) => {
  // a house that has just come back knows no workflow yet: what it said of it before holds
  const { title, inputs, views, camera } = pictures.length && !detail.views.length ? welcome : detail
  welcome = { ...detail, title, inputs, views, camera }
  controls.show(inputs, camera)
  // none are known before the first machine of a house is up
  if (inputs.length) values.only(inputs.map(({ name }) => name))
  makePictures()
  note('house', '')
  if (phase !== 'loading' && phase !== 'offline') return
  if (house.wanting) return begin()
  front()
})

function front() {
  show('idle', { lead: lead() })
  $('privacy').textContent = say(welcome.camera ? 'visitPrivacy' : 'visitNoCamera')
}

const lead = () =>
  welcome.limit_s ? say('visitLimit', { time: about(welcome.limit_s, language) }) : ''

function makePictures() {
  const told = JSON.stringify(welcome.views)
  if (told === $('pictures').dataset.views) return
  $('pictures').dataset.views = told
  for (const { picture } of pictures) picture.remove()
  // all compare alike
  const owner = { properties: kept.get('compare') ?? {} }
  const tools = { say, element, Compare, Screen }
  pictures = welcome.views.map(({ node, title }) => {
    const changed = () => compared(owner, picture)
    const picture = new Picture(owner, tools, { changed })
    picture.canvas.setAttribute('role', 'img')
    picture.canvas.setAttribute('aria-label', title ?? say('output'))
    return { node: String(node), picture }
  })
  $('pictures').dataset.count = pictures.length
  $('pictures').replaceChildren(...pictures.map(({ picture }) => picture.screen.root))
  $('tools').replaceChildren(...pictures.slice(0, 1).map(({ picture }) => picture.compare.switch))
  if (stream.session) attach(stream.session)
}

/** Each picture is of its view in the session, if it has that one. */
function attach(session) {
  const places = new Map(session.views.map(({ node, index }) => [String(node), index]))
  for (const { node, picture } of pictures)
    if (places.has(node)) picture.attach(session, places.get(node))
    else picture.detach()
}

function compared(owner, picture) {
  const text = JSON.stringify(owner.properties)
  if (text === JSON.stringify(kept.get('compare') ?? {})) return
  kept.set('compare', { ...owner.properties })
  for (const { picture: other } of pictures) if (other !== picture) other.compare.read()
}

// -- start, wait, stop --------------------------------------------------------------------------

async function begin() {
  const mine = (begun += 1)
  if (welcome.camera) {
    show('asking', { lead: camera.stream ? '' : say('visitAsking') })
    try {
      await camera.use(self, [{}])
    } catch (error) {
      if (mine !== begun || phase === 'over') return
      house.leave() // who has come back by a reload has a place
      show('idle', { lead: lead(), problem: error.message })
      return
    }
    // whoever has changed their mind meanwhile, and maybe once more
    if (mine !== begun) return
    if (phase !== 'asking') return camera.leave(self)
    preview()
  }
  show('waiting', { lead: say('visitLooking') })
  tell(say('visitLooking'))
  house.want()
}

/** What the camera sees, for its owner only. */
function preview() {
  const own = $('own')
  own.srcObject = camera.stream
  own.play().catch(() => {}) // where it may not play by itself, a picture less
}

function over(sentence) {
  if (!welcome) return show('offline', { lead: sentence }) // nothing to start yet; it is tried again
  clearTimeout(deciding)
  failure = queued = ''
  reason = null
  house.over()
  finish()
  show('over', { lead: sentence })
  tell(sentence)
  $('privacy').textContent = say(welcome.camera ? 'visitPrivacy' : 'visitNoCamera')
}

function finish() {
  stream.stop()
  for (const { picture } of pictures) picture.detach()
  camera.leave(self)
  $('own').srcObject = null
  until = null
}

$('start').onclick = () => {
  if (phase === 'idle' || phase === 'over') begin()
}
$('stop').onclick = $('leave').onclick = () => {
  over(say('visitOverLeft'))
  house.leave()
}

// -- where in the house -------------------------------------------------------------------------

house.addEventListener('place', ({ detail }) => {
  const { place, of, wait_s: wait, warming } = detail
  if (phase === 'idle' || phase === 'over' || phase === 'loading') return
  clearTimeout(deciding)
  const line = say('visitPlace', { place, of })
  const told = warming
    ? say('visitWarming')
    : wait === null
      ? say('visitUnknown')
      : say('visitWait', { time: about(wait, language) })
  const alone = place === 1 && of === 1
  if (phase === 'moving' || phase === 'running') {
    queued = alone ? told : `${line}. ${told}`
    moving(reason ?? 'draining')
    return
  }
  show('waiting', { lead: told, line: alone ? '' : line })
  tell([alone ? '' : line, told].filter(Boolean).join('. '))
})

house.addEventListener('go', ({ detail }) => {
  if (phase === 'idle' || phase === 'over' || phase === 'loading') return house.leave()
  clearTimeout(deciding)
  until = detail.left_s === null ? null : performance.now() + SECOND * detail.left_s
  if (phase === 'waiting' || phase === 'starting') {
    show('starting', { lead: say('firstPicture') })
    tell(say('visitTurn'))
    if (document.hidden) document.title = say('visitTurn')
  } else if (reason === 'draining' && stream.stays(detail.replica)) settled() // it may stay after all
  stream.go(detail)
})

house.addEventListener('ticket', ({ detail }) => detail.stream && stream.renew(detail.stream))
house.addEventListener('moving', ({ detail }) => moving(detail.reason))
house.addEventListener('over', ({ detail }) => {
  if (phase === 'idle' || phase === 'over') return
  // what the gate has said of a run that failed says more
  if (detail.reason === 'gone' && failure) return over(say('visitFailed', { reason: failure }))
  if (detail.reason === 'elsewhere') house.rest()
  over(say(REASONS[detail.reason] ?? 'visitOverGone'))
})
house.addEventListener('refused', ({ detail }) => over(detail.reason))
house.addEventListener('elsewhere', () => {
  if (phase === 'idle') return
  over(say('visitElsewhere'))
})
house.addEventListener('down', ({ detail }) => {
  const away = detail.full ? 'visitHouseMany' : 'visitHouseAway'
  const text = say(navigator.onLine === false ? 'visitOffline' : away)
  if (phase === 'loading' || phase === 'offline') return show('offline', { lead: text })
  if (phase === 'running' || phase === 'moving') return note('house', text)
  if (phase === 'waiting') show('waiting', { lead: text })
})

const REASONS = {
  time: 'visitOverTime', operator: 'visitOverOperator', full: 'visitOverFull', left: 'visitOverLeft',
  gone: 'visitOverGone', nowhere: 'visitOverNowhere', elsewhere: 'visitElsewhere',
  closed: 'visitOverClosed'
}
const MOVES = { draining: 'visitMoving', restart: 'visitRestart', lost: 'visitLost' }

/** It is not where it was, and not yet where it will be. */
function moving(why) {
  if (phase !== 'running' && phase !== 'moving') return
  reason = why
  show('moving')
  note('moving', [say(MOVES[why] ?? 'visitMoving'), queued].filter(Boolean).join(' '))
}

function settled() {
  reason = null
  queued = ''
  notes.delete('moving')
  show('running')
}

// -- the stream ---------------------------------------------------------------------------------

stream.addEventListener('took', ({ detail: session }) => {
  reason = null
  attach(session)
  // the session asks for what it needs; this page only keeps the light on
  if (welcome.camera) camera.use(self, []).catch(() => {})
})

stream.addEventListener('view', ({ detail }) => {
  const there = pictures.find(({ picture }) => picture.index === detail.view)
  if (there) there.picture.take(detail)
  else {
    // nobody sees it, but the server waits for an answer, or it would send no more
    stream.session?.shown(detail, true)
    close(detail)
  }
  // who is to leave sees the old place until the new one has taken over
  if (phase === 'running' || reason === 'draining') return
  if (phase !== 'moving') tell(say('visitRunning'))
  settled()
})

stream.addEventListener('stats', ({ detail }) => {
  const { fps, latency_ms: latency } = detail
  const figures = { fps: fps.toFixed(1), latency: latency?.p50?.toFixed(0) ?? '-' }
  $('figures').textContent = say('visitFigures', figures)
  // as when a lid is closed, or a phone's call takes the camera
  note('silent', camera.track?.muted ? say('visitSilent') : '')
})

stream.addEventListener('moving', ({ detail }) => moving(detail.reason))
stream.addEventListener('problem', ({ detail }) => {
  if (detail.kind === 'edit') values.takeBack(say('visitNotTaken'))
})
stream.addEventListener('lost', ({ detail }) => {
  if (phase === 'running' || phase === 'moving') moving('lost')
  house.lost(detail.replica)
})
stream.addEventListener('refused', ({ detail }) => {
  house.leave()
  over(say('visitFailed', { reason: detail.reason }))
})
stream.addEventListener('ended', ({ detail }) => {
  if (detail.code === 4409) {
    house.rest()
    return over(say('visitElsewhere'))
  }
  if (detail.why === 'time' || detail.why === 'operator') {
    // said to the house, too: who starts again before it has heard of it means another turn
    house.leave()
    return over(say(REASONS[detail.why]))
  }
  // whoever ended it tells the house, too, and the house says why, or where it goes on
  clearTimeout(deciding)
  failure = detail.reason ?? ''
  const wait = phase === 'moving' ? 10 * DECIDES : DECIDES
  deciding = setTimeout(() => {
    house.leave()
    over(failure ? say('visitFailed', { reason: failure }) : say('visitOverGone'))
  }, wait)
})

// -- the camera ---------------------------------------------------------------------------------

camera.addEventListener('opened', () => {
  note('camera', '')
  if ($('own').srcObject) preview()
})
camera.addEventListener('lost', () => note('camera', say('disconnected')))

async function reopen() {
  try {
    // as if it were chosen again: the stream goes on with it
    await camera.choose(camera.choice)
  } catch (error) {
    note('camera', error.message)
  }
}

navigator.mediaDevices?.addEventListener?.('devicechange', () => camera.gone && reopen())

// -- the bar ------------------------------------------------------------------------------------

let said = null

setInterval(() => {
  const left = until === null ? null : Math.max(0, (until - performance.now()) / SECOND)
  const text = left === null ? '' : clock(left)
  if ($('left').textContent === text) return
  $('left').textContent = text
  $('left').title = left === null ? '' : say('visitLeft', { time: text })
  $('left').classList.toggle('soon', left !== null && left <= LAST.at(-1))
  const mark = LAST.find((one) => left !== null && Math.ceil(left) === one)
  if (mark && mark !== said) tell(say('visitLeft', { time: about(mark, language) }))
  said = mark ?? null
}, 200)

$('stop').textContent = say('stop')
$('leave').textContent = say('visitLeave')
$('settings').append(element('span', { textContent: say('visitSettings') }))
$('controls').setAttribute('aria-label', say('visitSettings'))
$('settings').onclick = () => {
  kept.set('folded', !kept.get('folded'))
  fold()
}

const screen = $('stage')
$('full').hidden = !document.fullscreenEnabled
$('full').append(element('span', { textContent: say('visitFull') }))
$('full').onclick = toggleFull
screen.ondblclick = toggleFull

function toggleFull() {
  if (!document.fullscreenEnabled) return
  if (document.fullscreenElement) document.exitFullscreen()
  else screen.requestFullscreen().catch(() => {})
}

document.addEventListener('visibilitychange', () => {
  if (!document.hidden && phase === 'running') show('running')
})

house.open()
