"""Edits while live, from the hand to the server: dragged, and over a line that fails."""

import importlib.util
import pathlib

import pytest
from clock import Limit

pytestmark = [pytest.mark.comfy, pytest.mark.server]

HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("browser_tools", HERE / "conftest.py")
tools = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)
through = tools.through

# the middle of Live Camera's width on the screen, on the canvas of the older nodes
WIDTH = """(() => { const node = app.graph.getNodeById(1), { ds } = app.canvas;
    const w = node.widgets.find((w) => w.name === 'width');
    const box = app.canvas.canvas.getBoundingClientRect();
    return [node.pos[0] + node.size[0] / 2, node.pos[1] + w.last_y + 10]
      .map((at, i) => (at + ds.offset[i]) * ds.scale + [box.left, box.top][i]) })()"""


def test_a_number_that_is_dragged_on_the_canvas_is_followed(page):
    page.load(through())
    page.live()
    sent = []
    page.page.on("request", lambda r: sent.append(r.url) if "/update" in r.url else None)
    x, y = page.get(WIDTH)
    mouse = page.page.mouse
    mouse.move(x, y)
    mouse.down()
    try:
        limit = Limit(10)
        for step in range(1000):
            mouse.move(x + step % 100, y)
            page.page.wait_for_timeout(15)
            if len(sent) >= 5:
                break
            assert not limit.over, sent
        # a second gives two looks at the most to whoever sees no more than the clock's
        assert step < 150, (step, len(sent))
    finally:
        mouse.up()
    page.wait("window.live.views()[0].width === "
              "app.graph.getNodeById(1).widgets.find((w) => w.name === 'width').value")  # fmt: skip
    page.stop()


@pytest.mark.parametrize("outage", ["no answer", 502])
def test_an_edit_of_an_outage_arrives_after_it(page, outage):
    page.load(through())
    page.live()
    page.get("window.live.untoast()")
    page.wait("window.live.toasts().length === 0")
    tries = []

    def fail(route):
        tries.append(route.request.url)
        route.abort() if outage == "no answer" else route.fulfill(status=outage, body="no")

    page.page.route("**/livediffusion/update*", fail)
    page.get("app.graph.getNodeById(1).widgets[2].value = 264")
    limit = Limit(20)
    while len(tries) < 3:
        assert not limit.over, tries
        page.page.wait_for_timeout(20)
    said = page.get("window.live.toasts()")
    assert len(said) == 1 and "It is sent again" in said[0]
    page.page.unroute("**/livediffusion/update*")
    page.wait("window.live.views()[0].width === 264")
    page.stop()
