"""The browser's camera: asked for what the graph wants; on other ways to the worker; and a browser
that is killed."""

import importlib.util
import pathlib
import time

import pytest

pytestmark = [pytest.mark.comfy, pytest.mark.server]

HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("browser_tools", HERE / "conftest.py")
tools = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)

FRAMES = "Number(window.live.views()[0].dataset.frames)"
MODE = """(() => { const open = window.live.tracks.filter((t) => t.readyState === 'live');
    const { width, height, frameRate, resizeMode } = open.at(-1).getSettings();
    return [width, height, frameRate, resizeMode] })()"""


def goes_on(page, more=10):
    """More pictures are drawn than there were."""
    page.wait(f"{FRAMES} >= {page.get(FRAMES) + more}", 10)


def test_the_camera_follows_the_size_and_rate_of_the_graph(spare):
    """Chromium's own fake camera has modes from 96 x 96 to 3840 x 2160, at 20 fps or less."""
    page = spare.page
    page.load(tools.through(width=256, height=256, fit="stretch"))
    page.live()
    # the smallest that is large enough, and whole: 320 x 240 is not, 640 x 480 is
    assert page.get(MODE) == [640, 480, 20, "none"]
    # what it cannot give is said on the node
    note = "document.querySelector('.livediffusion-rate').textContent"
    page.wait(f"{note} === 'The camera gives 20 fps, not 30'")
    opened = page.get("window.live.tracks.length")
    for (width, height, fps), mode in (
        ((384, 512, 10), [1280, 720, 10, "none"]),  # upright, of a camera that lies
        ((64, 64, 240), [320, 240, 20, "none"]),
    ):
        page.get("""(() => { const { widgets } = app.graph.getNodeById(1);
            [widgets[2].value, widgets[3].value, widgets[5].value] = a })()""",
            [width, height, fps])  # fmt: skip
        page.wait(f"window.live.views()[0].width === {width}")
        page.wait(f"String({MODE}) === {','.join(map(str, mode))!r}")
        page.wait(f"{FRAMES} > {page.get(FRAMES) + 3}")
        said = f"The camera gives {mode[2]} fps, not {fps}" if mode[2] < fps else ""
        page.wait(f"{note} === {said!r}")
    # it was never asked for again, and one track is read at a time
    assert page.get("window.live.tracks.length") == opened + 2
    assert page.get("window.live.cameras()") == 2
    page.stop()
    assert page.get("window.live.cameras()") == 0
    assert not page.ours


def test_a_browser_that_is_killed_takes_its_run_along(spare, site):
    """SIGKILL to every process of it: nothing can say goodbye."""
    spare.page.load(tools.through())
    spare.page.live()
    assert site.json("/queue")["queue_running"]
    assert spare.kill() > 2
    deadline = time.monotonic() + 5
    while site.json("/queue")["queue_running"]:
        assert time.monotonic() < deadline, "the server kept the run"
        time.sleep(0.02)


def test_a_browser_that_cannot_hand_its_camera_to_a_worker(page):
    """The page is asked for each picture, and never for one more than can be sent."""
    page.load(tools.through())
    page.get("""(() => { window.live.processor = window.MediaStreamTrackProcessor;
        window.live.make = window.createImageBitmap; window.live.made = 0;
        window.MediaStreamTrackProcessor = undefined;
        window.createImageBitmap = (...of) => { window.live.made++;
          return window.live.make.apply(window, of) } })()""")
    try:
        page.live()
        goes_on(page, 30)
        sources, made = page.get("[window.live.views()[0].dataset.source, window.live.made]")
        assert made <= int(sources) + 6
        page.page.click(".livediffusion-live")
        page.wait("window.live.cameras() === 0", 1)
        page.wait("window.live.state() === 'idle'", 5)
    finally:
        page.get("""(() => { window.MediaStreamTrackProcessor = window.live.processor;
            window.createImageBitmap = window.live.make })()""")
    assert not page.ours


# as Chromium does it at times: the worker gets no picture of a camera that goes on in the page
QUIET = """(() => { const { MediaStreamTrackProcessor: Given } = window;
  Object.assign(window.live, { Given, make: window.createImageBitmap, made: 0, quiet: true });
  window.createImageBitmap = (...of) =>
    (window.live.made++, window.live.make.apply(window, of));
  window.MediaStreamTrackProcessor = class {
    constructor(of) {
      const reader = new Given(of).readable.getReader();
      this.readable = new ReadableStream({ async pull(given) {
        for (;;) {
          const { done, value } = await reader.read();
          if (done) return given.close();
          setTimeout(() => value.close(), 500);
          if (!window.live.quiet) return given.enqueue(value);
        }
      } }, { highWaterMark: 0 });
    }
  } })()"""


def test_a_camera_that_is_quiet_in_the_worker_and_goes_on_in_the_page(page):
    page.load(tools.through())
    page.get(QUIET)
    try:
        page.live()
        goes_on(page, 20)
        assert page.get("window.live.made") >= 10
        # it comes again, and nothing is asked of the page any more
        page.get("void (window.live.quiet = false)")
        goes_on(page)
        made = page.get("window.live.made")
        goes_on(page, 20)
        assert page.get("window.live.made") < made + 10
    finally:
        page.get("""(() => { window.MediaStreamTrackProcessor = window.live.Given;
            window.createImageBitmap = window.live.make })()""")
    page.stop()
    page.wait("window.live.cameras() === 0", 5)
