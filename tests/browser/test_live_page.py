"""The page as a user has it: open, press Live, edit, stop; and what is left when they go."""

import importlib.util
import itertools
import json
import pathlib
import time

import numpy as np
import pytest
from clock import Limit

pytestmark = [pytest.mark.comfy, pytest.mark.server]

HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("browser_tools", HERE / "conftest.py")
tools = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)
fresh, through, read_counter = tools.fresh, tools.through, tools.read_counter


def demo():
    path = tools.ROOT / "workflows" / "live_webcam.json"
    return json.loads(path.read_text(encoding="utf-8"))


def pictures(page):
    """Numbers of the drawn pictures, with what the page knows of them."""
    return page.get("window.live.drawn")


def within(seconds, condition):
    limit = Limit(seconds)
    while not condition():
        assert not limit.over, "it did not happen in time"
        time.sleep(0.02)


def running(site):
    return site.json("/queue")["queue_running"]


def test_from_the_template_browser_to_stop(page):
    """The whole way of a newcomer, with the bundled model."""
    page.open("?template=live_webcam&source=ComfyUI-LiveDiffusion")
    page.wait("window.live.views().length === 1")
    page.live()
    page.get("window.live.watch()")
    page.wait("window.live.drawn.length >= 12", 90)
    drawn = pictures(page)
    assert len({tuple(d["greys"]) for d in drawn}) >= 11
    before = np.mean([d["greys"] for d in drawn[-5:]], 0)
    # the noise levels are drawn on their node, which grew, and no node covers another
    page.wait("document.querySelector('.livediffusion-plot')")
    boxes = page.get("""app.graph.nodes.map((n) =>
        [n.title, n.pos[0], n.pos[1] - LiteGraph.NODE_TITLE_HEIGHT,
         n.pos[0] + n.size[0], n.pos[1] + n.size[1]])""")
    assert len(boxes) == 11
    for (one, x, y, right, low), (other, u, v, far, deep) in itertools.combinations(boxes, 2):
        apart = right <= u or far <= x or low <= v or deep <= y
        assert apart, (one, other, boxes)
    # an edit as a user makes it: typed into the prompt's box
    page.get("""(() => { app.canvas.ds.scale = 1;
        app.canvas.centerOnNode(app.graph.findNodesByType('CLIPTextEncode')[0]) })()""")
    page.page.locator("textarea.comfy-multiline-input:visible").first.fill("blueprint")
    page.wait("Number(window.live.views()[0].dataset.version) === 2")
    first = page.get("Number(window.live.views()[0].dataset.seq)")
    page.wait(f"Number(window.live.views()[0].dataset.seq) >= {first + 6}")
    after = [np.array(d["greys"]) for d in pictures(page) if d["version"] == "2"]
    change = [float(np.abs(picture - before).mean()) for picture in after]
    settled = np.mean(change[3:])
    assert settled > 12, change  # the look is another one
    assert change[2] > 0.6 * settled, change  # and was by the third picture
    page.stop()
    assert page.get("window.live.cameras()") == 0
    assert not running(page.site)
    assert not page.ours


def test_pictures_come_in_order_and_none_twice(page):
    """The counter in the camera's file: each picture is of a newer frame, none comes twice."""
    page.load(through())
    page.live()
    page.get("window.live.watch()")
    page.wait("Number(window.live.views()[0].dataset.frames) >= 80", 60)
    page.stop()
    drawn = pictures(page)
    numbers = [read_counter(np.array(d["greys"]).reshape(96, 96)) for d in drawn]
    read = [n for n in numbers if n is not None]
    assert len(read) >= 0.95 * len(numbers) >= 60
    # the camera's file starts again
    steps = [(b - a) % tools.LAP for a, b in itertools.pairwise(read)]
    assert all(0 < step < 200 for step in steps), read
    sources = [int(d["source"]) for d in drawn]
    assert sources == sorted(set(sources))
    assert not page.ours


@pytest.mark.parametrize("nodes2", [False, True], ids=["canvas", "nodes 2.0"])
def test_both_kinds_of_nodes(page, nodes2):
    page.nodes2(nodes2)
    page.load(through())
    page.live()
    box = page.get("window.live.views()[0].getBoundingClientRect().toJSON()")
    assert box["width"] > 200 and box["height"] > 150
    for scale in (1, 0.5):
        page.get("((s) => { app.canvas.ds.scale = s; app.canvas.setDirty(true, true) })(a)", scale)
        page.wait("Number(window.live.views()[0].dataset.frames) % 5 === 0")
        parts = page.get(
            """[...document.querySelectorAll('.livediffusion-box')].map((box) =>
              [...box.querySelectorAll('button, select, span, .livediffusion-screen')]
                .filter((e) => e.offsetParent).map((e) => e.getBoundingClientRect().toJSON()))"""
        )
        assert len(parts) == 2
        for boxes in parts:
            for i, one in enumerate(boxes):
                for other in boxes[i + 1 :]:
                    apart = (one["right"] <= other["left"] + 1 or other["right"] <= one["left"] + 1
                             or one["bottom"] <= other["top"] + 1
                             or other["bottom"] <= one["top"] + 1)  # fmt: skip
                    assert apart, (scale, one, other)
    page.wait("document.querySelector('.livediffusion-figures').textContent.includes('fps')")
    page.stop()
    assert not page.ours


def node_deleted(page):
    page.get("app.graph.remove(app.graph.getNodeById(2))")


def workflow_switched(page):
    page.get("app.loadGraphData(a)", through(width=128))


def stopped(page):
    page.page.click(".livediffusion-live")


@pytest.mark.parametrize("leave", [node_deleted, workflow_switched, stopped],
                         ids=lambda f: f.__name__)  # fmt: skip
def test_the_camera_goes_dark(page, leave):
    page.load(through())
    page.live()
    assert page.get("window.live.cameras()") >= 1
    leave(page)
    within(5, lambda: page.get("window.live.cameras()") == 0)
    within(5, lambda: not running(page.site))
    page.wait("window.live.state() === 'idle'", 5)
    assert not page.ours


def test_a_prompt_is_refused_where_the_user_sees_it(page):
    broken = through()
    broken["nodes"][0]["widgets_values"][0:2] = ["file", "none"]
    page.load(broken)
    page.page.click(".livediffusion-live")
    page.wait("window.live.toasts().join().includes('input folder')")
    assert page.get("app.graph.getNodeById(1).has_errors")
    page.wait("window.live.state() === 'idle'")
    assert page.get("window.live.cameras()") == 0
    # put right, it runs
    page.get("app.graph.getNodeById(1).widgets.find((w) => w.name === 'source').value = 'browser'")
    page.live()
    assert not page.get("app.graph.getNodeById(1).has_errors")
    page.stop()


@pytest.mark.parametrize(
    ("error", "words"),
    [("NotAllowedError", "does not allow"), ("NotFoundError", "No camera was found"),
     ("NotReadableError", "another program")],
)  # fmt: skip
def test_a_camera_that_does_not_open_is_explained(page, error, words):
    page.load(through())
    page.get("""(window.live.get = navigator.mediaDevices.getUserMedia,
        navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('', a) })""",
        error)  # fmt: skip
    page.page.click(".livediffusion-live")
    page.wait(f"window.live.toasts().join().includes({words!r})")
    page.wait("window.live.state() === 'idle'")
    page.get("void (navigator.mediaDevices.getUserMedia = window.live.get)")
    assert not running(page.site)
    assert not page.ours


def test_a_page_without_https_says_so(page):
    page.load(through())
    page.get("Object.defineProperty(window, 'isSecureContext', { value: false, writable: true })")
    page.page.click(".livediffusion-live")
    page.wait("window.live.toasts().join().includes('https or localhost')")
    page.wait("window.live.state() === 'idle'")
    page.get("window.isSecureContext = true")


def test_two_tabs_take_turns_and_a_closed_one_ends_its_run(page, browser, site):
    first = page
    with fresh(browser, site) as second:
        first.load(through())
        first.live()
        second.load(through(width=128, height=128))
        second.page.click(".livediffusion-live")
        second.wait("window.live.state() === 'queued'")
        second.wait("document.querySelector('.livediffusion-live').innerText.includes('(1)')")
        assert first.get("window.live.state()") == "live"
        first.stop()
        second.wait("window.live.state() === 'live'")
        second.wait("Number(window.live.views()[0].dataset.frames) > 0")
        assert second.get("window.live.views()[0].width") == 128
        assert not first.ours + second.ours
        assert running(site)
        second.page.close()
        within(5, lambda: not running(site))


def test_cancel_in_the_queue_ends_it(page):
    page.load(through())
    page.live()
    page.site.json("/interrupt", {})
    page.wait("window.live.state() === 'idle'")
    assert page.get("window.live.cameras()") == 0
    page.live()
    page.stop()
    history = page.site.json("/history?max_items=2")
    assert [h["status"]["status_str"] for h in history.values()] == ["error", "success"]


def test_an_ordinary_prompt_takes_the_camera_of_this_moment(page):
    page.load(through())
    page.get("app.queuePrompt(0)")
    page.wait("window.live.views()[0].width === 256")
    numbers = page.get(
        """(() => { const c = new OffscreenCanvas(96, 96).getContext('2d');
          c.drawImage(window.live.views()[0], 0, 0, 96, 96);
          return [...c.getImageData(0, 0, 96, 96).data].filter((_, i) => i % 4 === 1) })()"""
    )
    assert read_counter(np.array(numbers).reshape(96, 96)) is not None
    assert page.get("window.live.cameras()") == 0
    saved = page.get("app.graph.serialize().nodes.find((n) => n.id === 1).widgets_values")
    assert saved == ["browser", "none", 256, 256, "crop", 30, False, True, "", "", ""]
    assert not page.ours


def test_the_window_and_the_address(page):
    page.load(through())
    page.live()
    with page.page.expect_popup() as opened:
        page.page.get_by_text("Window", exact=True).click()
    popup = opened.value
    popup.wait_for_function("() => document.querySelector('canvas').width === 256")
    address = page.get("""new Promise((done) => {
        navigator.clipboard.writeText = async (text) => done(text);
        [...document.querySelectorAll('.livediffusion-box button')]
          .find((b) => b.textContent === 'Copy URL').click() })""")
    assert address.startswith(page.site.url + "/")
    import urllib.request

    with urllib.request.urlopen(address, timeout=10) as stream:
        head = stream.read(400)
    assert b"image/jpeg" in head and b"\xff\xd8\xff" in head
    page.stop()
    assert page.get("window.live.cameras()") == 0
