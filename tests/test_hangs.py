"""What the pages' modules wait for, and does not come: they go on, or say so. In Node.js."""

import json

import pytest
from javascript import CAMERA, told


def test_what_is_opened_and_gives_no_picture_is_closed_and_said():
    """A lid that is closed, a virtual camera that nobody feeds: the browser waits without end."""
    found = told(CAMERA, """
      const clock = new browser.Clock()
      const { Desktop } = await load('web/live/camera.mjs')
      devices.getDisplayMedia = () => devices.getUserMedia()
      browser.Element.prototype.play = () => new Promise(() => {})
      const found = []
      for (const capture of [camera, new Desktop((key) => key)]) {
        let said = null
        capture.use({}, [{}]).catch((error) => (said = error.message))
        await clock.advance(3000)
        const before = said
        await clock.advance(7000)
        found.push([before, said, capture.stream, capture.users.size])
      }
      tell([found, devices.opened.map(({ readyState }) => readyState)])
    """)
    silent = [[None, "AbortError", None, 0], [None, "screenSilent", None, 0]]
    assert found == [silent, ["ended", "ended"]]


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [1]])
@pytest.mark.parametrize("refused", [False, True])
def test_a_question_that_nobody_answers_is_asked_again_and_answered_late_lights_nothing(
    order, refused
):
    """Its user leaves and comes back, as by Stop and Live; a phone's is the same one both times."""
    for same in (True, False):
        how = json.dumps([order, refused, same])
        found = told(f"const [order, refused, same] = {how}", CAMERA, """
          const asked = []
          const ask = devices.getUserMedia.bind(devices)
          devices.getUserMedia = () => new Promise((give, fail) => asked.push(async (refuse) =>
            refuse ? fail(new DOMException('', 'NotAllowedError')) : give(await ask())))
          const one = {}, other = same ? one : {}
          camera.use(one, [{}]).catch(() => {})
          await browser.settled()
          camera.leave(one)
          const said = []
          camera.use(other, [{}]).then(() => said.push('open'), (error) => said.push(error.message))
          await browser.settled()
          for (const i of order) {
            await asked[i]?.(refused && i === 0)
            await browser.settled()
          }
          const lit = () => devices.opened.filter(({ readyState }) => readyState === 'live').length
          const found = [asked.length, said, lit(), camera.track?.readyState]
          camera.leave(other)
          tell([...found, lit()])
        """)  # fmt: skip
        assert found == [2, ["open"], 1, "live", 0]


def test_a_phone_that_waits_for_its_camera_is_stopped_and_comes_back_stopped():
    """By its button; or by the browser, which shows the page again as it was left."""
    found = told("""
      const document = browser.page('https://10.0.0.7/livediffusion/phone/KEY/')
      browser.blockStorage()
      browser.put('isSecureContext', true)
      const devices = (navigator.mediaDevices = new browser.Devices())
      const lines = []
      globalThis.Worker = class {
        constructor() { lines.push(this) }
        postMessage({ type }) { this.closed = type === 'close' }
        terminate() {}
      }
      const clock = new browser.Clock()
      await load('web/phone/phone.mjs')
      const found = [], go = document.getElementById('go')
      const told = () => found.push([
        document.body.dataset.phase, go.textContent, Boolean(go.disabled),
        devices.opened.filter(({ readyState }) => readyState === 'live').length,
        lines.filter(({ closed }) => !closed).length])
      const step = async (work) => { work(); await browser.settled(); told() }
      const { play } = browser.Element.prototype
      browser.Element.prototype.play = () => new Promise(() => {})
      await step(() => go.onclick())
      await step(() => go.onclick())
      await step(() => go.onclick())
      await step(() => dispatchEvent(new Event('pagehide')))
      browser.Element.prototype.play = play
      await step(() => go.onclick())
      await step(() => dispatchEvent(new Event('pagehide')))
      await step(() => go.onclick())
      await clock.advance(20000) // what was waited for at first is over
      await step(() => {})
      tell(found)
    """)
    waits, sends = ["opening", "Stop", False, 1, 0], ["sending", "Stop", False, 1, 1]
    rests = ["welcome", "Start", False, 0, 0]
    assert found == [waits, rests, waits, rests, sends, rests, sends, sends]


def test_a_still_screen_of_a_hidden_page_is_not_sent_as_fast_as_it_could_move():
    """Nothing tells such a page of new pictures; the worker asks, as it gets none itself."""
    assert told(CAMERA, """
      const clock = new browser.Clock()
      const { Desktop } = await load('web/live/camera.mjs')
      devices.getDisplayMedia = () => devices.getUserMedia()
      document.hidden = true
      const found = []
      for (const capture of [camera, new Desktop((key) => key)]) {
        await capture.use({}, [{}])
        let count = 0
        for (let i = 0; i < 200; i += 1) {
          await clock.advance(25)
          count += (await capture.next(true)) !== null
        }
        found.push(count)
      }
      tell(found)
    """) == [100, 5]


def test_a_camera_that_is_silent_in_a_run_is_said_on_its_node():
    assert told("""
      browser.page()
      new browser.Clock()
      const { Picker } = await load('web/live/picker.mjs')
      const element = (tag, fields) => Object.assign(new browser.Element(fields), {
        getContext: () => ({ clearRect() {} }), removeAttribute() {} })
      const capture = Object.assign(new EventTarget(), { stream: {}, rate: 30, users: new Map() })
      const tools = { say: (key) => key, element, Allow: class { set() {} },
                      panels: () => ({ browser: { parts: [], capture, hint: 'cameraOff' } }) }
      const node = { addDOMWidget: () => ({}),
                     widgets: [{ name: 'source', value: 'browser' }, { name: 'fps', value: 30 }] }
      const picker = new Picker(node, { browser: capture }, tools)
      const found = []
      const told = (work) => { work(); found.push(picker.note.textContent) }
      told(() => picker.begin())
      told(() => picker.attach({}, { node: '1', source: 'browser' }))
      told(() => picker.stats({ silent: ['1'], sources: {} }))
      told(() => picker.stats({ silent: ['2'], sources: {} }))
      told(() => picker.stats({ silent: ['1'] }))
      told(() => picker.detach())
      tell(found)
    """) == ["", "", "visitSilent", "", "visitSilent", ""]


WORKER = """
  const clock = new browser.Clock()
  const told = [], sockets = []
  browser.put('self', { close() {} })
  browser.put('onmessage', null)
  browser.put('postMessage', (message) => told.push(message))
  browser.put('WebSocket', class {
    static OPEN = 1
    readyState = 0
    bufferedAmount = 0
    sent = []
    constructor() { sockets.push(this) }
    open() { this.readyState = 1; this.onopen() }
    send(data) { this.sent.push(data) }
    say(message) { this.onmessage?.({ data: JSON.stringify(message) }) }
    close() { this.readyState = 2 }
  })
  await load('web/live/worker.mjs')
  const order = (data) => onmessage({ data })
  order({ type: 'open', url: 'ws://there' })
"""


def test_a_connection_that_says_nothing_is_dead_and_made_anew():
    """The cable was pulled: no close comes, not even of the one that is let go."""
    found = told(WORKER, """
      const found = []
      sockets[0].open()
      for (let i = 0; i < 20; i += 1) { // 14 s are not long
        await clock.advance(i % 2 ? 14000 : 3000)
        sockets[0].say({ type: 'alive' })
      }
      found.push([sockets.length, told.length])
      await clock.advance(14000)
      found.push(sockets.length)
      await clock.advance(5000)
      found.push([sockets.length, sockets[0].readyState, told.length])
      sockets[0].say({ type: 'state', state: 'late' })
      sockets[1].open()
      await clock.advance(14000)
      found.push([sockets.length, told.length])
      // the network is gone: nor does the next one come to be
      await clock.advance(24000)
      found.push([sockets.length, told])
      tell(found)
    """)
    broke = [{"type": "closed", "code": 1006}]
    assert found == [[1, 0], 1, [2, 2, 0], [2, 0], [3, broke]]


@pytest.mark.parametrize("repeats", [False, True])
def test_a_picture_that_breaks_is_not_the_last_and_a_quiet_screen_is_asked_of_the_page(repeats):
    found = told(f"const repeats = {json.dumps(repeats)}", WORKER, """
      let broken = true, closed = 0, give
      browser.put('OffscreenCanvas', class {
        constructor(width, height) { Object.assign(this, { width, height }) }
        getContext() { return { drawImage() {} } }
        async convertToBlob() {
          if (broken) throw new DOMException('', 'EncodingError')
          return new Blob(['picture'])
        }
      })
      const frame = { displayWidth: 8, displayHeight: 8, close: () => (closed += 1) }
      const readable = { getReader: () => ({ read: () => new Promise((done) => (give = done)) }) }
      const [socket] = sockets
      socket.open()
      order({ type: 'camera', place: 1, readable, repeats })
      const picture = async () => {
        give({ done: false, value: frame })
        await clock.advance(100)
      }
      const found = [], sent = () => socket.sent.length
      await picture()
      found.push(sent(), closed)
      broken = false
      await picture()
      found.push(sent(), closed)
      // the page is asked once, until it answers
      await clock.advance(2000)
      found.push(told.filter(({ type, fresh }) => type === 'want' && fresh).length, sent())
      for (let i = 0; i < 2; i += 1) socket.say({ type: 'received', camera: 1 })
      order({ type: 'bitmap', place: 1, bitmap: null })
      await clock.advance(400)
      found.push(told.filter(({ type }) => type === 'want').length)
      tell(found)
    """)
    # a screen that stands still is sent again, while no more than two are unanswered
    assert found == ([0, 1, 1, 2, 0, 2, 1] if repeats else [0, 1, 1, 2, 1, 1, 2])


def test_edits_of_a_run_do_not_wait_for_what_hangs_of_the_run_before():
    assert told("""
      const clock = new browser.Clock()
      browser.page()
      const { Edits } = await load('web/live/edits.mjs')
      const seen = [], hung = []
      let value = 'old'
      const reader = { saved: () => value, read: async () => ({ output: value }) }
      const changed = ({ output }) => {
        seen.push(output)
        return output.startsWith('hangs') ? new Promise((done) => hung.push(done)) : true
      }
      const edits = new Edits(new EventTarget(), reader, changed, () => true)
      const found = []
      const set = async (next) => {
        value = next
        await clock.advance(2000)
        found.push(seen.splice(0))
      }
      edits.begin(value)
      await set('hangs')
      await set('waits')
      edits.end()
      edits.begin(value)
      await set('new')
      // its late answer changes nothing of the new one, whose own is waited for
      await set('hangs too')
      hung[0](false)
      await set('newer')
      hung[1](true)
      await clock.advance(2000)
      found.push(seen)
      tell(found)
    """) == [["hangs"], [], ["new"], ["hangs too"], [], ["newer"]]
