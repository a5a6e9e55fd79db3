"""Nodes and page in the user's language: nothing lacks, nothing is stale, nothing was forgotten.

To add an input, an option or a text: write it in English where it is used, run this, and put what
it names into locales/<language>/ - nodeDefs.json for nodes, main.json for the page.
"""

import asyncio
import json
import pathlib
import re

import pytest

pytestmark = pytest.mark.comfy

ROOT = pathlib.Path(__file__).resolve().parents[1]
LANGUAGES = ["es", "fr", "ja", "ko", "pt-BR", "ru", "zh", "zh-TW"]
PLACE = re.compile(r"\{\w*\}")
OWN = "sampling", "conditioning"  # categories that ComfyUI's own nodes have, in every language

# options that are names of methods, engines and formats, the same in every language
METHODS = {
    "ays", "ays sdxl", "bf16", "bfloat16", "CPU", "cudagraph", "deis", "dpmpp_2m", "eager",
    "euler", "fast-ddpm", "float16", "fp16", "fp32", "GPU", "inductor", "int8", "karras", "lcm",
    "lerp", "log-snr", "ndi", "NPU", "onetime-negative", "onnxruntime", "openvino", "pfdiff-1_1",
    "pfdiff-2_1", "pfdiff-3_1", "RTX 20", "RTX 30", "RTX 40", "RTX 50", "self-negative", "slerp",
    "spout", "syphon", "tensorrt", "tensorrt-rtx", "unipc", "whip",
}  # fmt: skip
COMMANDS = {
    "livediffusion_toggle": "Live: start or stop",
    "livediffusion_keep": "Live: keep running without a page",
    "livediffusion_end": "Live: stop what runs without a page",
}
SIGNS = {"a", "b", "cfg", "clip", "controlnet", "fps", "h", "k", "vae"}
# words that a language shares with English, and Live where it is a name
SHARED = {
    "fr": {"Live", "live", "auto", "base", "clip", "delta", "destination", "image", "indices",
           "latent", "mode", "pixels", "population", "session", "sigmas", "source",
           "{file}, {seconds} s"},
    "es": {"Live", "base", "clip", "delta", "live", "sigmas", "{file}, {seconds} s"},
    "pt-BR": {"Live", "base", "delta", "live", "pixels", "sigmas", "solver", "{file}, {seconds} s"},
    "ru": {"Live", "Live PFDiff", "live"},
    "zh": {"delta", "latent", "sigmas"},
    "zh-TW": {"delta"},
}  # fmt: skip
# what is chosen here is a file of the user's: only its first option is ours
FILES = {"LiveCamera.file", "LiveLearnedSteps.result", "LiveSearchedSteps.result"}
LISTED = {"LiveTensorRTLoader.engine"}  # engines, or why there are none


def key(text) -> str:
    """As the frontend looks it up."""
    return str(text).replace(".", "_")


def read(language: str, name: str) -> dict:
    return json.loads((ROOT / "locales" / language / f"{name}.json").read_text("utf-8"))


def flat(tree: dict, path: tuple = ()) -> dict[tuple, str]:
    """Texts by the way to them."""
    texts = {}
    for name, value in tree.items():
        here = (*path, name)
        texts |= flat(value, here) if isinstance(value, dict) else {here: value}
    return texts


def options(node: str, given) -> list[str]:
    """Of an input: those that are words."""
    where = f"{node}.{given.id}"
    if where in LISTED:
        return []
    found = list(getattr(given, "options", None) or [])
    return [o for o in (found[:1] if where in FILES else found) if isinstance(o, str)]


@pytest.fixture(scope="module")
def schemas(comfyui):
    from livediffusion.nodes.extension import LiveDiffusionExtension

    nodes = asyncio.run(LiveDiffusionExtension().get_node_list())
    return [node.define_schema() for node in nodes]


@pytest.fixture(scope="module")
def of_nodes(schemas) -> dict[tuple, str]:
    """What nodeDefs.json has to say, in English."""
    tree = {}
    for schema in schemas:
        node = {"display_name": schema.display_name, "description": schema.description}
        for given in schema.inputs:
            entry = node.setdefault("inputs", {}).setdefault(key(given.id), {"name": given.id})
            entry |= {"tooltip": given.tooltip} if given.tooltip else {}
            named = {key(o): o for o in options(schema.node_id, given) if o not in METHODS}
            entry |= {"options": named} if named else {}
        for number, given in enumerate(schema.outputs):
            entry = node.setdefault("outputs", {}).setdefault(str(number), {})
            entry |= {"name": given.display_name}
            entry |= {"tooltip": given.tooltip} if given.tooltip else {}
        tree[key(schema.node_id)] = node
    return flat(tree)


def of_page() -> dict[str, str]:
    """The page's own table."""
    source = (ROOT / "web" / "live" / "words.mjs").read_text("utf-8")
    return json.loads(re.search(r"^const ENGLISH = (\{.*?^\})", source, re.M | re.S).group(1))


def sources() -> str:
    """Of ComfyUI's page, a phone's, and the page that serve/ gives to visitors."""
    files = [ROOT / "web" / "livediffusion.js", *sorted((ROOT / "web").glob("*/*.mjs")),
             *sorted((ROOT / "serve" / "page").glob("*.mjs"))]  # fmt: skip
    return "\n".join(f.read_text("utf-8") for f in files if f.name != "words.mjs")


def of_frame(schemas) -> dict[tuple, str]:
    """Categories, the menu's entry and the page's table: what main.json has to say."""
    parts = {part for schema in schemas for part in schema.category.split("/")} - set(OWN)
    tree = {"nodeCategories": {part: part for part in parts}, "menuLabels": {"Live": "Live"}}
    return flat({**tree, "livediffusion": of_page()})


def wrong(language: str, english: dict[tuple, str], texts: dict[tuple, str]) -> dict:
    """What is not as it has to be, by the way to it."""
    shared = SHARED.get(language, set())
    # an option whose name is the same is left out
    lacking = {p for p in english.keys() - texts.keys()
               if "options" not in p or english[p] not in shared}  # fmt: skip
    found = dict.fromkeys(lacking, "missing")
    found |= dict.fromkeys(texts.keys() - english.keys(), "stale")
    for path in english.keys() & texts.keys():
        text = texts[path]
        if not isinstance(text, str) or not text.strip() or text != text.strip():
            found[path] = "no text"
        elif text == english[path] and text not in shared | SIGNS:
            found[path] = "still English"
        elif sorted(PLACE.findall(text)) != sorted(PLACE.findall(english[path])):
            found[path] = "another placeholder"
        elif path[0] != "livediffusion" and re.search(r"[@{}|]", text):
            found[path] = "the frontend takes @, {, } and | for orders of its own"
    return found


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_word_is_there_in_every_language(schemas, of_nodes, language):
    assert not wrong(language, of_nodes, flat(read(language, "nodeDefs")))
    assert not wrong(language, of_frame(schemas), flat(read(language, "main")))
    commands = flat(read(language, "commands"))
    named = {(name, "label"): label for name, label in COMMANDS.items()}
    assert not wrong(language, named, commands)


def test_the_folders_are_the_languages():
    found = sorted(p.name for p in (ROOT / "locales").iterdir())
    assert found == LANGUAGES
    assert {p.name for p in (ROOT / "locales").rglob("*.json")} == {
        "commands.json", "main.json", "nodeDefs.json"}  # fmt: skip


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_tooltip_speaks_of_options_as_the_list_does(schemas, language):
    """Whoever reads "crop: ..." looks for crop in the list."""
    texts = read(language, "nodeDefs")
    for schema in schemas:
        for given in schema.inputs:
            entry = texts[key(schema.node_id)].get("inputs", {}).get(key(given.id), {})
            for option in options(schema.node_id, given):
                if re.search(rf"(?<![\w-]){re.escape(option)}(:| and )", given.tooltip or ""):
                    said = entry.get("options", {}).get(key(option), option)
                    assert said in entry["tooltip"], (schema.node_id, given.id, option)


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_stands_side_by_side_has_names_of_its_own(schemas, language):
    """A node's inputs, its outputs, an input's options: two alike cannot be told apart."""
    told = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text("utf-8"))
    for schema in schemas:
        node = told[key(schema.node_id)]
        inputs = list(node.get("inputs", {}).values())
        lists = [[e["name"] for e in inputs], [e["name"] for e in node.get("outputs", {}).values()]]
        lists += [list(entry.get("options", {}).values()) for entry in inputs]
        for names in lists:
            assert len(names) == len(set(names)), (language, schema.node_id, names)


@pytest.mark.parametrize("language", LANGUAGES)
def test_one_thing_has_one_name(language):
    """A node is called the same on the canvas, in the page's sentences and in tooltips."""
    nodes, page = read(language, "nodeDefs"), read(language, "main")["livediffusion"]
    for name in ("LiveCamera", "LiveView"):
        assert page[name] == nodes[name]["display_name"]
    assert len({node["display_name"] for node in nodes.values()}) == len(nodes)
    tips = [entry.get("tooltip", "") for node in nodes.values()
            for entry in node.get("inputs", {}).values()]  # fmt: skip
    for name in ("LiveTimesteps", "LiveStrength", "LiveRCFGGuider"):
        assert any(nodes[name]["display_name"] in tip for tip in tips), name
    for sentence in ("NotAllowedError", "NotReadableError", "pressLive"):
        assert page["live"] in page[sentence], sentence


def test_the_page_says_what_is_in_its_table():
    english, text = of_page(), sources()
    asked = set(re.findall(r"\bsay\(\s*'(\w+)'", text))
    assert asked and asked <= english.keys()
    quoted = set(re.findall(r"'(\w+)'", text))
    states = re.search(r"const LABELS = \{(.*?)\}", text, re.S).group(1)
    tips = {f"{state}Tip" for state in re.findall(r"^\s+(\w+): '", states, re.M)}
    assert not english.keys() - quoted - tips
    assert tips <= english.keys()


def test_no_sentence_of_the_page_is_outside_its_table():
    """A text with a blank in it that is shown would be English for everybody."""
    shown = r"(?:textContent|title|label|placeholder)(?::| =) ?['\"`]([^'\"`]+)['\"`]|" \
        r"(?:notify|Error)\((?:'\w+', )?['`]([^'`]*[ ][^'`]*)['`]"  # fmt: skip
    found = {a or b for a, b in re.findall(shown, sources())}
    assert found == set(COMMANDS.values())  # which commands.json translates


def test_a_fault_would_be_seen():
    page = "livediffusion"
    english = {(page, "a"): "Wait for {count}", (page, "b"): "Stop", (page, "c"): "Live"}
    good = {(page, "a"): "Attendre {count}", (page, "b"): "Stopper", (page, "c"): "Live"}
    assert wrong("fr", english, good) == {}
    bad = {(page, "a"): "Attendre {n}", (page, "b"): "Stop", (page, "d"): "x"}
    assert wrong("fr", english, bad) == {
        (page, "a"): "another placeholder", (page, "b"): "still English", (page, "c"): "missing",
        (page, "d"): "stale",
    }  # fmt: skip
    assert wrong("fr", {("b",): "Stop"}, {("b",): "a|b"})
    assert wrong("fr", {("b",): "Stop"}, {("b",): " "}) == {("b",): "no text"}
