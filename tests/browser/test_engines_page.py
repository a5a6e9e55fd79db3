"""Live Compile says on its node what it took, and why calls ran otherwise."""

import importlib.util
import pathlib

import pytest

pytestmark = [pytest.mark.comfy, pytest.mark.server]

HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("browser_tools", HERE / "conftest.py")
tools = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)


def graph(freeu):
    """The bundled model on an engine, with or without a node that patches the UNet."""
    ends = [("model", "MODEL"), ("clip", "CLIP"), ("vae", "VAE")]
    sampler = [("model", "MODEL"), ("positive", "CONDITIONING"), ("negative", "CONDITIONING"),
               ("latent_image", "LATENT")]  # fmt: skip
    cond, latent = [("CONDITIONING", "CONDITIONING")], [("LATENT", "LATENT")]
    values = [0, "fixed", 2, 1.0, "euler", "normal", 1.0]
    nodes = {
        1: ("LiveDemoModel", [20, 20], [240, 70], [], [], ends),
        2: ("CLIPTextEncode", [20, 160], [240, 100], ["blueprint"], [("clip", "CLIP")], cond),
        3: ("EmptyLatentImage", [20, 340], [240, 110], [64, 64, 1], [], latent),
        4: ("LiveCompile", [320, 20], [300, 160], ["onnxruntime"], [("model", "MODEL")],
            [("model", "MODEL")]),
        5: ("KSampler", [680, 20], [280, 260], values, sampler, latent),
        6: ("PreviewAny", [1000, 20], [200, 100], [], [("source", "*")], [("STRING", "STRING")]),
    }  # fmt: skip
    links = [(1, 0, 4, 0), (1, 1, 2, 0), (2, 0, 5, 1), (2, 0, 5, 2), (3, 0, 5, 3), (5, 0, 6, 0)]
    if freeu:
        nodes[7] = ("FreeU", [680, 340], [280, 130], [1.1, 1.2, 0.9, 0.2], [("model", "MODEL")],
                    [("MODEL", "MODEL")])  # fmt: skip
        links += [(4, 0, 7, 0), (7, 0, 5, 0)]
    else:
        links += [(4, 0, 5, 0)]
    return tools.workflow(nodes, links)


def said(page):
    """Everything that stands on the Live Compile node."""
    return page.get("""(app.graph.getNodeById(4).widgets || []).map((w) => w.name === 'engine'
        ? '' : (w.value ?? w.element?.innerText ?? '')).join(' ')""")


def test_the_node_says_what_runs_and_why_not(page, request):
    pytest.importorskip("onnxruntime")
    page.get("window.app.loadGraphData(a)", graph(False))
    page.wait("window.app.graph.nodes.length === 6")
    page.get("window.app.queuePrompt(0)")
    page.wait(
        """(app.graph.getNodeById(4).widgets || []).some((w) =>
        String(w.value).startsWith('onnxruntime: chosen'))""",
        60,
    )
    page.get("window.app.loadGraphData(a)", graph(True))
    page.wait("window.app.graph.nodes.length === 7")
    page.get("window.app.queuePrompt(0)")
    page.wait("""(app.graph.getNodeById(4).widgets || []).some((w) =>
        String(w.value).includes('a node has patched the UNet (patches: output_block_patch)'))""",
              60)  # fmt: skip
    assert "calls ran eager" in said(page)
    assert not page.ours
    if shot := request.config.getoption("--basetemp", None):
        page.page.screenshot(path=f"{shot}-engines.png")
