"""The templates open readable, and nothing covers anything, before and after a run."""

import importlib.util
import itertools
import json
import pathlib

import av
import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.comfy, pytest.mark.server]

HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("browser_tools", HERE / "conftest.py")
tools = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)

TEMPLATES = sorted(path.stem for path in (tools.ROOT / "workflows").glob("*.json"))
READABLE = 0.6  # ComfyUI draws no text below 8 of 14 pixels, 0.571
SETTLES = 250  # ms between two looks that see the same
NOTES = {"Read me", "Looks"}
SEEN = {"width": 1440, "height": 800}

# nodes with their titles and what widgets show, in pixels of the screen
BOXES = """app.graph.nodes.map((n) => {
  const { offset, scale } = app.canvas.ds, [x, y, w, h] = n.boundingRect;
  const boxes = [{ left: (x + offset[0]) * scale, top: (y + offset[1]) * scale }];
  Object.assign(boxes[0], { right: boxes[0].left + w * scale, bottom: boxes[0].top + h * scale });
  for (const { element } of n.widgets ?? [])
    if (element?.isConnected && element.offsetParent) boxes.push(element.getBoundingClientRect());
  return [n.title, ...['left', 'top'].map((side) => Math.min(...boxes.map((b) => b[side]))),
    ...['right', 'bottom'].map((side) => Math.max(...boxes.map((b) => b[side])))] })"""
ELEMENTS = """[...document.querySelectorAll('[data-node-id]')].map((e) => {
    const { left, top, right, bottom } = e.getBoundingClientRect();
    return [app.graph.getNodeById(Number(e.dataset.nodeId)).title, left, top, right, bottom] })"""

# ComfyUI's map of the graph, over the canvas in a corner
MAP = """(({ left, top, right, bottom }) => ['map', left, top, right, bottom])(
    document.querySelector('.minimap-main-container').getBoundingClientRect())"""

# what a run shows on nodes: pictures, films, and the steps of a schedule with all it can say
RUN = """(() => {
  const steps = { levels: [14.6, 4, 0.7, 0], others: { simple: [14.6, 2, 0], beta: [14.6, 3, 0] },
    lines: ['RMSE to 100 steps: 0.21'] };
  const files = { LoadImage: ['image', 'shown.png'], LoadVideo: ['file', 'shown.mp4'] };
  for (const node of app.graph.nodes) {
    const output = /^Live(Strength|Timesteps)$/.test(node.comfyClass)
      ? { livediffusion_steps: [JSON.stringify(steps)] }
      : { images: [{ filename: node.comfyClass === 'SaveVideo' ? 'shown.mp4' : 'shown.png',
            subfolder: '', type: 'input' }],
          ...(node.comfyClass === 'SaveVideo' && { animated: [true] }) };
    const [name, file] = files[node.comfyClass] ?? [];
    const widget = node.widgets?.find((w) => w.name === name);
    if (widget) { widget.options.values = [file]; widget.value = file; widget.callback?.(file) }
    else if (/^(PreviewImage|SaveVideo|Live(Strength|Timesteps))$/.test(node.comfyClass))
      app.api.dispatchCustomEvent('executed',
        { node: String(node.id), display_node: String(node.id), output, prompt_id: 'shown' });
  }
  app.canvas.setDirty(true, true);
})()"""


# what its schema refuses is told on the page
TOLD = "window.live.toasts().filter((said) => /schema|valid version|link/i.test(said))"


@pytest.fixture
def wide(page, site):
    """The page at the size of a small notebook, with files to be shown."""
    Image.new("RGB", (512, 512), "teal").save(site.base / "input" / "shown.png")
    with av.open(str(site.base / "input" / "shown.mp4"), "w") as film:
        stream = film.add_stream("h264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 256, 256, "yuv420p"
        for grey in range(0, 240, 30):
            picture = np.full((256, 256, 3), grey, np.uint8)
            film.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        film.mux(stream.encode())
    before = page.page.viewport_size
    page.page.set_viewport_size(SEEN)
    yield page
    page.page.set_viewport_size(before)
    page.nodes2(False)
    minimap(page, False)
    validated(page, False)


def validated(page, on):
    """Whether the frontend looks at each workflow that it opens."""
    page.get("app.extensionManager.setting.set('Comfy.Validation.Workflows', a)", on)


def refusals(page):
    """What the frontend says of a workflow that is not as its schema has it."""
    return page.get(TOLD) + [said for _, said, _ in page.noise if "zod" in said.lower()]


def minimap(page, on):
    page.get("app.extensionManager.setting.set('Comfy.Minimap.Visible', a)", on)


def lying(boxes):
    """Which nodes lie on each other."""
    return [
        (one[0], other[0])
        for one, other in itertools.combinations(boxes, 2)
        if one[1] < other[3] and other[1] < one[3] and one[2] < other[4] and other[2] < one[4]
    ]


def settled(page, boxes):
    """Where everything is once previews have taken their place."""
    before = None
    for _ in range(20):
        page.page.wait_for_timeout(SETTLES)
        now = page.get(boxes)
        if now == before:
            return now
        before = now
    raise AssertionError(f"it does not come to rest: {now}")


def test_a_template_opens_readable_and_has_room_for_what_a_run_shows(wide, request):
    wrong = {}
    # on, unless the user has put it away
    minimap(wide, True)
    validated(wide, True)
    # that it would be told
    bad = {**tools.through(), "last_link_id": None}
    wide.get("app.loadGraphData(a)", bad)
    wide.wait(f"({TOLD}).length")
    wide.get("window.live.untoast()")
    wide.wait(f"!({TOLD}).length")
    for name in TEMPLATES:
        graph = json.loads((tools.ROOT / "workflows" / f"{name}.json").read_text("utf-8"))
        wide.get("app.loadGraphData(a, true, true, null, { openSource: 'template' })", graph)
        boxes = settled(wide, BOXES)
        wrong[name, "schema"] = refusals(wide)
        wide.wait("document.querySelector('.minimap-main-container')")
        wrong[name, "before"] = lying(boxes)
        wrong[name, "map"] = [
            p for p in lying([*boxes, wide.get(MAP)]) if p[1] == "map" and p[0] not in NOTES
        ]
        scale, unseen = wide.get("[app.canvas.ds.scale, app.canvas.low_quality]")
        wrong[name, "scale"] = scale < READABLE or unseen
        wide.get(RUN)
        wrong[name, "after"] = lying(settled(wide, BOXES))
        # Nodes 2.0 draws the same nodes taller
        wide.nodes2(True)
        wide.wait(f"{ELEMENTS}.length === {len(graph['nodes'])}")
        wrong[name, "nodes 2.0"] = lying(settled(wide, ELEMENTS))
        if shot := request.config.getoption("--basetemp", None):
            wide.page.screenshot(path=f"{shot}-{name}.png")
        wide.nodes2(False)
    assert not {place: what for place, what in wrong.items() if what}
