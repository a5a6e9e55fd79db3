"""Every way in which our nodes come and go, and what the page keeps of them after each."""

import importlib.util
import pathlib

import pytest

pytestmark = [pytest.mark.comfy, pytest.mark.server]

HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("browser_tools", HERE / "conftest.py")
tools = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)
through = tools.through

SETUP = """(() => {
  const root = () => app.rootGraph ?? app.graph
  const every = (graph, found = []) => {
    for (const n of graph.nodes) n.subgraph ? every(n.subgraph, found) : found.push(n)
    return found
  }
  const box = (n) => n.widgets.find((w) => w.name.startsWith('livediffusion_')).element
  Object.assign(window.live, {
    box,
    all: (kind) => every(root()).filter((n) => n.comfyClass === kind),
    shown: (n) => JSON.stringify([
      n.widgets.filter((w) => w.hidden).map((w) => w.name),
      [...box(n).querySelectorAll('.livediffusion-line button, .livediffusion-line select')]
        .map((e) => e.tagName + (e.tagName === 'BUTTON' ? e.textContent : e.value))
    ]),
    copy: (n) => app.canvas.copyToClipboard([n]),
    paste: () => app.canvas.pasteFromClipboard({}),
    inside: (n) => app.canvas.graph.convertToSubgraph(new Set([n]))
  })
})()"""


def test_a_copy_shows_what_belongs_to_its_source(page):
    page.get(SETUP)
    for name in ("address", "screen", "phone", "device", "file", "ndi"):
        made = through(source=name)
        made["nodes"][0]["widgets_values"] += ["there", "there", "there"]
        page.load(made)
        (mine,) = page.get("window.live.all('LiveCamera').map(window.live.shown)")
        page.get("(window.live.copy(window.live.all('LiveCamera')[0]), window.live.paste())")
        page.get("void window.live.inside(window.live.all('LiveCamera')[0])")
        # the copy, and the one that went into a subgraph
        assert page.get("window.live.all('LiveCamera').map(window.live.shown)") == [mine] * 2, name
    assert not page.ours
