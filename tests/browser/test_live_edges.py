"""The page when something comes in between: undo, another tab, a busy server, a cut line."""

import asyncio
import contextlib
import importlib.util
import io
import pathlib
import socket
import struct
import threading
import time

import pytest
from aiohttp import web
from clock import Limit
from PIL import Image

pytestmark = [pytest.mark.comfy, pytest.mark.server]

HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("browser_tools", HERE / "conftest.py")
tools = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)
fresh, through = tools.fresh, tools.through

FRAMES = "Number(window.live.views()[0]?.dataset.frames ?? 0)"
DARK = "window.live.cameras() === 0"
IDLE = "window.live.state() === 'idle'"
SOURCE = "app.graph.getNodeById(1).widgets.find((w) => w.name === 'source')"
TOASTS = "window.live.toasts()"
# an outline of ours: the newest Nodes 2.0 show no mark but those of ComfyUI's own errors
MARKED = (
    "(getComputedStyle(document.querySelector('[data-node-id=\"1\"]'))"
    ".outlineStyle === 'solid')"
)


def goes_on(page, more=10):
    """More pictures are drawn than there were."""
    there = page.get(FRAMES)
    page.wait(f"{FRAMES} >= {there + more}", 10)


def without_toasts(page):
    page.get("window.live.untoast()")
    page.wait(f"{TOASTS}.length === 0")


# -- the graph is loaded anew ---------------------------------------------------------------


def move_and_undo(page):
    page.get("""(() => { app.graph.beforeChange(); app.graph.getNodeById(2).pos[0] += 80;
        app.graph.afterChange();
        app.extensionManager.workflow.activeWorkflow.changeTracker.checkState?.() })()""")
    page.get("""(() => { window.live.node = app.graph.getNodeById(2);
        app.extensionManager.workflow.activeWorkflow.changeTracker.undo() })()""")
    page.wait("app.graph.getNodeById(2) && app.graph.getNodeById(2) !== window.live.node")


def test_undo_keeps_the_pictures_coming(page):
    """Undo makes all nodes anew, though the graph that runs is the same."""
    page.load(through())
    page.live()
    move_and_undo(page)
    goes_on(page)
    assert page.get("window.live.state()") == "live"
    page.stop()
    assert not page.ours


def test_a_new_name_is_no_other_workflow(page):
    page.load(through())
    page.live()
    # a name changes the tab's path, and loads nothing; then undo loads the same graph
    path = page.get("app.extensionManager.workflow.activeWorkflow.path")
    page.get("""(async () => { const { workflow } = app.extensionManager;
        await workflow.renameWorkflow(workflow.activeWorkflow, 'workflows/renamed.json') })()""")
    page.wait(f"app.extensionManager.workflow.activeWorkflow.path !== {path!r}")
    move_and_undo(page)
    goes_on(page)
    assert page.get("window.live.state()") == "live"
    page.stop()


def duplicated(page):
    page.get("void app.extensionManager.command.execute('Comfy.DuplicateWorkflow')")


def opened_again(page):
    page.get("void app.loadGraphData(app.graph.serialize())")


@pytest.mark.parametrize("open_it", [duplicated, opened_again], ids=lambda f: f.__name__)
def test_another_tab_of_the_same_graph_is_another_workflow(page, open_it):
    page.load(through())
    page.live()
    without_toasts(page)
    tab = page.get("app.extensionManager.workflow.activeWorkflow.path")
    open_it(page)
    page.wait(f"app.extensionManager.workflow.activeWorkflow.path !== {tab!r}")
    page.wait(DARK, 5)
    page.wait(IDLE, 5)
    said = page.get(TOASTS)
    assert len(said) == 1 and "another workflow" in said[0]
    assert not page.ours


LATE = """(() => { window.live.Worker = Worker; window.Worker = class extends Worker {
  set onmessage(then) {
    super.onmessage = then && ((e) =>
      e.data.type === 'closed' ? setTimeout(then, 2500, e) : then(e))
  }
} })()"""


def test_who_looks_at_a_run_that_has_ended_does_not_end_it_again(page):
    """The page looks at its graph each second, also between the run's end and its socket's."""
    page.load(through())
    page.get(LATE)
    try:
        page.live()
        without_toasts(page)
        duplicated(page)
        page.wait(DARK, 5)
        page.wait(f"{TOASTS}.length > 0")
        page.wait(IDLE, 8)
    finally:
        page.get("void (window.Worker = window.live.Worker)")
    assert len(page.get(TOASTS)) == 1


# -- the camera -----------------------------------------------------------------------------


def test_stop_darkens_the_camera_though_the_server_is_busy(page):
    page.load(through(width=1024, height=1024))
    page.get("""(() => { const { graph } = app, blur = LiteGraph.createNode('ImageBlur');
        graph.add(blur); blur.widgets[0].value = 31; blur.widgets[1].value = 10;
        graph.getNodeById(1).connect(0, blur, 0); blur.connect(0, graph.getNodeById(2), 0) })()""")
    page.page.click(".livediffusion-live")
    page.wait("window.live.state() === 'live'")
    # the second frame has begun when the first is shown, and takes seconds
    page.wait(f"{FRAMES} >= 1", 60)
    page.page.click(".livediffusion-live")
    page.wait(DARK, 1)
    assert page.get("window.live.state()") == "stopping"
    page.wait(IDLE, 60)


def test_a_node_deleted_while_the_browser_asks_leaves_no_light(page):
    page.load(through())
    page.get("""(() => { const devices = navigator.mediaDevices, get = devices.getUserMedia;
        window.live.asked = new Promise((asked) => { devices.getUserMedia = async (wish) => {
          await new Promise((go) => { window.live.go = go; asked() });
          devices.getUserMedia = get;
          return (window.live.late = await get(wish)) } }) })()""")
    page.page.get_by_text("Try", exact=True).click()
    page.get("window.live.asked")
    page.get("app.graph.remove(app.graph.getNodeById(1))")
    page.get("window.live.go()")
    page.wait("window.live.late")
    page.wait(DARK, 2)


def test_a_camera_tried_and_exchanged_goes_dark_with_its_node(page):
    page.load(through())
    page.page.get_by_text("Try", exact=True).click()
    page.wait("window.live.cameras() === 1")
    page.wait("document.querySelectorAll('.livediffusion-box option').length > 1")
    page.get("""(() => { const select = document.querySelector('.livediffusion-box select');
        select.value = select.options[1].value; select.dispatchEvent(new Event('change')) })()""")
    page.wait("window.live.tracks.at(-2)?.readyState === 'ended' && window.live.cameras() === 1")
    page.wait("[...document.querySelectorAll('.livediffusion-box button')]"
              ".some((b) => b.textContent === 'Off')")  # fmt: skip
    page.get("app.graph.remove(app.graph.getNodeById(1))")
    page.wait(DARK, 1)
    page.get("localStorage.removeItem('livediffusion.camera')")


def unplugged(page):
    """What the browser does when a camera is pulled out."""
    page.get("window.live.tracks.forEach((t) => { t.stop(); t.dispatchEvent(new Event('ended')) })")
    page.wait(f"{TOASTS}.join().includes('disconnected')")
    page.get("window.live.untoast()")


def test_a_camera_that_is_only_tried_ends_no_run_and_live_opens_it_again(page, site):
    Image.new("RGB", (64, 64)).save(site.base / "input" / "black.png")
    page.load(through(source="file", file="black.png"))
    # somebody else's Live Camera
    page.get("""(() => { const node = LiteGraph.createNode('LiveCamera'); node.pos = [960, 60];
        app.graph.add(node) })()""")
    pressed = """[...document.querySelectorAll('.livediffusion-box button')]
        .find((b) => b.textContent === a).click()"""  # it may be out of sight
    page.wait("document.querySelectorAll('.livediffusion-box').length >= 3")
    page.get(pressed, "Try")
    page.wait("window.live.cameras() === 1")
    page.live()
    unplugged(page)
    goes_on(page)
    page.get(f"{SOURCE}.value = 'browser'")
    page.wait("window.live.cameras() >= 1")
    goes_on(page)
    # and one that it runs on does end it
    unplugged(page)
    page.wait(IDLE, 10)
    page.live()
    page.stop()
    page.get(pressed, "Off")
    page.wait(DARK, 5)


# -- an edit that does not hold -------------------------------------------------------------


def test_a_broken_edit_is_said_once_and_marked_in_nodes_2(page):
    page.nodes2(True)
    try:
        page.load(through())
        page.live()
        without_toasts(page)
        page.get(f"{SOURCE}.value = 'file'")
        page.wait(MARKED)
        page.wait(f"{TOASTS}.length === 1")
        # the edits go on and it stays broken
        refused = []
        page.page.on("response", lambda r: refused.append(r.status) if "/update" in r.url else None)
        for width in (264, 272):
            seen = len(refused)
            page.get(f"app.graph.getNodeById(1).widgets[2].value = {width}")
            limit = Limit(10)
            while len(refused) == seen:
                assert not limit.over, "no update was sent"
                page.page.wait_for_timeout(20)
        assert refused == [400, 400]
        assert len(page.get(TOASTS)) == 1
        goes_on(page)
        page.get(f"{SOURCE}.value = 'browser'")
        page.wait(f"!{MARKED}")
        page.wait("window.live.views()[0].width === 272")
        page.stop()
    finally:
        page.nodes2(False)


# -- the display ----------------------------------------------------------------------------


def test_the_display_stays_on_while_live_for_a_window_when_its_tab_is_behind_another(page):
    watch = """((one, name) => { const { wakeLock } = one.navigator, ask = wakeLock.request;
        wakeLock.request = async () => {
          const lock = await ask.call(wakeLock, 'screen').catch(() => {
            const made = new EventTarget(); // a browser without a display
            return Object.assign(made, { released: false, release: async () => {
              made.released = true; made.dispatchEvent(new Event('release')) } }) });
          window.live.locks.push([name, lock]);
          return lock } })"""
    held = "window.live.locks.filter(([, lock]) => !lock.released).map(([name]) => name).join()"
    page.get("(window.live.locks = [])")
    page.get(f"{watch}(window, 'tab')")
    page.load(through())
    assert page.get(held) == ""
    page.live()
    page.wait(f"{held} === 'tab'")
    page.get("(window.live.open = window.open, window.open = (...of) => "
             "(window.live.popup = window.live.open.apply(window, of)))")  # fmt: skip
    page.page.get_by_text("Window", exact=True).click()
    page.wait("window.live.popup")
    page.get(f"{watch}(window.live.popup, 'window')")
    page.get("""(() => {
        Object.defineProperty(document, 'hidden', { value: true, configurable: true });
        window.live.locks[0][1].release();
        document.dispatchEvent(new Event('visibilitychange')) })()""")
    page.wait(f"{held} === 'window'")
    page.get("(delete document.hidden, window.live.popup.close(), window.live.locks.pop())")
    page.wait(f"{held} === 'tab'")
    page.stop()
    page.wait(f"{held} === ''")
    page.get("(window.open = window.live.open, delete navigator.wakeLock.request)")


# -- pictures -------------------------------------------------------------------------------


def test_a_tab_that_is_hidden_between_two_refreshes_goes_on(page):
    """The server waits for what was not drawn; a hidden tab is never asked to draw."""
    page.load(through())
    page.live()
    page.get("""(() => { window.live.frame = window.requestAnimationFrame;
        window.requestAnimationFrame = () => 1 })()""")
    # both pictures that the server sends ahead are here, and drawn late: five times a second
    page.page.wait_for_timeout(500)
    now = f"[performance.now(), {FRAMES}]"
    began, there = page.get(now)
    page.page.wait_for_timeout(1000)
    at, then = page.get(now)
    assert 0 < then - there <= (at - began) / 200 + 1
    page.get("""(() => {
        Object.defineProperty(document, 'hidden', { value: true, configurable: true });
        document.dispatchEvent(new Event('visibilitychange')) })()""")
    try:
        goes_on(page)
    finally:
        page.get("""(() => { delete document.hidden;
            window.requestAnimationFrame = window.live.frame;
            document.dispatchEvent(new Event('visibilitychange')) })()""")
    page.stop()


def picture(number, size):
    data = io.BytesIO()
    Image.effect_noise((size, size), 90).save(data, "JPEG", quality=90)
    head = struct.pack("<BBHIdII", 2, 1, 0, number, 0.0, 1, number)
    return head + data.getvalue()


@contextlib.contextmanager
def sends(*messages):
    """A socket that sends these to whoever comes; yields its address."""
    loop, ready = asyncio.new_event_loop(), threading.Event()
    found = {}

    async def handle(request):
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        for message in messages:
            await ws.send_bytes(message)
        async for _ in ws:
            pass
        return ws

    async def serve():
        app = web.Application()
        app.router.add_get("/", handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        found["port"] = site._server.sockets[0].getsockname()[1]
        found["over"] = asyncio.Event()
        ready.set()
        await found["over"].wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield f"ws://127.0.0.1:{found['port']}/"
    finally:
        loop.call_soon_threadsafe(found["over"].set)
        thread.join(10)
        loop.close()


def test_pictures_keep_their_order_though_a_large_one_decodes_longer(page):
    with sends(picture(1, 4000), picture(2, 16), picture(3, 16)) as address:
        order = page.get(
            """new Promise((done) => {
              const url = [...performance.getEntriesByType('resource')].map((e) => e.name)
                .find((name) => name.includes('/live/session.mjs')).replace('session', 'worker');
              const worker = new Worker(url, { type: 'module' }), seen = [];
              worker.onmessage = ({ data }) => {
                if (data.type !== 'view') return;
                seen.push(data.seq);
                if (seen.length === 3) { worker.terminate(); done(seen) } };
              worker.postMessage({ type: 'open', url: a }) })""",
            address,
        )
    assert order == [1, 2, 3]


# -- the line to the server -----------------------------------------------------------------


class Line:
    """A way to the server that can be cut."""

    def __init__(self, port):
        self.port, self.cut, self.ends = port, False, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://localhost:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                here, _ = self.listener.accept()
                if self.cut:
                    here.close()
                    continue
                there = socket.create_connection(("127.0.0.1", self.port))
                self.ends += [here, there]
                for one, other in ((here, there), (there, here)):
                    threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    @staticmethod
    def _pass(one, other):
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def drop(self):
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.ends.clear()

    def close(self):
        self.cut = True
        self.listener.close()
        self.drop()


def test_a_line_that_breaks_for_a_moment_or_for_good(browser, site):
    line = Line(int(site.url.rpartition(":")[2]))
    near = tools.Site(line.url, site.base, site.log)
    try:
        with fresh(browser, near) as page:
            page.load(through())
            page.live()
            line.drop()
            goes_on(page, 30)  # more than were under way
            assert page.get("window.live.state()") == "live"
            assert site.json("/queue")["queue_running"]
            line.cut = True
            line.drop()
            page.wait(DARK, 5)
            page.wait(IDLE, 5)
            said = [text for text in page.get(TOASTS) if text.startswith("Live")]
            assert len(said) == 1 and "connection to ComfyUI broke" in said[0]
            limit = Limit(5)
            while site.json("/queue")["queue_running"]:
                assert not limit.over, "the server kept the run"
                time.sleep(0.05)
    finally:
        line.close()
