"""ComfyUI's App mode: the chosen inputs and outputs, and no canvas."""

import importlib.util
import pathlib

import pytest

pytestmark = [pytest.mark.comfy, pytest.mark.server]

HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("browser_tools", HERE / "conftest.py")
tools = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)

TOGGLE = "void app.extensionManager.command.execute('Comfy.ToggleLinear')"
MIDDLE = "document.querySelector('[data-testid=linear-center-panel]')"
BUTTON = ".livediffusion-run"
FRAMES = "Number(window.live.views()[0].dataset.frames)"


def inside(page):
    """Whether the picture fills most of the middle."""
    return page.get(f"""(() => {{ const all = {MIDDLE}.getBoundingClientRect();
        const one = document.querySelector('.livediffusion-compare').getBoundingClientRect();
        return one.left >= all.left && one.right <= all.right && one.bottom <= all.bottom
          && one.width * one.height > 0.6 * all.width * all.height }})()""")


@pytest.mark.parametrize("nodes2", [False, True], ids=["canvas", "nodes 2.0"])
def test_live_in_app_mode(page, nodes2):
    page.nodes2(nodes2)
    graph = tools.through()
    inputs = [[1, "livediffusion_camera"], [1, "width"]]
    graph["extra"] = {"linearData": {"inputs": inputs, "outputs": [2]}}
    page.load(graph)
    page.get(TOGGLE)
    try:
        page.wait(f"{MIDDLE} && document.querySelector('.livediffusion-app canvas')")
        page.page.click(BUTTON)
        page.wait(f"{FRAMES} > 3")
        assert page.get(f"document.querySelector('{BUTTON}').innerText") == "Stop"
        assert inside(page)
        # the picker is there and shows what the camera sees
        shown = page.page.locator("[data-testid=linear-widgets] .livediffusion-screen canvas")
        assert shown.is_visible() and shown.bounding_box()["width"] > 100
        # an edit made there
        page.get("app.graph.getNodeById(1).widgets[2].value = 264")
        page.wait("window.live.views()[0].width === 264")
        # back on the canvas and there again, the run goes on
        page.get(TOGGLE)
        page.wait(f"!document.querySelector('.livediffusion-app, {BUTTON}')")
        page.wait("window.live.views()[0].getBoundingClientRect().width > 100")
        frames = page.get(FRAMES)
        page.wait(f"{FRAMES} > {frames + 5}")
        page.get(TOGGLE)
        page.wait("document.querySelector('.livediffusion-app canvas')")
        page.wait(f"document.querySelector('{BUTTON}')?.innerText === 'Stop'")
        page.page.click(BUTTON)
        page.wait("window.live.state() === 'idle'")
        assert page.get("window.live.cameras()") == 0
    finally:
        if page.get(f"!!{MIDDLE}"):
            page.get(TOGGLE)
        page.nodes2(False)
    assert not page.ours
