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
SHOWN = """(({ widgets }) => widgets.filter(({ name }) => name === 'fit')
    .map((w) => [w.label, w._displayValue])[0])(app.graph.getNodeById(1))"""
BUTTON = "document.querySelector('.livediffusion-live').innerText.trim()"
HINTS = "[...document.querySelectorAll('.livediffusion-hint')].map((e) => e.innerText)"
FIGURES = "document.querySelector('.livediffusion-figures').innerText"


def table(language, name):
    return json.loads((tools.ROOT / "locales" / language / f"{name}.json").read_text("utf-8"))


def speak(page, language, hint):
    """Choose a language; ComfyUI opens the workflow again then, with our nodes made anew."""
    page.get("app.extensionManager.setting.set('Comfy.Locale', a)", language)
    page.wait(f"{HINTS}.includes({hint!r})")


def test_a_page_speaks_the_language_of_the_frontend(page):
    """Chosen while a workflow is open, as somebody does who has just installed ComfyUI."""
    fit = table("ja", "nodeDefs")["LiveCamera"]["inputs"]["fit"]
    words = table("ja", "main")["livediffusion"]
    page.load(tools.through(fit="pad"))
    try:
        speak(page, "ja", words["pressLive"])
        page.load(tools.through(fit="pad"))
        assert page.get(BUTTON) == words["live"]
        assert page.get(SHOWN) == [fit["name"], fit["options"]["pad"]]
        assert page.get(HINTS) == [words["cameraOff"], words["pressLive"]]
        page.live()
        assert page.get(BUTTON) == words["stop"]
        before, _, after = words["figures"].partition("{skipped}")
        page.wait(f"{FIGURES}.includes({before[-4:]!r}) && {FIGURES}.includes({after[:4]!r})")
        # what is sent is what it was
        sent = page.get("app.graphToPrompt().then(({ output }) => output['1'].inputs.fit)")
        assert sent == "pad"
        page.stop()
    finally:
        speak(page, "en", "Press Live")
    assert page.get(BUTTON) == "Live"
    assert not page.ours
