"""What a page and a phone send besides the camera, and what the nodes say of their ends."""

import contextlib
import importlib.util
import itertools
import pathlib
import time

import numpy as np
import pytest
from chromium import CHROMIUM
from clock import Limit

pytestmark = [pytest.mark.comfy, pytest.mark.server]

HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("browser_tools", HERE / "conftest.py")
tools = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)

HINT = "document.querySelector('.livediffusion-hint').textContent"
# the address that a phone's code holds, or would where phones can come
COPY = """new Promise((done) => { navigator.clipboard.writeText = async (text) => done(text);
  [...document.querySelectorAll('.livediffusion-box button')]
    .find((button) => button.textContent === 'Copy address').click() })"""
# a tab whose picture is the counter film
FILM = """<title>Counter film</title><body style="margin:0;background:#808080">
<canvas id="film" width="640" height="480" style="display:block"></canvas>"""
PLAY = """([bits, lap]) => {
  const paint = document.getElementById('film').getContext('2d')
  let number = 0
  window.playing = setInterval(() => {
    number = (number + 1) % lap
    paint.fillStyle = '#808080'
    paint.fillRect(0, 0, 640, 480)
    for (let bit = 0; bit < bits; bit++) {
      paint.fillStyle = (number >> bit) & 1 ? '#fff' : '#000'
      paint.fillRect(80 + bit * 40, 40, 40, 80)
    }
  }, 50)
}"""


def source(name, **settings):
    """Live Camera with a source straight to Live View."""
    made = tools.through(source=name, **settings)
    made["nodes"][0]["widgets_values"] += ["", "", ""]
    return made


def read(page):
    """The numbers in the pictures that were drawn since the page is watched."""
    drawn = page.get("window.live.drawn")
    return [tools.read_counter(np.array(d["greys"]).reshape(96, 96)) for d in drawn]


@contextlib.contextmanager
def phone(browser, url):
    """A phone's page, in a browser context of its own."""
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True,
        permissions=["camera"],
    )  # fmt: skip
    context.add_init_script(tools.WATCH)
    page = context.new_page()
    page.noise = []
    page.on("console", lambda m: page.noise.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: page.noise.append(str(e)))
    try:
        page.goto(url)
        page.wait_for_function("() => document.getElementById('go').textContent")
        yield page
    finally:
        context.close()


def phase(page, wanted, seconds=20):
    page.wait_for_function(f"() => document.body.dataset.phase === '{wanted}'",
                           timeout=1000 * seconds)  # fmt: skip


def test_a_phones_camera_is_in_the_graph_and_nothing_but_that(page, browser):
    page.load(source("phone"))
    page.page.click(".livediffusion-live")
    copy = "[...document.querySelectorAll('.livediffusion-box button')][0]"
    page.wait(f"{copy}.textContent === 'Copy address' && !{copy}.disabled")
    # this server is for this computer alone, so no code is shown and it says what to do
    page.wait(f"{HINT}.includes('run.py live --lan')")
    url = page.get(COPY)
    assert url.startswith(page.site.url + "/livediffusion/phone/")
    assert page.get("window.live.cameras()") == 0  # this computer's camera is not asked for
    with phone(browser.browser, url) as mine:
        assert mine.evaluate("window.live.cameras()") == 0  # nor the phone's, before it is told to
        mine.click("#go")
        phase(mine, "sending")
        mine.wait_for_function("() => document.getElementById('status').dataset.on === 'yes'")
        page.page.bring_to_front()
        page.wait("window.live.state() === 'live'")
        page.get("window.live.watch()")
        page.wait("window.live.drawn.length >= 25")
        numbers = read(page)
        seen = [n for n in numbers if n is not None]
        assert len(seen) >= 0.9 * len(numbers)
        # newest wins, order kept, none twice; the camera's film starts again
        steps = [(b - a) % tools.LAP for a, b in itertools.pairwise(seen)]
        assert all(0 < step < 200 for step in steps), seen
        page.wait(f"{HINT} === 'Connected'")
        # the other of its cameras, and still the same phone
        mine.bring_to_front()
        mine.click("#turn")
        phase(mine, "sending")
        mine.wait_for_function("() => document.getElementById('seen').classList.contains('mirror')")
        with phone(browser.browser, url) as other:
            other.click("#go")
            phase(other, "over")
            assert "Another phone" in other.inner_text("#title")
            assert "New code" in other.inner_text("#what")
            assert other.evaluate("window.live.cameras()") == 0
        page.page.bring_to_front()
        page.stop()
        phase(mine, "over")
        assert "over" in mine.inner_text("#title")
        assert mine.evaluate("window.live.cameras()") == 0
        assert not mine.noise
    with phone(browser.browser, url) as late:
        late.click("#go")
        phase(late, "over")
    assert not page.ours


@pytest.fixture
def sharing(playwright, site):
    """A page of a browser that shares the tab with the counter film, whoever asks."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here (LIVEDIFFUSION_CHROMIUM)")
    running = playwright.chromium.launch(
        executable_path=CHROMIUM,
        args=["--no-sandbox", "--disable-gpu",
              "--auto-select-tab-capture-source-by-title=Counter film"],
    )  # fmt: skip
    try:
        context = tools.context_of(running)
        page = tools.Page(context.new_page(), site)
        page.open()
        page.film = context.new_page()
        page.film.set_viewport_size({"width": 640, "height": 480})
        page.film.set_content(FILM)
        page.film.evaluate(PLAY, [tools.BITS, 4000])
        page.page.bring_to_front()
        yield page
    finally:
        running.close()


def test_a_shared_tab_is_in_the_graph_and_may_be_ended_and_chosen_again(sharing):
    page = sharing
    page.load(source("screen"))
    page.get("""(window.live.shared = [],
        window.live.display = navigator.mediaDevices.getDisplayMedia.bind(navigator.mediaDevices),
        navigator.mediaDevices.getDisplayMedia = async (wish) => {
          const made = await window.live.display(wish)
          window.live.shared.push(made.getVideoTracks()[0])
          return made
        })""")
    page.live()
    page.get("window.live.watch()")
    page.wait("window.live.drawn.length >= 8")
    seen = [n for n in read(page) if n is not None]
    # a tab that a busy machine does not draw anew is sent again
    assert len(set(seen)) >= 6 and seen == sorted(seen)
    # the film stops: what does not move is sent again, so an edit is seen all the same
    page.film.evaluate("clearInterval(window.playing)")
    time.sleep(0.5)
    page.get("app.graph.getNodeById(1).widgets.find((w) => w.name === 'width').value = 128")
    page.wait("window.live.views()[0].width === 128")
    # its user ends it, in the browser's own bar: it is said, and the run stays
    page.get("""(window.live.shared[0].stop(),
        window.live.shared[0].dispatchEvent(new Event('ended')))""")
    page.wait(f"{HINT}.includes('Sharing has ended')")
    page.wait("window.live.toasts().join().includes('Sharing has ended')")
    assert page.get("window.live.state()") == "live"
    # an edit does not ask for it again, the button does
    page.get("app.graph.getNodeById(1).widgets.find((w) => w.name === 'width').value = 192")
    page.wait("window.live.state() === 'live'")
    time.sleep(0.5)
    assert page.get("window.live.shared.length") == 1
    page.get("""[...document.querySelectorAll('.livediffusion-box button')]
        .find((button) => button.textContent === 'Choose').click()""")
    page.wait("window.live.views()[0].width === 192")
    assert page.get("window.live.shared.length") == 2
    page.stop()
    shared = "window.live.shared.filter((t) => t.readyState === 'live').length"
    page.wait(f"{shared} === 0")
    assert not page.ours


@pytest.mark.parametrize(
    ("error", "words"),
    [("NotAllowedError", "No screen was chosen"), ("InvalidStateError", "after a click"),
     ("NotSupportedError", "cannot share a screen")],
)  # fmt: skip
def test_a_screen_that_is_not_shared_is_explained(page, error, words):
    page.load(source("screen"))
    page.get("""(window.live.display = navigator.mediaDevices.getDisplayMedia,
        navigator.mediaDevices.getDisplayMedia = async () => { throw new DOMException('', a) })""",
        error)  # fmt: skip
    page.page.click(".livediffusion-live")
    page.wait(f"window.live.toasts().join().includes({words!r})")
    page.wait("window.live.state() === 'idle'")
    page.get("void (navigator.mediaDevices.getDisplayMedia = window.live.display)")
    page.get("window.live.untoast()")
    assert not page.site.json("/queue")["queue_running"]
    assert not page.ours


def test_each_source_shows_what_belongs_to_it(page):
    own = {"file": {"file", "loop"}, "device": {"device"}, "address": {"address"},
           "ndi": {"sender"}}  # fmt: skip
    for name in ("browser", "screen", "phone", "whip", *own):
        page.load(source(name))
        hidden = page.get("""app.graph.getNodeById(1).widgets.filter((w) => w.hidden)
            .map((w) => w.name)""")
        every = {"file", "loop", "device", "address", "sender"}
        assert set(hidden) == every - own.get(name, set()), name
    # what is hidden is kept
    saved = page.get("app.graph.serialize().nodes.find((n) => n.id === 1).widgets_values")
    assert saved[:8] == ["ndi", "none", 256, 256, "crop", 30, False, True]
    assert not page.ours


def test_an_address_is_allowed_on_the_servers_own_page(page):
    page.load(source("address"))
    page.get("""app.graph.getNodeById(1).widgets.find((w) => w.name === 'address').value =
        'rtsp://user:hush@192.0.2.77/live'""")
    page.page.click(".livediffusion-live")
    page.wait("window.live.toasts().join().includes('not allowed')")
    page.wait("window.live.state() === 'idle'")
    page.wait(f"{HINT}.includes('is not allowed yet')")
    assert "hush" not in page.get(HINT) + page.get("window.live.toasts().join()")
    allow = """[...document.querySelectorAll('.livediffusion-box button')]
        .find((button) => button.textContent === 'Allow')"""
    assert page.get(f"!{allow}.hidden")
    page.get("window.live.untoast()")
    page.get(f"{allow}.click()")
    page.wait("window.live.toasts().join().includes('is allowed now')")
    limit = Limit(10)
    while not page.get(f"{allow}.hidden"):
        assert not limit.over
        time.sleep(0.02)
    # what is secret stays at the server, and the workflow has a name for it
    told = page.get("app.graph.getNodeById(1).widgets.find((w) => w.name === 'address').value")
    assert "hush" not in told and told.startswith("rtsp://")
    page.get("window.live.untoast()")
