"""The workflows that come with the pack open, and run, as the ComfyUI frontend would have it."""

import json
import pathlib
import time

import pytest
from clock import Limit

pytestmark = [pytest.mark.comfy, pytest.mark.server]

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
WIDGETS = {
    "INT": int,
    "FLOAT": (int, float),
    "STRING": str,
    "BOOLEAN": bool,
    "COMBO": (str, int, float),
}
# drawn by the frontend alone
NOTES = {"MarkdownNote", "Note"}
# nothing is missing for these
COMPLETE = {"live_webcam", "live_webcam_similarity_filter"}
# files that the user brings
THEIRS = {"ckpt_name", "lora_name", "file", "image"}


@pytest.fixture(scope="module")
def info(server):
    return server.json("/object_info")


def widgets(inputs: dict, values: list, within: str = ""):
    """(name, type, options, value) of each input that has a widget, and of their extra widgets.

    The values are taken out of the list, in the order of widgets_values; a value that is missing
    is None. A dynamic combo is followed by what belongs to the option that it has.
    """
    for kind in ("required", "optional"):
        for name, (type_, *rest) in inputs.get(kind, {}).items():
            options = rest[0] if rest else {}
            type_ = "COMBO" if isinstance(type_, list) else type_
            if type_ == "COMFY_DYNAMICCOMBO_V3" and not options.get("hidden"):
                value = values.pop(0) if values else None
                known = {option["key"]: option["inputs"] for option in options["options"]}
                yield within + name, "COMBO", {"options": list(known)}, value
                yield from widgets(known.get(value, {}), values, f"{within}{name}.")
            if type_ in WIDGETS and not options.get("forceInput"):
                yield within + name, type_, options, values.pop(0) if values else None
                if any(key.endswith("_upload") for key in options):
                    yield None, "STRING", {}, values.pop(0) if values else None
                if options.get("control_after_generate"):
                    yield None, "STRING", {}, values.pop(0) if values else None


def to_api(workflow: dict, info: dict) -> dict:
    """What the frontend sends to the server for this workflow."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        shown = widgets(info[node["type"]]["input"], list(node.get("widgets_values") or []))
        inputs = {name: value for name, _, _, value in shown if name is not None}
        linked = {i["name"]: links[i["link"]] for i in node["inputs"] if i["link"] is not None}
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs | linked}
    return graph


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_opens_without_missing_nodes(info, server, path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    missing = {node["type"] for node in nodes.values()} - set(info) - NOTES
    assert not missing
    for node in nodes.values():
        if node["type"] in NOTES:
            continue
        known = info[node["type"]]
        names = [*known["input"].get("required", {}), *known["input"].get("optional", {})]
        values = list(node.get("widgets_values") or [])
        shown = list(widgets(known["input"], values))
        newer = node["type"] == "CreateVideo"  # bit_depth came after 0.8.0
        assert not values or (newer and server.version == "0.8.0"), node["type"]
        for name, type_, options, value in shown:
            assert isinstance(value, WIDGETS[type_]), (node["type"], name, value)
            if name not in THEIRS and "options" in options:
                assert value in options["options"], (node["type"], name, value)
            if "min" in options:
                assert options["min"] <= value <= options["max"], (node["type"], name, value)
        for i in node["inputs"]:
            assert i["link"] is None or i["name"] in names, (node["type"], i["name"])
    for _, source, output, target, place, type_ in workflow["links"]:
        given = info[nodes[source]["type"]]["output"][output]
        taken = nodes[target]["inputs"][place]
        known = info[nodes[target]["type"]]["input"]
        wanted = (known.get("required", {}) | known.get("optional", {}))[taken["name"]][0]
        assert given == wanted == type_, (nodes[target]["type"], taken["name"])


@pytest.mark.parametrize(
    "path", [p for p in WORKFLOWS if p.stem not in COMPLETE], ids=lambda p: p.stem
)
def test_is_refused_for_missing_files_only(info, server, path):
    """ComfyUI's own validation complains of the user's files and of nothing else."""
    graph = to_api(json.loads(path.read_text(encoding="utf-8")), info)
    status, answer = server.post("/prompt", {"prompt": graph})
    assert status == 400, answer
    errors = answer["node_errors"]
    assert errors
    for node, found in errors.items():
        for error in found["errors"]:
            assert error["extra_info"]["input_name"] in THEIRS, (graph[node], error)


def test_comfyui_finds_the_words_of_every_language(server):
    """It puts the files of a language together, and its page asks for them all at once."""
    told = server.json("/i18n")
    folders = [path for path in (ROOT / "locales").iterdir() if path.is_dir()]
    assert folders
    for folder in folders:
        main, nodes, commands = (
            json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            for name in ("main", "nodeDefs", "commands")
        )
        found = told[folder.name]
        assert found["livediffusion"] == main["livediffusion"]
        assert found["nodeDefs"] == nodes
        assert found["commands"] == commands


def test_clip_stylise_runs(info, server, comfyui, tmp_path):
    import av
    import filming
    from livediffusion.demo import clip

    # wider than the model's size, so that the workflow's own resizing is seen at work
    mine = server.base / "input" / "mine.mp4"
    filming.film(mine, "h264", size=(320, 288), frames=3, rate=12, sound="aac")
    path = ROOT / "workflows" / "clip_stylise.json"
    graph = to_api(json.loads(path.read_text(encoding="utf-8")), info)
    for node in graph.values():
        if node["class_type"] == "LoadVideo":
            node["inputs"]["file"] = "mine.mp4"
    status, answer = server.post("/prompt", {"prompt": graph})
    assert status == 200, answer
    saved = finished(server, answer["prompt_id"])
    path = server.base / "output" / saved["subfolder"] / saved["filename"]
    made = clip.read(path, 9, 256)
    assert (len(made.frames), made.frames[0].size, round(made.rate)) == (3, (256, 256), 12)
    with av.open(str(path)) as film:
        assert film.streams.audio, "the sound stays"


def finished(server, prompt_id: str, seconds: float = 120) -> dict:
    """The file that a prompt saved, once it is done."""
    limit = Limit(seconds)
    while not limit.over:
        entry = server.json(f"/history/{prompt_id}").get(prompt_id)
        if entry and entry["status"]["completed"]:
            shown = [v for o in entry["outputs"].values() for v in o.values()]
            files = [v[0] for v in shown if isinstance(v, list) and isinstance(v[0], dict)]
            return next(file for file in files if "filename" in file)
        assert not entry or entry["status"]["status_str"] != "error", entry["status"]
        time.sleep(0.1)
    raise AssertionError("the workflow did not finish")
