// LiveDiffusion in ComfyUI's page: the Live button, and the widgets of Live Camera and Live View.

import { app } from '../../scripts/app.js'
import { api } from '../../scripts/api.js'

// Before anything is awaited, so that what other packs put around it lies further out; see reader.mjs
const queuePrompt = app.queuePrompt
let reader = null
app.queuePrompt = function (...of) {
  return reader ? reader.queue(...of) : queuePrompt.apply(app, of)
}

// browsers keep .mjs files by themselves; another version has other addresses
const VERSION = '0.1.0'
const place = (name) => new URL(`./live/${name}.mjs?v=${VERSION}`, import.meta.url).href
const modules = [
  'allow', 'awake', 'camera', 'compare', 'concealed', 'edits', 'kept', 'lines', 'marks', 'nodes',
  'panels', 'picker', 'picture', 'plot', 'reader', 'screen', 'send', 'session', 'stage', 'style',
  'view', 'webrtc', 'words'
]
const [
  { Allow }, { Awake }, { Camera, Desktop }, { Compare }, { conceal }, { Edits }, { Kept }, { Lines },
  { Marks }, { Nodes }, { panels }, { Picker }, { Picture }, { Plot }, { Reader }, { Screen }, { Send },
  { Session, fileName }, { Stage }, { addStyle, element }, { View }, { chosen, transport }, { Words }
] = await Promise.all(modules.map((name) => import(place(name))))

const words = new Words(api, () => app.extensionManager?.setting?.get?.('Comfy.Locale') ?? 'en')
const { say } = words
await words.load()

// what the button says in each state, by its key in words.mjs
const LABELS = {
  idle: 'live',
  starting: 'starting',
  queued: 'waiting',
  live: 'stop',
  again: 'waiting',
  stopping: 'stopping'
}

const SENT = 10000 // ms in which a prompt's picture of the camera arrives, or it goes without
const JUST = 3000 // ms after a graph was loaded in which a change of tab belongs to it

const camera = new Camera(say)
const desktop = new Desktop(say)
let session = null
let opened = null // id and tab of the workflow that is live
let settling = 0
let loaded = 0 // when a graph was loaded last
let said = ''
let lines = null
let state = 'idle'

reader = new Reader(app, queuePrompt, say)
const edits = new Edits(api, reader, edited, ready)
const marks = new Marks(app, node)
const kept = new Kept({ app, api, say, notify, complain, begin, session: () => session })

function notify(severity, summary, detail) {
  const life = severity === 'error' ? 12000 : 5000
  app.extensionManager?.toast?.add?.({ severity, summary, detail, life })
}

const apiURL = (path) => api.apiURL(path)
const url = (path) => new URL(apiURL(path), location.href).href
const tools = {
  say, element, addStyle, notify, upload, apiURL, url, ask, id, panels, Allow, Compare, Picture,
  Screen
}
const parts = { View, Picker, Send, Plot }
const captures = { browser: camera, screen: desktop }
const nodes = new Nodes({ app, words, tools, parts, captures, still, prompted, gone: () => edits.look() })
const { views, pickers, sends } = nodes
// a tab that is behind another has its windows, on the projector
const awake = new Awake(() => [window, ...[...views.values()].flatMap(({ popup }) => popup ?? [])])
const root = () => nodes.root
const title = (id) => node(id)?.title ?? say('node', { id })

function node(id) {
  return nodes.get(id)
}

function id(owner) {
  return nodes.id(owner)
}

/** Put a file into ComfyUI's input folder; gives its name there. */
async function upload(file) {
  const body = new FormData()
  body.append('image', file)
  const reply = await api.fetchApi('/upload/image', { method: 'POST', body })
  if (!reply.ok) throw new Error(say('notTaken', { file: file.name, reason: reply.statusText }))
  const { name, subfolder } = await reply.json()
  return subfolder ? `${subfolder}/${name}` : name
}

/** A question to a route of the pack's; with a body it is posted. Throws Error with the reason. */
async function ask(route, body) {
  const headers = { 'Content-Type': 'application/json' }
  const post = body && { method: 'POST', headers, body: JSON.stringify(body) }
  const reply = await api.fetchApi(`/livediffusion/${route}`, post)
  const answer = await reply.json().catch(() => ({}))
  if (!reply.ok) throw new Error(answer.error?.message ?? reply.statusText)
  return answer
}

// -- the run ------------------------------------------------------------------------------

function show(next, detail = {}) {
  state = next
  awake.keep(state === 'live')
  const { ahead: count } = detail
  const label = state === 'queued' && count ? say('waitingCount', { count }) : say(LABELS[state])
  const plain = state === 'live' && session?.run ? 'keptTip' : `${state}Tip`
  const tip = count ? say(count > 1 ? 'aheadTip' : 'aheadOneTip', { count }) : say(plain)
  for (const button of document.querySelectorAll('.livediffusion-live')) {
    button.dataset.state = state
    const text = button.querySelector('span') ?? button
    if (text.textContent !== label) text.textContent = label
    button.setAttribute('aria-label', tip)
  }
}

async function toggle() {
  if (state !== 'stopping') await (session ? session.stop() : begin())
}

/** @param how see Session.start */
async function begin(how = {}) {
  const mine = (session = new Session(api, camera, place('worker'), say, desktop, chosen(app)))
  listen(mine)
  show('starting')
  try {
    const graph = await reader.read()
    // they come first: without them there is nothing to wait for in the queue. And the screen before
    // the camera: a browser asks for it only just after a click
    for (const [capture, source] of [[desktop, 'screen'], [camera, 'browser']]) {
      const wishes = how.run || how.unattended ? [] : cameras(graph.output, source)
      if (wishes.length) await capture.use(mine, wishes)
      if (session !== mine) return leave(mine)
    }
    opened = here()
    loaded = -JUST
    said = ''
    marks.clear()
    await mine.start(graph.output, graph.workflow, how)
    if (session !== mine) return
    attach()
    conceal(mine.concealed, graph.output, node)
    // ComfyUI names the tab some time after it has loaded the graph
    if (here().id === opened.id) opened = here()
    edits.begin(graph.output)
    // a server without aiortc offers no way
    if (mine.rtc && !mine.views.some(({ whep }) => whep)) notify('info', say('live'), say('noWebRtc'))
    const idle = mine.idle.map(({ node }) => title(node))
    if (idle.length) notify('info', say('live'), say('notRun', { nodes: idle.join(', ') }))
  } catch (error) {
    complain(error)
    mine.close()
  }
}

function leave(mine) {
  desktop.leave(mine)
  camera.leave(mine)
}

/** What the Live Cameras of a source are set to. */
const cameras = (output, source) =>
  Object.values(output)
    .filter(({ class_type, inputs }) => class_type === 'LiveCamera' && inputs.source === source)
    .map(({ inputs }) => inputs)

function listen(mine) {
  mine.addEventListener('state', ({ detail }) => {
    if (session !== mine) return
    if (detail.state === 'queued' && detail.ahead > 0 && state === 'starting')
      notify('info', say('live'), say('aheadNote', { count: detail.ahead }))
    if (mine.run && kept.failed(detail)) marks.add([detail.node])
    else if (detail.state === 'failed' && !detail.node && !mine.run)
      notify('error', say('live'), detail.reason ?? say('failed'))
    else if (detail.state === 'ended' && detail.reason) notify('info', say('live'), detail.reason)
    const busy = detail.state in LABELS ? detail.state : 'stopping'
    show(busy === 'queued' && !detail.ahead ? 'starting' : busy, detail)
  })
  mine.addEventListener('stats', ({ detail }) => {
    for (const view of views.values()) if (view.index !== null) view.stats(detail)
    for (const picker of pickers.values()) picker.stats(detail)
    for (const [id, one] of Object.entries(detail.sends ?? {})) sends.get(node(id))?.stats(one)
    if (session === mine && state === 'live') show('live')
  })
  mine.addEventListener('view', ({ detail }) => {
    const view = [...views.values()].find((one) => one.index === detail.view)
    if (view) return view.take(detail)
    // its node is gone, but the server waits for an answer
    detail.bitmap.close()
    detail.input?.close()
    mine.shown(detail)
  })
  mine.addEventListener('begun', attach)
  mine.addEventListener('problem', ({ detail }) => {
    marks.add([detail.node])
    // an edit that does not run, or a recording that cannot be written
    const of = detail.node === null ? say('live') : title(detail.node)
    const key = { edit: 'notChangedNode', record: 'notRecorded' }[detail.kind]
    notify('error', key ? say(key, { node: of }) : of, detail.reason)
  })
  mine.addEventListener('recorded', ({ detail }) => {
    const { left_out: count } = detail
    const file = fileName(detail.file, detail.subfolder)
    const told = { file, seconds: detail.seconds.toFixed(1), count }
    const said = say(count ? 'recordedGaps' : 'recordedFile', told)
    notify(count ? 'warn' : 'success', say('recorded', { node: title(detail.node) }), said)
  })
  mine.addEventListener('unfed', ({ detail }) => notify('error', say('live'), detail.message))
  mine.addEventListener('over', () => {
    if (session !== mine) return
    session = null
    clearTimeout(settling)
    settling = 0
    edits.end()
    for (const all of [views, pickers, sends]) for (const one of all.values()) one.detach()
    show('idle')
  })
}

/** Give each Live View the pictures of its node, and each Live Camera what is known of it. */
function attach() {
  nodes.sweep()
  for (const [all, told] of [[views, session.views], [pickers, session.cameras]]) {
    const places = new Map(told.map((one) => [node(one.node), one]))
    for (const [owner, one] of all) {
      const there = places.get(owner)
      if (there) one.attach(session, there)
      else one.detach()
    }
  }
}

// -- which workflow is open ---------------------------------------------------------------

const here = () => ({
  id: root()?.id,
  tab: app.extensionManager?.workflow?.activeWorkflow
})

/** Before each look at the graph: is it still the one that is live, shown by the nodes there are? */
function ready() {
  if (!session || settling || session.leaving) return false
  const now = here()
  // saving a copy changes the tab too, but loads nothing
  const other = now.tab !== opened.tab && performance.now() - loaded < JUST
  if (now.id !== opened.id || other) {
    if (!session.run) notify('info', say('live'), say('otherWorkflow'))
    session.leave()
    return false
  }
  opened = now
  attach()
  return true
}

/** A graph is being loaded: another workflow, or by undo the same one with new nodes. */
function settle(ms) {
  if (!session) return
  loaded = performance.now()
  clearTimeout(settling)
  settling = setTimeout(() => {
    settling = 0
    edits.look()
  }, ms)
}

async function edited(graph) {
  const mine = session
  if (!mine) return
  const kinds = new Set(Object.values(graph.output).map(({ class_type }) => class_type))
  const leaves = kinds.has('LiveView') || kinds.has('LiveSend')
  if (!leaves || !kinds.has('LiveCamera')) {
    const gone = say(leaves ? 'LiveCamera' : 'LiveView')
    if (!mine.run) notify('info', say('ended'), say('noneLeft', { node: gone }))
    return mine.leave()
  }
  try {
    await mine.update(graph.output, graph.workflow)
    if (session !== mine) return
    said = ''
    marks.clear()
    attach()
    conceal(mine.concealed, graph.output, node)
  } catch (error) {
    if (session !== mine) return
    const lost = error.status !== 400 // it is not about the edit, which is sent again
    const told = lost ? new Error(say('notArrived', { reason: error.message })) : error
    // while somebody types, or nothing arrives, the same reason comes again and again
    if (told.message !== said) complain(told, say('notChanged'))
    said = told.message
    return !lost
  }
}

// -- errors -------------------------------------------------------------------------------

function complain(error, summary = say('live')) {
  for (const [id, { errors }] of Object.entries(error.nodes ?? {})) {
    marks.add([id])
    for (const all of [pickers, sends]) all.get(node(id))?.refused(errors)
  }
  notify('error', summary, error.message)
}

// -- ordinary prompts ---------------------------------------------------------------------

/** The address of a picture that a node has saved. */
function still(image) {
  return api.apiURL(`/view?${new URLSearchParams(image)}`)
}

/** A prompt takes the picture of this moment. */
async function prompted(owner, picker) {
  if (!reader.busy && !session && picker.capture) await snapshot(owner, picker)
}

async function snapshot(owner, picker) {
  const { capture, wish } = picker
  // a screen is asked for by Live, or on the node: not by each prompt
  if (!capture.stream && (capture.asks || !(await capture.allowed()))) return
  try {
    await capture.use(snapshot, [wish])
    const body = await capture.snapshot(wish)
    const query = new URLSearchParams({ node: id(owner), client_id: api.clientId })
    // the prompt waits for it
    const signal = AbortSignal.timeout(SENT)
    await api.fetchApi(`/livediffusion/snapshot?${query}`, { method: 'POST', body, signal })
  } catch (error) {
    notify('warn', say('LiveCamera'), error.message)
  } finally {
    capture.leave(snapshot)
  }
}

// -- App mode -----------------------------------------------------------------------------

const liveButton = (className) =>
  element('button', { className: `livediffusion-live ${className}`, onclick: toggle })

function mode() {
  const open = app.extensionManager?.workflow?.activeWorkflow
  return open?.activeMode ?? open?.initialMode ?? 'graph'
}

function appButton() {
  if (!views.size) return null
  // it says what the others say as soon as it is in the page
  setTimeout(() => show(state))
  return liveButton('')
}

const outputs = () =>
  (root()?.extra?.linearData?.outputs ?? []).map((id) => views.get(node(id))).filter(Boolean)

// -- ComfyUI ------------------------------------------------------------------------------

camera.addEventListener('lost', () => {
  notify('error', say('camera'), say('disconnected'))
  // what runs on other sources goes on without it
  if (!session?.run && session?.cameras.some(({ source }) => source === 'browser')) session.stop()
})
// the last picture stays, and another screen may be chosen on the node
desktop.addEventListener('lost', () => notify('warn', say('screen'), say('screenEnded')))
window.addEventListener('pagehide', () => {
  session?.close()
  for (const view of views.values()) view.closeWindow()
})

app.registerExtension({
  name: 'livediffusion',
  commands: [
    { id: 'livediffusion.toggle', label: 'Live: start or stop', icon: 'pi pi-video', function: toggle },
    ...kept.commands
  ],
  settings: [kept.setting, transport(say)],
  keybindings: [{ combo: { key: 'l', alt: true }, commandId: 'livediffusion.toggle' }],
  menuCommands: [{ path: ['Live'], commands: ['livediffusion.toggle', ...kept.menu] }],
  actionBarButtons: [
    {
      icon: 'pi pi-video',
      label: say('live'),
      tooltip: say('idleTip'),
      class: 'livediffusion-live',
      onClick: toggle
    }
  ],
  init: () => addStyle(document),
  setup() {
    // frontends without an action bar of their own have the older menu
    setTimeout(() => {
      if (!document.querySelector('.livediffusion-live')) {
        app.menu?.settingsGroup?.element?.before?.(liveButton('comfyui-button'))
      }
      show(state)
    }, 1500)
    api.addEventListener('graphChanged', () => nodes.sweep())
    lines = new Lines(api, node)
    new Stage(tools, mode, outputs, appButton)
  },
  // asked when the language changes, before the nodes are made anew
  refreshComboInNodes: () => words.load().then(() => show(state)),
  nodeCreated(owner) {
    nodes.created(owner)
  },
  beforeConfigureGraph() {
    nodes.loading()
    lines?.clear()
    settle(5000)
  },
  afterConfigureGraph() {
    nodes.loaded()
    settle(300)
    kept.look()
  }
})
