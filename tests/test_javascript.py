"""Modules of the pages in Node.js: where a browser gives less, and how they fare in time."""

from javascript import told
from livediffusion.trust import boundary

CAMERA = """
  const { Camera } = await load('web/live/camera.mjs')
  browser.page()
  browser.put('isSecureContext', true)
  const devices = (navigator.mediaDevices = new browser.Devices())
  const camera = new Camera((key) => key)
"""


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
