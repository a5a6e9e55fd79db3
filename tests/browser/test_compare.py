"""The Live View's compare switch, by the pixels on the screen."""

import importlib.util
import io
import pathlib

import numpy as np
import pytest
from livediffusion.live.pictures import Shape, fitted
from PIL import Image

pytestmark = [pytest.mark.comfy, pytest.mark.server]

HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("browser_tools", HERE / "conftest.py")
tools = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)

FRAMES = "Number(window.live.views()[0]?.dataset.frames ?? 0)"
SHOWN = "document.querySelector('.livediffusion-screen[data-compare]').dataset.compare"
SIZE = 256
NEAR = 0.02  # of the width: the line's own, and blocks whose edges are grey


def inverted(properties=None, mirror=True):
    """The camera's frames as a negative: input and output tell their frame, and are no alike."""
    camera = ["browser", "none", SIZE, SIZE, "crop", 30, mirror, True]
    made = tools.workflow(
        {
            1: ("LiveCamera", [60, 60], [320, 480], camera, [],
                [("image", "IMAGE"), ("frame", "INT")]),
            2: ("LiveView", [460, 60], [460, 560], [95, False, "live/recording"],
                [("image", "IMAGE")], []),
            3: ("ImageInvert", [60, 600], [200, 50], [], [("image", "IMAGE")],
                [("IMAGE", "IMAGE")]),
        },
        [(1, 0, 3, 0), (3, 0, 2, 0)],
    )  # fmt: skip
    made["nodes"][1]["properties"] = properties or {}
    return made


def choose(page, mode):
    page.page.click(f"button[data-mode='{mode}']")


def compared(page, mode):
    """Wait until pictures are shown beside their input."""
    page.wait(f"{SHOWN} === {mode!r}")


def canvas(page, kind):
    """What is in a canvas, [H, W] of greys."""
    width, values = page.get(
        """(() => { const c = document.querySelector(`.livediffusion-${a} canvas`);
          const { data } = c.getContext('2d').getImageData(0, 0, c.width, c.height);
          return [c.width, [...data].filter((_, i) => i % 4 === 1)] })()""",
        kind,
    )
    return np.array(values).reshape(-1, width)


def stage(page):
    """What is on the screen where the pictures are: [H, W] of greys, and its box."""
    box = page.get("document.querySelector('.livediffusion-stage').getBoundingClientRect()")
    clip = {name: box[name] for name in ("x", "y", "width", "height")}
    shot = Image.open(io.BytesIO(page.page.screenshot(clip=clip)))
    return np.asarray(shot.convert("L")).astype(float), box


def expected(page, height, width):
    """The camera's frame as the graph saw it, by the number that the input carries."""
    number = tools.read_counter(canvas(page, "input")[:, ::-1])
    assert number is not None
    frame = fitted(tools.counter_picture(number), Shape(SIZE, SIZE, "crop", True))
    return np.asarray(Image.fromarray(frame).convert("L").resize((width, height))).astype(float)


def rows(picture):
    """The rows of the blocks, away from their edges and from the handle in the middle."""
    height = picture.shape[0]
    return picture[int(0.11 * height) : int(0.22 * height)]


def away(one, other):
    """How far two pictures differ, column by column."""
    return np.abs(rows(one) - rows(other)).mean(0)


def border(page):
    """Where input becomes output, 0 to 1 from the left."""
    picture, _ = stage(page)
    frame = expected(page, *picture.shape)
    is_input = away(picture, frame) < away(picture, 255 - frame)
    place = int(is_input.sum())
    columns = np.arange(len(is_input))
    wrong = (is_input != (columns < place)) & (away(frame, 255 - frame) > 200)
    # the line itself is neither, and at a block's edge the negative is as the frame
    assert not (wrong & (abs(columns - place) > 6)).any(), (place, np.flatnonzero(wrong))
    return place / len(is_input)


def still(page):
    """Live for a few pictures, then stopped, with the last pair on the screen."""
    page.live()
    page.wait(f"{FRAMES} >= 5 && {SHOWN} !== 'off'")
    page.stop()


def drag(page, begin, end, at=0.7):
    """With the mouse, from one place on the picture to another; parts of its width."""
    box = stage(page)[1]
    y = box["y"] + at * box["height"]
    page.page.mouse.move(box["x"] + begin * box["width"], y)
    page.page.mouse.down()
    for part in (0.3, 0.6, 1):
        page.page.mouse.move(box["x"] + (begin + part * (end - begin)) * box["width"], y)
    page.page.mouse.up()


@pytest.mark.parametrize("nodes2", [False, True], ids=["canvas", "nodes 2.0"])
def test_a_line_between_input_and_output(page, nodes2):
    page.nodes2(nodes2)
    try:
        page.load(inverted())
        assert page.get(SHOWN) == "off"
        page.live()
        choose(page, "line")
        compared(page, "line")
        page.stop()
        # one frame, once as it was seen and once as it became
        assert np.abs(canvas(page, "input") + canvas(page, "output") - 255).mean() < 3
        assert border(page) == pytest.approx(0.5, abs=NEAR)
        position = page.get("[...app.graph.getNodeById(2).pos]")
        drag(page, 0.5, 0.25)  # by the line
        assert border(page) == pytest.approx(0.25, abs=NEAR)
        drag(page, 0.6, 0.85, at=0.4)  # from anywhere: the line comes along
        assert border(page) == pytest.approx(0.85, abs=NEAR)
        # a click moves nothing, and neither does what is not pressed
        box = stage(page)[1]
        page.page.mouse.click(box["x"] + 20, box["y"] + 20)
        page.page.mouse.move(box["x"] + 90, box["y"] + 90)
        assert border(page) == pytest.approx(0.85, abs=NEAR)
        assert page.get("[...app.graph.getNodeById(2).pos]") == position
    finally:
        page.nodes2(False)
    assert not page.ours


def test_the_line_ends_at_the_edges_and_is_a_slider(page):
    page.load(inverted({"compare": "line"}))
    still(page)
    slider = page.page.get_by_role("slider", name="Line between input and output")
    assert slider.get_attribute("aria-valuenow") == "50"
    slider.focus()
    position = page.get("[...app.graph.getNodeById(2).pos]")
    for keys, value in (
        (["ArrowLeft"] * 5, 40), (["ArrowRight", "ArrowUp"], 44), (["Shift+ArrowRight"], 54),
        (["PageDown"], 44), (["Home"], 0), (["ArrowLeft"], 0), (["End"], 100),
    ):  # fmt: skip
        for key in keys:
            page.page.keyboard.press(key)
        assert slider.get_attribute("aria-valuenow") == str(value)
        assert border(page) == pytest.approx(value / 100, abs=NEAR)
    drag(page, 0.5, -0.4)
    assert border(page) < 0.015
    # dragged out of the picture, it is still there to be taken
    drag(page, 0.02, 0.3)
    assert border(page) == pytest.approx(0.3, abs=0.03)
    assert page.get("[...app.graph.getNodeById(2).pos]") == position
    assert page.get("app.graph.nodes.length") == 3


def test_a_finger_moves_the_line(page):
    page.load(inverted({"compare": "line"}))
    still(page)
    box = stage(page)[1]
    touch = page.page.context.new_cdp_session(page.page)

    def event(kind, *at):
        points = [{"x": box["x"] + x * box["width"], "y": box["y"] + 0.7 * box["height"]}
                  for x in at]  # fmt: skip
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    event("touchStart", 0.5)
    for x in (0.55, 0.65, 0.75):
        event("touchMove", x)
    event("touchEnd")
    touch.detach()
    assert border(page) == pytest.approx(0.75, abs=NEAR)


def test_the_line_follows_the_pointer_where_the_canvas_is_zoomed(page):
    page.load(inverted({"compare": "line"}))
    still(page)
    page.get("(app.canvas.ds.scale = 0.6, app.canvas.setDirty(true, true))")
    page.page.wait_for_timeout(200)
    try:
        drag(page, 0.5, 0.3)
        assert border(page) == pytest.approx(0.3, abs=NEAR)
    finally:
        page.get("(app.canvas.ds.scale = 1, app.canvas.setDirty(true, true))")


def test_side_by_side_and_off_again(page):
    page.load(inverted())
    page.live()
    choose(page, "side by side")
    compared(page, "side by side")
    page.stop()
    picture, box = stage(page)
    assert box["width"] == pytest.approx(2 * box["height"], rel=0.01)
    middle = picture.shape[1] // 2
    for half, wanted in ((picture[:, : middle - 2], "input"), (picture[:, middle + 2 :], "output")):
        frame = expected(page, *half.shape)
        frame = frame if wanted == "input" else 255 - frame
        assert away(half, frame).mean() < 12 < 60 < away(half, 255 - frame).mean(), wanted
    choose(page, "off")
    picture, box = stage(page)
    assert box["width"] == pytest.approx(box["height"], rel=0.01)
    frame = 255 - expected(page, *picture.shape)
    assert away(picture, frame).mean() < 12
    assert page.get("document.querySelector('.livediffusion-input').offsetParent === null")
    assert page.get("app.graph.getNodeById(2).properties.compare") is None
    assert not page.ours


def test_each_picture_stands_beside_its_own_frame_while_live(page):
    """Looked at between pictures: input and output always carry the same number."""
    page.load(inverted({"compare": "line"}))
    page.live()
    compared(page, "line")
    seen = set()
    for _ in range(15):
        both = page.get(
            """['input', 'output'].map((kind) => {
              const c = document.querySelector(`.livediffusion-${kind} canvas`);
              const small = new OffscreenCanvas(96, 96).getContext('2d');
              small.drawImage(c, 0, 0, 96, 96);
              return [...small.getImageData(0, 0, 96, 96).data].filter((_, i) => i % 4 === 1) })"""
        )
        before, after = (np.array(greys).reshape(96, 96)[:, ::-1] for greys in both)
        number = tools.read_counter(before)
        assert number == tools.read_counter(255 - after)
        seen.add(number)
        # pictures, not time: a busy machine draws few
        page.wait(f"{FRAMES} > {page.get(FRAMES)}")
    page.stop()
    assert len(seen - {None}) >= 5
    assert not page.ours


def test_the_workflow_keeps_it_and_a_second_run_goes_on(page):
    page.load(inverted())
    choose(page, "line")
    still(page)
    drag(page, 0.5, 0.25)
    saved = page.get("app.graph.serialize()")
    kept = next(n for n in saved["nodes"] if n["id"] == 2)["properties"]
    assert kept["compare"] == "line" and kept["compare_at"] == pytest.approx(0.25, abs=0.01)
    # the graph that runs knows nothing of it
    sent = page.get("app.graphToPrompt().then((graph) => graph.output['2'].inputs)")
    assert set(sent) == {"image", "quality", "record", "filename_prefix"}
    page.load(saved)
    assert page.get("document.querySelector(\"[data-mode='line']\").ariaPressed") == "true"
    still(page)
    assert border(page) == pytest.approx(0.25, abs=NEAR)
    # another run of the same page, and one with nothing to compare
    still(page)
    assert border(page) == pytest.approx(0.25, abs=NEAR)
    page.get("app.queuePrompt(0)")
    page.wait(f"{SHOWN} === 'off'")
    page.wait("document.querySelector('.livediffusion-note').textContent.includes('while live')")
    assert not page.ours


@pytest.mark.parametrize("kept", [{"compare": "<img src=x onerror=alert(1)>"},
                                  {"compare": 3, "compare_at": "0.9"},
                                  {"compare": "line", "compare_at": "red"},
                                  {"compare": "line", "compare_at": 1e9}])  # fmt: skip
def test_what_a_strange_workflow_says_is_not_believed(page, kept):
    page.load(inverted(kept))
    known = kept["compare"] == "line"
    pressed = page.get("document.querySelector('.livediffusion-choice[aria-pressed=true]')"
                       ".dataset.mode")  # fmt: skip
    assert pressed == ("line" if known else "off")
    at = {1e9: 100}.get(kept.get("compare_at"), 50)
    assert page.get("document.querySelector('[role=slider]').ariaValueNow") == str(at)
    assert not page.ours


def test_its_window_compares_too(page):
    page.load(inverted({"compare": "line"}))
    page.live()
    compared(page, "line")
    with page.page.expect_popup() as opened:
        page.page.get_by_text("Window", exact=True).click()
    popup = opened.value
    popup.wait_for_function("() => document.querySelector('[data-compare=line]')")
    handle = popup.locator("[role=slider]").bounding_box()
    full = popup.viewport_size or popup.evaluate("({ width: innerWidth, height: innerHeight })")
    assert handle["height"] == pytest.approx(min(full["width"], full["height"]), abs=2)
    popup.mouse.move(handle["x"] + 22, handle["y"] + 60)
    popup.mouse.down()
    popup.mouse.move(handle["x"] + 102, handle["y"] + 60)
    popup.mouse.up()
    at = 0.5 + 80 / handle["height"]
    assert page.get("app.graph.getNodeById(2).properties.compare_at") == pytest.approx(at, abs=0.01)
    page.stop()
    assert border(page) == pytest.approx(at, abs=NEAR)
    # closed, the node goes on alone; deleted while compared, nothing is left of it
    popup.close()
    still(page)
    page.live()
    page.get("app.graph.remove(app.graph.getNodeById(2))")
    page.wait("window.live.cameras() === 0", 5)
    page.wait("window.live.state() === 'idle'")
    assert not page.ours
