"""MJPEG in a real Chromium, and files that bring their workflow back to the canvas."""

import contextlib
import http.server
import importlib.util
import io
import pathlib
import threading
import urllib.parse

import numpy as np
import pytest
from livediffusion.live.sinks.mjpeg import CONTENT_TYPE, Parts
from PIL import Image

pytestmark = [pytest.mark.comfy, pytest.mark.server]

HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("browser_tools", HERE / "conftest.py")
tools = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)

TOAST = "[...document.querySelectorAll('.p-toast-message')].map((e) => e.innerText).join('|')"
GREY = """(() => { const image = document.querySelector('img');
  if (!image?.naturalWidth) return null;
  const c = new OffscreenCanvas(1, 1).getContext('2d');
  c.drawImage(image, 0, 0, 1, 1);
  return c.getImageData(0, 0, 1, 1).data[1] })()"""


@contextlib.contextmanager
def streaming(greys):
    """An address that gives grey pictures, and then none any more."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            if self.path == "/":
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(b"<img src='/stream'>")
                return
            self.send_header("Content-Type", CONTENT_TYPE)
            self.end_headers()
            parts = Parts(self.headers.get("User-Agent", ""))
            for grey in greys:
                out = io.BytesIO()
                Image.fromarray(np.full((64, 64, 3), grey, np.uint8)).save(out, "JPEG")
                self.wfile.write(parts.part(out.getvalue()))
                self.wfile.flush()
            over.wait(60)

        def log_message(self, *args):
            pass

    over = threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        over.set()
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("greys", [[90], [30, 200, 120]], ids=["one picture", "several"])
def test_the_last_picture_of_a_still_scene_is_shown(browser, greys):
    with streaming(greys) as address:
        page = browser.new_page()
        try:
            page.goto(address, wait_until="commit")
            page.wait_for_function(f"(g) => Math.abs(({GREY}) - g) <= 1", arg=greys[-1],
                                   timeout=10_000)  # fmt: skip
        finally:
            page.close()


def address_of(page):
    return page.get("""new Promise((done) => {
        navigator.clipboard.writeText = async (text) => done(text);
        [...document.querySelectorAll('.livediffusion-box button')]
          .find((b) => b.textContent === 'Copy URL').click() })""")


def drop(page, name):
    """A file of the output folder onto the canvas."""
    folder, _, name = name.rpartition("/")
    query = urllib.parse.urlencode({"filename": name, "subfolder": folder, "type": "output"})
    page.get(
        """(async ([url, name]) => {
          const blob = await (await fetch(url)).blob()
          const dataTransfer = new DataTransfer()
          dataTransfer.items.add(new File([blob], name, { type: blob.type }))
          const at = { dataTransfer, bubbles: true, cancelable: true, clientX: 900, clientY: 700 }
          document.querySelector('#graph-canvas').dispatchEvent(new DragEvent('drop', at))
        })(a)""",
        [f"/view?{query}", name],
    )


def test_what_a_view_gives_away_is_kept_and_brings_its_workflow_back(page, browser):
    """Recorded, taken as a picture, watched in OBS's browser; dropped onto the canvas."""
    made = tools.through()
    made["nodes"][1]["title"] = "as it was"
    made["nodes"][1]["widgets_values"] = [90, True, "kept/film"]
    made["id"] = "2b7f0c5e-0d5d-4f33-9d1c-5b8fe1a2a001"
    page.load(made)
    button = page.page.get_by_role("button", name="Snapshot")
    assert button.is_disabled() and "While live" in button.get_attribute("title")
    page.live()
    address = address_of(page)
    watching = browser.new_page()
    watching.goto(page.site.url + "/extensions/", wait_until="commit")
    watching.evaluate(
        "(src) => { document.body.innerHTML = ''; "
        "document.body.append(Object.assign(new Image(), { src })) }",
        address,
    )
    watching.wait_for_function("() => document.querySelector('img').naturalWidth === 256")
    button.click()
    page.wait(f"{TOAST}.includes('kept/film_00002_.png')")
    assert "kept/film_00002_.png" in page.get(TOAST)
    page.stop()
    # when nothing moves any more the stream shows what the node does, or what a busy page missed
    assert button.is_disabled()
    page.wait(
        f"{TOAST}.includes('as it was: recorded') && {TOAST}.includes('kept/film_00001_.mp4')"
    )
    read = """(() => { const image = document.querySelector('img') ?? window.live.views()[0];
      const c = new OffscreenCanvas(96, 96).getContext('2d');
      c.drawImage(image, 0, 0, 96, 96);
      return [...c.getImageData(0, 0, 96, 96).data].filter((_, i) => i % 4 === 1) })"""
    shown = [tools.read_counter(np.array(where(f"{read}()")).reshape(96, 96))
             for where in (page.page.evaluate, watching.evaluate)]  # fmt: skip
    watching.close()
    assert None not in shown and (shown[1] - shown[0]) % tools.LAP < tools.LAP / 2, shown
    for name in ("kept/film_00001_.mp4", "kept/film_00002_.png"):
        page.load(tools.through(width=128))
        drop(page, name)
        page.wait("app.graph.getNodeById(2)?.title === 'as it was'")
        assert page.get("app.graph.getNodeById(1).widgets[2].value") == 256
        assert page.get("app.graph.getNodeById(2).widgets.find((w) => w.name === 'record').value")
    # another run of the page has the same address
    page.get("app.graph.getNodeById(2).widgets.find((w) => w.name === 'record').value = false")
    page.live()
    assert address_of(page) == address
    page.stop()
    assert not page.ours
