"""The page in another language, from the language's choice to a live run and back."""

import importlib.util
import json
import pathlib

import pytest

pytestmark = [pytest.mark.comfy, pytest.mark.server]

HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("browser_tools", HERE / "conftest.py")
tools = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)

# what a node shows of an input, and of the option that it has
SHOWN = """(([kind, name]) => {
  const node = app.graph.nodes.find((n) => n.comfyClass === kind);
  const widget = node.widgets.find((w) => w.name === name);
  return [node.getTitle(), widget.label, widget._displayValue] })(a)"""
BUTTON = "document.querySelector('.livediffusion-live').innerText.trim()"


def table(language, name):
    return json.loads((tools.ROOT / "locales" / language / f"{name}.json").read_text("utf-8"))


def speak(page, language):
    page.get("app.extensionManager.setting.set('Comfy.Locale', a)", language)


def test_a_page_speaks_the_language_of_the_frontend(page, request):
    """Chosen while a workflow is open, as somebody does who has just installed ComfyUI."""
    nodes, words = table("ja", "nodeDefs"), table("ja", "main")["livediffusion"]
    page.load(tools.through(fit="pad"))
    try:
        speak(page, "ja")
        page.wait(f"{BUTTON} === {words['live']!r}")
        page.wait(f"{SHOWN.replace('(a)', '([`LiveCamera`, `fit`])')}[0] === "
                  f"{nodes['LiveCamera']['display_name']!r}")  # fmt: skip
        fit = nodes["LiveCamera"]["inputs"]["fit"]
        shown = page.get(SHOWN, ["LiveCamera", "fit"])
        assert shown[1:] == [fit["name"], fit["options"]["pad"]]
        assert page.get("document.querySelector('.livediffusion-hint').innerText") in (
            words["cameraOff"], words["pressLive"])  # fmt: skip
        page.live()
        assert page.get(BUTTON) == words["stop"]
        page.wait("document.querySelector('.livediffusion-figures').innerText.includes("
                  f"{words['figures'].split('{skipped}')[0].split('ms')[-1].strip(' 、')!r})")
        # what is sent is what it was
        sent = page.get("app.graphToPrompt().then(({ output }) => output['1'].inputs.fit)")
        assert sent == "pad"
        page.stop()
    finally:
        speak(page, "en")
    page.wait(f"{BUTTON} === 'Live'")
    page.wait(f"{SHOWN.replace('(a)', '([`LiveCamera`, `fit`])')}.join() === 'Live Camera,fit,pad'")
    assert not page.ours
