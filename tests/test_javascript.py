"""Modules of the pages in Node.js: where a browser gives less, and how they fare in time."""

from javascript import told
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
