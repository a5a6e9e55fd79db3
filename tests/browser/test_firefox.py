"""The live page in Firefox, which hands no camera to a worker: the page is asked for pictures."""

import importlib.util
import pathlib
import time

import firefox
import numpy as np
import pytest
from clock import Limit

pytestmark = [pytest.mark.comfy, pytest.mark.server]

HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("browser_tools", HERE / "conftest.py")
tools = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)

FRAMES = "Number(window.live.views()[0].dataset.frames)"
# a camera that is a film of numbers, 20 per second, which goes on while the page is hidden
FILM = """
const real = navigator.mediaDevices.getUserMedia;
const film = document.createElement('canvas');
Object.assign(film, { width: 640, height: 480 });
const pen = film.getContext('2d');
window.film = { number: 0, on: false };
navigator.mediaDevices.getUserMedia = async (wish) => {
  if (!window.film.on) return real(wish);
  const beat = 'setInterval(() => postMessage(0), 50)';
  const clock = new Worker(URL.createObjectURL(new Blob([beat])));
  clock.onmessage = () => {
    const number = ++window.film.number;
    pen.fillStyle = '#808080';
    pen.fillRect(0, 0, 640, 480);
    for (let bit = 0; bit < 12; bit++) {
      pen.fillStyle = (number >> bit) & 1 ? '#fff' : '#000';
      pen.fillRect(80 + 40 * bit, 40, 40, 80);
    }
  };
  const stream = film.captureStream();
  const [track] = stream.getTracks();
  const stop = track.stop.bind(track);
  track.stop = () => {
    clock.terminate();
    stop();
  };
  track.getSettings = () => ({ frameRate: 20, width: 640, height: 480 });
  window.live.tracks.push(track);
  return stream;
};
"""


@pytest.fixture(scope="module")
def page(comfyui, site, tmp_path_factory):
    with firefox.driving(tmp_path_factory.mktemp("firefox") / "profile") as browser:
        viewport = {"width": 1400, "height": 800}
        browser.call("browsingContext.setViewport", context=browser.tab, viewport=viewport)
        browser.preload(tools.WATCH + FILM)
        made = tools.Page(browser, site)
        made.open()
        yield made


def numbers(page, least):
    """Those that were shown since the last call, once there are so many."""
    page.wait(f"window.live.drawn.length >= {least}")
    drawn = page.get("window.live.drawn.splice(0)")
    return [tools.read_counter(np.array(d["greys"], float).reshape(96, 96)) for d in drawn]


def test_firefox_has_what_the_page_takes_and_not_what_it_does_without(page):
    assert "Firefox/" in page.get("navigator.userAgent")
    assert page.get("typeof MediaStreamTrackProcessor") == "undefined"
    assert page.get("isSecureContext")


def test_the_camera_is_shown_follows_the_graph_and_is_let_go(page):
    page.load(tools.through(width=256, height=256, fit="stretch"))
    page.live()
    page.wait(f"{FRAMES} > 20")
    mode = """(() => { const { width, height, resizeMode } = window.live.tracks.at(-1).getSettings()
        return [width, height, resizeMode] })()"""
    # whole: Firefox would cut the wanted shape out of the picture
    assert page.get(mode) == [640, 480, "none"]
    opened = page.get("window.live.tracks.length")
    page.get("""(() => { const { widgets } = app.graph.getNodeById(1);
        [widgets[2].value, widgets[3].value] = a })()""", [128, 96])  # fmt: skip
    page.wait("window.live.views()[0].width === 128")
    page.wait(f"{FRAMES} > {page.get(FRAMES) + 10}")
    assert page.get("window.live.tracks.length") == opened, "it was asked for again"
    page.stop()
    assert page.get("window.live.cameras()") == 0
    assert not page.ours


def test_a_counter_film_comes_in_order_and_none_twice(page):
    page.get("window.film.on = true")
    page.load(tools.through())
    page.live()
    page.get("window.live.watch()")
    seen = numbers(page, 40)
    assert None not in seen and seen == sorted(set(seen))
    # in the background nothing is told of new pictures: they come on, in order
    browser = page.page
    other = browser.call("browsingContext.create", type="tab")["context"]
    browser.call("browsingContext.activate", context=other)
    page.wait("document.hidden")
    numbers(page, 1)
    hidden = numbers(page, 20)
    browser.call("browsingContext.activate", context=browser.tab)
    browser.call("browsingContext.close", context=other)
    page.wait("!document.hidden")
    assert None not in hidden and hidden == sorted(hidden)
    assert len(set(hidden)) > len(hidden) / 2
    page.stop()
    page.get("window.film.on = false")
    assert page.get("window.live.cameras()") == 0
    assert not page.ours


def test_a_page_that_is_left_ends_its_run(page, site):
    page.load(tools.through())
    page.live()
    assert site.json("/queue")["queue_running"]
    page.page.goto("about:blank")
    limit = Limit(10)
    while site.json("/queue")["queue_running"]:
        assert not limit.over, "the server kept the run"
        time.sleep(0.02)
