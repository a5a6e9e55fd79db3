"""A real ComfyUI with the pack, and Debian's Chromium with a camera that plays a file."""

import contextlib
import json
import pathlib
import urllib.request

import av
import limits
import numpy as np
import pytest
from chromium import launch
from clock import Limit
from serving import serving

ROOT = pathlib.Path(__file__).resolve().parents[2]
BITS = 12
LAP = 400


def counter_picture(number, width=640, height=480):
    """A frame that carries its number as a row of black and white blocks, low bit first.

    The blocks lie inside the square that a crop keeps, and survive resizing and JPEG.
    """
    picture = np.full((height, width, 3), 128, np.uint8)
    left, block = (width - height) // 2, height // BITS
    for bit in range(BITS):
        x = left + bit * block
        picture[block : 3 * block, x : x + block] = 255 * (number >> bit & 1)
    return picture


def read_counter(pixels):
    """The number in a picture [H, W] of greys, or None where it cannot be read."""
    size = pixels.shape[0]
    block = size / BITS
    number = 0
    for bit in range(BITS):
        left = int((bit + 0.3) * block)
        across = slice(left, left + max(1, int(0.4 * block)))
        grey = float(pixels[int(1.5 * block) : int(2.5 * block), across].mean())
        if 80 < grey < 176:
            return None
        number |= (grey > 128) << bit
    return number


@pytest.fixture(scope="session")
def camera_file(tmp_path_factory):
    """LAP numbered frames at 20 per second, as a fake camera plays them, again and again."""
    path = tmp_path_factory.mktemp("camera") / "counter.mjpeg"
    with av.open(str(path), "w", format="mjpeg") as film:
        stream = film.add_stream("mjpeg", rate=20)
        stream.width, stream.height, stream.pix_fmt = 640, 480, "yuvj420p"
        for number in range(LAP):
            frame = av.VideoFrame.from_ndarray(counter_picture(number), format="rgb24")
            film.mux(stream.encode(frame))
        film.mux(stream.encode())
    return path


class Site:
    """The server under test."""

    def __init__(self, url, base, log):
        self.url, self.base, self.log = url, base, log

    def json(self, path, data=None):
        body = None if data is None else json.dumps(data).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, body, headers)
        with urllib.request.urlopen(request, timeout=30) as reply:
            text = reply.read()
        return json.loads(text) if text else None


@pytest.fixture(scope="session")
def site(comfyui, tmp_path_factory):
    base = tmp_path_factory.mktemp("browser")
    settings = base / "user" / "default"
    settings.mkdir(parents=True)
    # a page of a user who has seen ComfyUI before: no tour, no dialog over the canvas
    (settings / "comfy.settings.json").write_text(
        json.dumps({"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False,
                    "Comfy.InstalledVersion": "1.45.19",
                    "Comfy.OnboardingCoachmarks.Seen": ["appMode", "firstRun"]}),
        encoding="utf-8",
    )  # fmt: skip
    with serving(comfyui, base) as (port, _, log):
        # a page may use the camera on localhost only
        yield Site(f"http://localhost:{port}", base, log)


def context_of(browser):
    """Pages in a context share what they have loaded."""
    context = browser.new_context(viewport={"width": 1400, "height": 800}, permissions=["camera"])
    context.add_init_script(WATCH)
    return context


class Shared:
    """The browser that most tests share, and its page; a new one after a test that hung in it."""

    def __init__(self, *made_of):
        self._made_of = made_of
        self._running = self._process = self._context = self._page = None
        self._hangs = limits.count

    @property
    def hung(self):
        """Whether a test has hung since it was opened, or it is gone."""
        return self._hangs != limits.count or not self._running.is_connected()

    def context(self):
        if self._running is None or self.hung:
            self.end()
            self._running, self._process = launch(*self._made_of)
            self._context, self._page, self._hangs = context_of(self._running), None, limits.count
        return self._context

    def page(self, site):
        context = self.context()
        if self._page is None:
            self._page = Page(context.new_page(), site)
        return self._page

    def end(self):
        if self._running is None:
            return
        if self.hung:  # who hangs does not close
            self._process.kill()
        else:
            self._running.close()


@pytest.fixture(scope="session")
def shared(playwright, camera_file):
    made = Shared(playwright, camera_file)
    yield made
    made.end()


@pytest.fixture
def browser(shared):
    return shared.context()


# what a page keeps of itself for the tests: sockets, open cameras, drawn pictures
WATCH = """
window.live = { tracks: [], sockets: 0, drawn: [] };
const get = navigator.mediaDevices?.getUserMedia?.bind(navigator.mediaDevices);
if (get) navigator.mediaDevices.getUserMedia = async (wish) => {
  const stream = await get(wish);
  window.live.tracks.push(...stream.getTracks());
  return stream;
};
const clone = MediaStreamTrack.prototype.clone;
MediaStreamTrack.prototype.clone = function () {
  const made = clone.call(this);
  window.live.tracks.push(made);
  return made;
};
window.live.cameras = () => window.live.tracks.filter((t) => t.readyState === 'live').length;
window.live.state = () => document.querySelector('.livediffusion-live')?.dataset.state;
window.live.views = () => [...document.querySelectorAll('canvas[data-frames]')];
// newer frontends have toasts of their own
window.live.boxes = () =>
  [...document.querySelectorAll('.p-toast-message, ol > li[data-state=open]')];
window.live.toasts = () => window.live.boxes().map((e) => e.innerText);
window.live.untoast = () => window.live.boxes().forEach((e) =>
  e.querySelector('.p-toast-close-button, [aria-label=Close]')?.click());
window.live.watch = () => {
  window.live.drawn = [];
  const [canvas] = window.live.views();
  const small = new OffscreenCanvas(96, 96).getContext('2d', { willReadFrequently: true });
  new MutationObserver(() => {
    small.drawImage(canvas, 0, 0, 96, 96);
    const { data } = small.getImageData(0, 0, 96, 96);
    const greys = [];
    for (let i = 0; i < data.length; i += 4) greys.push(data[i + 1]);
    window.live.drawn.push({ ...canvas.dataset, greys });
  }).observe(canvas, { attributes: true, attributeFilter: ['data-seq'] });
};
"""


class Page:
    """A page of ComfyUI and what it said to the console."""

    def __init__(self, page, site):
        self.page, self.site = page, site
        self.noise = []
        page.on("console", lambda m: self.noise.append((m.type, m.text, m.location.get("url", ""))))
        page.on("pageerror", lambda e: self.noise.append(("error", str(e), "page")))

    def open(self, query=""):
        self.page.goto(self.site.url + "/" + query)
        # ComfyUI loads a graph of its own first, which would take the place of ours
        self.wait("window.app?.extensionManager?.workflow?.activeWorkflow")
        self.wait("document.querySelector('.livediffusion-live')")

    def wait(self, condition, seconds=40):
        limit = Limit(seconds)
        try:
            while True:
                try:
                    self.page.wait_for_function(f"() => {condition}", timeout=1000 * seconds)
                    return
                except Exception as error:
                    # Playwright's own, which is imported late
                    if type(error).__name__ != "TimeoutError" or limit.over:
                        raise
        except Exception as error:
            there = self.page.evaluate(
                """() => [window.live.state(), window.live.cameras(),
                  window.live.views().map((v) => ({ ...v.dataset })),
                  window.live.toasts(),
                  (app.rootGraph ?? app.graph).nodes.flatMap((n) => n.widgets ?? [])
                    .map((w) => w.element?.querySelector?.('canvas[data-frames]'))
                    .filter(Boolean).map((c) => [c.isConnected, { ...c.dataset }])]"""
            )
            raise AssertionError(f"not so: {condition}; there is {there}") from error

    def get(self, expression, *args):
        return self.page.evaluate(f"(a) => {expression}", *args)

    def load(self, workflow):
        self.get("window.app.loadGraphData(a)", workflow)
        # the view of the workflow before is gone, and no picture has come yet
        self.wait("window.live.views()[0]?.dataset.frames === '0'")

    def nodes2(self, on):
        self.get("window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', a)", on)

    def live(self):
        """Press Live and wait for pictures."""
        self.page.click(".livediffusion-live")
        self.wait("window.live.state() === 'live'")
        self.wait("Number(window.live.views()[0].dataset.frames) > 0")

    def stop(self):
        if self.get("window.live.state()") not in ("idle", "stopping"):
            self.page.click(".livediffusion-live")
        self.wait("window.live.state() === 'idle'")

    @property
    def ours(self):
        """Console messages that come from our files or speak of us.

        Chrome's own complaint of a camera frame lost inside its stream when the camera stops is
        not among them: on a busy machine it comes now and then, whoever reads the stream.
        """
        return [n for n in self.noise if "livediffusion" in (n[1] + n[2]).lower()
                or "Unknown message type" in n[1]]  # fmt: skip


@pytest.fixture
def page(shared, site):
    """The page that most tests share, idle; opening one takes seconds."""
    first = shared.page(site)
    if not first.page.url.startswith(first.site.url):
        first.open()
    first.noise.clear()
    yield first
    if shared.hung or not first.page.url.startswith(first.site.url):
        return
    if first.get("window.live.state()") != "idle":
        first.stop()


class Spare:
    """A second browser, whose camera has several modes, and its page; it may be killed."""

    def __init__(self, playwright, site):
        self.browser, self._process = launch(playwright)
        self.page = Page(context_of(self.browser).new_page(), site)
        self.page.open()

    def kill(self):
        """Every process of it; returns how many they were."""
        processes = [self._process, *self._process.children(recursive=True)]
        for process in processes:
            process.kill()
        return len(processes)


@pytest.fixture(scope="session")
def spare(playwright, site):
    """Opening a browser takes seconds; whoever kills it is the last to use it."""
    made = Spare(playwright, site)
    yield made
    if made.browser.is_connected():
        made.browser.close()


@contextlib.contextmanager
def fresh(browser, site):
    """A page of its own."""
    made = Page(browser.new_page(), site)
    try:
        made.open()
        yield made
    finally:
        made.page.close()


def workflow(nodes, links):
    """A workflow as the frontend saves it. nodes: id -> (class, pos, size, values)."""
    made = {"last_node_id": 99, "last_link_id": 99, "nodes": [], "links": [], "groups": [],
            "config": {}, "extra": {}, "version": 0.4}  # fmt: skip
    for id, (kind, pos, size, values, inputs, outputs) in nodes.items():
        made["nodes"].append(
            {
                "id": id, "type": kind, "pos": pos, "size": size, "flags": {}, "order": id,
                "mode": 0, "properties": {}, "widgets_values": values,
                "inputs": [{"name": n, "type": t, "link": None} for n, t in inputs],
                "outputs": [{"name": n, "type": t, "links": []} for n, t in outputs],
            }
        )  # fmt: skip
    by_id = {node["id"]: node for node in made["nodes"]}
    for number, (source, out, target, place) in enumerate(links, 1):
        kind = by_id[source]["outputs"][out]["type"]
        by_id[source]["outputs"][out]["links"].append(number)
        by_id[target]["inputs"][place]["link"] = number
        made["links"].append([number, source, out, target, place, kind])
    return made


def through(**settings):
    """Live Camera straight to Live View: the picture passes unchanged."""
    values = {"source": "browser", "file": "none", "width": 256, "height": 256, "fit": "crop",
              "fps": 30, "mirror": False, "loop": True}  # fmt: skip
    camera = list((values | settings).values())
    return workflow(
        {
            1: ("LiveCamera", [60, 60], [320, 480], camera, [],
                [("image", "IMAGE"), ("frame", "INT")]),
            2: ("LiveView", [460, 60], [420, 560], [90, False, "live/recording"],
                [("image", "IMAGE")], []),
        },
        [(1, 0, 2, 0)],
    )  # fmt: skip
