"""Schedules show themselves on their nodes."""

import importlib.util
import pathlib

import pytest
from livediffusion.schedules import results

pytestmark = [pytest.mark.comfy, pytest.mark.server]

HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("browser_tools", HERE / "conftest.py")
tools = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)

PLOTS = "document.querySelectorAll('.livediffusion-plot')"


FILE = "learned-from-a-friend.json"
GIVEN = results.Result(
    "learned", "dpmpp_2m", (14.6146, 4.0, 0.7, 0.0), (0.0, 0.1, -0.2), "teacher",
    {"teacher": (0.21, 0.3)}, "beta", "0" * 32, (8, 8),
    curves={"simple": (14.6146, 2.0, 0.5, 0.0), "beta": (14.6146, 3.0, 0.4, 0.0)},
)  # fmt: skip


def graph(spacing, seed):
    """A schedule from a dial, and a learned one that somebody shared, on the bundled model."""
    learned = ["dpmpp_2m", 3, 2, 1, seed, 1, FILE, False]
    sigmas, text = [("sigmas", "SIGMAS")], [("source", "*")]
    return tools.workflow(
        {
            1: ("LiveDemoModel", [20, 20], [240, 70], [], [],
                [("model", "MODEL"), ("clip", "CLIP"), ("vae", "VAE")]),
            2: ("CLIPTextEncode", [20, 140], [240, 100], ["blueprint"], [("clip", "CLIP")],
                [("CONDITIONING", "CONDITIONING")]),
            3: ("EmptyLatentImage", [20, 300], [240, 110], [64, 64, 1], [],
                [("LATENT", "LATENT")]),
            4: ("LiveStrength", [320, 20], [300, 110], [4, 0.6, spacing], [("model", "MODEL")],
                sigmas),
            5: ("LiveLearnedSteps", [680, 20], [340, 320], [1.0, *learned],
                [("model", "MODEL"), ("positive", "CONDITIONING"), ("negative", "CONDITIONING"),
                 ("latent", "LATENT")], [*sigmas, ("model", "MODEL")]),
            6: ("PreviewAny", [1080, 20], [200, 100], [], text, [("STRING", "STRING")]),
            7: ("PreviewAny", [1080, 200], [200, 100], [], text, [("STRING", "STRING")]),
        },
        [(1, 0, 4, 0), (1, 1, 2, 0), (1, 0, 5, 0), (2, 0, 5, 1), (3, 0, 5, 3), (4, 0, 6, 0),
         (5, 0, 7, 0)],
    )  # fmt: skip


@pytest.mark.parametrize("nodes2", [False, True])
def test_a_schedule_is_drawn_with_what_to_expect_of_it(page, nodes2, request):
    page.nodes2(nodes2)
    try:
        results.save(GIVEN, page.site.base / "user" / "livediffusion" / "schedules" / FILE)
        # ComfyUI runs no node again that it has run
        spacing, seed = ("karras", 0) if nodes2 else ("log-snr", 1)
        page.get("window.app.loadGraphData(a)", graph(spacing, seed))
        page.wait("window.app.graph.nodes.length === 7")
        values = page.get("Object.fromEntries(app.graph.getNodeById(5).widgets.map("
                          "(w) => [w.name, w.value]))")  # fmt: skip
        assert values["samples"] == 2 and values["iterations"] == 1
        page.get("window.app.queuePrompt(0)")
        page.wait(f"{PLOTS}.length === 2", 60)
        page.wait(f"[...{PLOTS}].every((plot) => plot.getBoundingClientRect().height > 100)")
        plots = page.get(f"""[...{PLOTS}].map((plot) => ({{
            dots: plot.querySelectorAll('circle').length,
            lines: plot.querySelectorAll('polyline').length,
            names: [...plot.querySelectorAll('.livediffusion-legend span')].map((s) => s.innerText),
            text: [...plot.querySelectorAll('.livediffusion-figures')].map((l) => l.innerText),
        }}))""")
        by_hand, learned = sorted(plots, key=lambda plot: -plot["dots"])
        assert by_hand["dots"] == 5 and learned["dots"] == 4
        for plot in plots:
            assert plot["lines"] == 1 + len(plot["names"])
            assert {"simple", "beta"} & set(plot["names"])
        assert learned["names"] == ["simple", "beta"]
        assert learned["text"] == [
            "RMSE to 100 steps: 0.21, beta 0.3 (0.70 x)", "time shift: use the model output"
        ]  # fmt: skip
        assert not page.ours
        # nothing of it is in the saved workflow, and it fits its node
        saved = page.get("app.graph.serialize().nodes.find((n) => n.id === 4)")
        assert saved["widgets_values"] == [4, 0.6, spacing]
        assert saved["size"][1] > 200
        # another run draws over it
        page.get("app.graph.getNodeById(4).widgets[0].value = 6")
        page.get("window.app.queuePrompt(0)")
        page.wait(f"[...{PLOTS}].some((plot) => plot.querySelectorAll('circle').length === 7)")
        assert page.get(f"{PLOTS}.length") == 2
        if shot := request.config.getoption("--basetemp", None):
            page.page.screenshot(path=f"{shot}-plots-{nodes2}.png")
    finally:
        page.nodes2(False)
