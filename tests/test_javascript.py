"""Modules of the pages in Node.js: where a browser gives less, and how they fare in time."""

import json

import pytest
from javascript import CAMERA, told
from livediffusion.trust import boundary


def test_the_phones_page_by_http_says_what_it_needs():
    assert told("""
      const document = browser.page('http://10.0.0.7/livediffusion/phone/KEY/')
      browser.insecure()
      browser.blockStorage()
      await load('web/phone/phone.mjs')
      const text = (id) => document.getElementById(id).textContent
      tell([document.title, text('what').includes('10.0.0.7'), text('problem').includes('https'),
            text('go')])
    """) == ["This phone, live", True, True, "Start"]


def test_a_phone_that_keeps_nothing_has_one_name_that_the_server_takes():
    first, again = told("""
      const document = browser.page('https://10.0.0.7/livediffusion/phone/KEY/')
      browser.blockStorage()
      browser.put('isSecureContext', true)
      navigator.mediaDevices = new browser.Devices()
      const names = []
      globalThis.Worker = class {
        postMessage({ url }) { if (url) names.push(new URL(url).searchParams.get('phone')) }
        terminate() {}
      }
      new browser.Clock()
      await load('web/phone/phone.mjs')
      for (let i = 0; i < 3; i += 1) { // start, stop, start
        document.getElementById('go').onclick()
        await browser.settled()
      }
      tell(names)
    """)
    assert first == again and boundary.is_key(first) and len(first) == 32


def test_a_camera_is_chosen_where_nothing_can_be_kept():
    """Storage that is blocked, full, or works; after a choice that does not open the one before."""
    seen, none, opened = told(CAMERA, """
      const room = {}
      const store = (setItem) => ({ setItem, getItem: (name) => room[name] ?? null,
                                    removeItem: (name) => delete room[name] })
      const full = () => { throw new DOMException('', 'QuotaExceededError') }
      const seen = []
      for (const kind of ['blocked', 'full', 'works']) {
        if (kind === 'blocked') browser.blockStorage()
        else browser.put('localStorage', store(kind === 'full' ? full : (n, v) => (room[n] = v)))
        const one = new Camera((key) => key)
        await one.use(seen, [{}])
        const before = one.choice
        await one.choose('a')
        seen.push([before, one.choice, (await one.devices()).length])
        devices.there = false
        await one.choose('b').catch((error) => seen.push(error.message))
        devices.there = true
        seen.push(one.choice)
      }
      devices.enumerateDevices = async () => { throw new Error('not here') }
      tell([seen, await camera.devices(), devices.opened.length])
    """)
    assert seen == [["", "a", 1], "NotFoundError", "a"] * 3
    assert none == [] and opened == 6


def test_a_camera_that_was_unplugged_is_opened_again_by_whoever_uses_it():
    """Each way to use it; and while it is not back, in words, with the light off."""
    found = told(CAMERA, """
      const [one, other] = [{}, {}]
      const ways = {
        'used by another': () => camera.use(other, [{}]),
        'used again': () => camera.use(one, [{ width: 64, height: 64, fps: 5 }]),
        'chosen': () => camera.choose('a'),
        'opened': () => camera.reopen()
      }
      const found = []
      for (const [name, way] of Object.entries(ways)) {
        await camera.use(one, [{}])
        const before = [camera.track, camera.takes]
        camera.track.unplug()
        devices.there = false
        const said = await way().catch((error) => error.message)
        devices.there = true
        if (!camera.users.has(one)) await camera.use(one, [{}])
        else await way()
        const now = camera.track
        found.push([name, said, camera.gone, now.readyState, now !== before[0],
                    camera.takes > before[1]])
        for (const user of [one, other]) camera.leave(user)
        found.at(-1).push(devices.opened.every(({ readyState }) => readyState === 'ended'))
      }
      tell(found)
    """)
    for name, *rest in found:
        assert rest == ["NotFoundError", False, "live", True, True, True], name


STREAM = """
  let away = 0, crossed = 0 // requests on their way, and how many at a time at most
  const request = async (ms) => {
    crossed = Math.max(crossed, ++away)
    await new Promise((done) => setTimeout(done, ms))
    away -= 1
  }
  // a hand that moves for three seconds, 60 times in each, and what has been sent of it
  const streamed = async (clock, sent, hand) => {
    for (let value = 1; value <= 180; value += 1) {
      hand(value)
      await clock.advance(1000 / 60)
    }
    const rests = clock.now
    await clock.advance(1500)
    const times = sent.map(({ at }) => at)
    const gaps = times.filter((at) => at <= rests).map((at, i) => at - (times[i - 1] ?? 0))
    return { most: Math.max(...gaps), count: gaps.length, last: sent.at(-1).value,
             rested: times.at(-1) - rests, crossed }
  }
"""


@pytest.mark.parametrize("sign", ["input", "wheel", "pointermove"])
def test_a_stream_of_signs_is_followed_while_it_goes_on(sign):
    """Though a value is in the graph some time after its sign, and a request takes its time."""
    combinations = [(late, trip) for late in (0, 40) for trip in (0, 30, 400)]
    found = told(STREAM, f"const [sign, all] = {json.dumps([sign, combinations])}", """
      const { Edits } = await load('web/live/edits.mjs')
      const found = []
      for (const [late, trip] of all) {
        const clock = new browser.Clock()
        const document = browser.page()
        const move = (type, buttons) =>
          document.dispatchEvent(Object.assign(new Event(type), { buttons }))
        let value = 0, reads = 0
        const read = async () => (reads += 1, { output: value })
        const reader = { saved: () => String(value), read }
        const sent = []
        const changed = async ({ output }) => {
          sent.push({ at: clock.now, value: output })
          await request(trip)
        }
        const edits = new Edits(new EventTarget(), reader, changed, () => true)
        edits.begin(0)
        const followed = await streamed(clock, sent, (next) => {
          move(sign, 1)
          setTimeout(() => (value = next), late)
        })
        // a hand that only passes over the page is none
        reads = 0
        for (let i = 0; i < 20; i += 1) {
          move('pointermove', 0)
          await clock.advance(16)
        }
        edits.end()
        found.push({ ...followed, trip, reads })
      }
      tell(found)
    """)
    for one in found:
        assert one["most"] <= max(160, one["trip"] + 40), one
        assert one["last"] == 180 and one["rested"] <= 160 + one["trip"], one
        assert one["crossed"] == 1 and one["reads"] == 0, one


def test_a_visitors_slider_is_followed_no_faster_than_a_gate_takes_it():
    found, typed = told(STREAM, """
      const { Values } = await load('serve/page/values.mjs')
      const found = []
      let clock, values, sent
      for (const trip of [0, 30, 400]) {
        clock = new browser.Clock()
        sent = []
        values = new Values({ get: () => ({}), set() {} }, () => false)
        const update = async ({ values: all }) => {
          sent.push({ at: clock.now, value: all.a, typed: all.b })
          await request(trip)
        }
        await values.begin({ start: async () => {}, update })
        const followed = await streamed(clock, sent, (value) => {
          values.set('a', value, 60)
          values.set('b', String(value), 300, true)
        })
        found.push({ ...followed, trip, typed: sent.at(-1).typed })
      }
      sent.length = 0
      for (const text of ['n', 'ne', 'neo', 'neon']) {
        values.set('b', text, 300, true)
        await clock.advance(100)
      }
      await clock.advance(1000)
      tell([found, sent.map((one) => one.typed)])
    """)
    for one in found:
        assert one["most"] <= max(160, one["trip"] + 40), one
        assert one["count"] <= 3 * 10, one  # see serve/gate/stream.py
        assert one["last"] == 180 and one["typed"] == "180" and one["crossed"] == 1, one
    assert typed == ["neon"]


def test_an_edit_that_does_not_arrive_is_sent_until_it_does_and_one_that_is_refused_is_not():
    """Nobody touches anything meanwhile. What is as it was is sent, too: the other may be there."""
    assert told("""
      const clock = new browser.Clock()
      browser.page()
      const { Edits } = await load('web/live/edits.mjs')
      const seen = []
      let value = 'old', arrives = false
      const reader = { saved: () => value, read: async () => ({ output: value }) }
      const changed = async ({ output }) => {
        seen.push(output)
        return arrives
      }
      const edits = new Edits(new EventTarget(), reader, changed, () => true)
      const sent = async (ms) => {
        await clock.advance(ms)
        return seen.splice(0)
      }
      edits.begin('old')
      const found = []
      value = 'new'
      found.push(await sent(3000))
      value = 'old'
      found.push(await sent(1000))
      arrives = true
      found.push(await sent(3000))
      value = 'refused'
      found.push(await sent(3000))
      // over while it is on its way: then nothing is sent any more
      arrives = false
      value = 'last'
      found.push(await sent(1000))
      edits.end()
      found.push(await sent(3000))
      tell(found)
    """) == [["new"] * 3, ["old"], ["old"], ["refused"], ["last"], []]


def test_the_display_stays_on_while_a_window_can_be_seen():
    """Windows are hidden, shown and closed, locks taken away: never two are held, none if off."""
    told("""
      const clock = new browser.Clock()
      const document = browser.page()
      const { Awake } = await load('web/live/awake.mjs')
      let seed = 1
      const random = (below) => {
        seed = (seed * 48271) % 2147483647
        return seed % below
      }
      const locks = new Set() // that are held
      class Lock extends EventTarget {
        released = false
        async release(quiet = false) {
          if (this.released) return
          this.released = !quiet
          locks.delete(this)
          if (!quiet) this.dispatchEvent(new Event('release'))
        }
      }
      const window = (document) => {
        const one = { document, closed: false, navigator: {} }
        one.navigator.wakeLock = { request: async () => {
          await new Promise((done) => setTimeout(done, random(50)))
          if (one.closed || document.hidden) throw new DOMException('', 'NotAllowedError')
          one.lock = new Lock()
          locks.add(one.lock)
          return one.lock
        } }
        one.hide = (hidden) => {
          document.hidden = hidden
          if (hidden) one.lock?.release()
          document.dispatchEvent(new Event('visibilitychange'))
        }
        return one
      }
      const windows = [window(document)]
      const awake = new Awake(() => windows)
      const found = { held: 0, dark: 0, off: 0 }
      for (let step = 0, on = false; step < 3000; step += 1) {
        const one = windows[random(windows.length)]
        const what = random(6)
        if (what === 0) awake.keep((on = random(3) > 0))
        else if (what === 1 && windows.length < 3) windows.push(window(new browser.Element()))
        else if (what === 2 && one !== windows[0]) {
          one.closed = true // and tells nobody
          one.lock?.release(true)
          windows.splice(windows.indexOf(one), 1)
        } else if (what === 3) [...locks].at(-1)?.release()
        else one.hide(random(2) > 0)
        await clock.advance(random(200))
        if (locks.size > 1) throw new Error(`two locks after ${step}`)
        if (step % 10) continue
        await clock.advance(1100)
        if (on) awake.keep(true) // as the figures of each second have it
        await clock.advance(100)
        const seen = windows.some(({ document }) => !document.hidden)
        if ((locks.size === 1) !== (on && seen))
          throw new Error(`${locks.size} locks after ${step}: ${on}, ${seen}`)
        found[!on ? 'off' : seen ? 'held' : 'dark'] += 1
      }
      if (Object.values(found).some((count) => count < 10)) throw new Error(JSON.stringify(found))
      // by plain http there is none
      browser.put('window', { document, navigator: {} })
      await new Awake().keep(true)
      tell(found)
    """)
