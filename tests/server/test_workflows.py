"""The workflows that come with the pack open, and run, as the ComfyUI frontend would have it."""

import io
import json
import pathlib
import time

import inprocess
import numpy as np
import pytest
from clock import Limit
from PIL import Image
from serving import served

pytestmark = [pytest.mark.comfy, pytest.mark.server]

prompt, saved = served("workflow.prompt"), served("workflow.saved")
widgets = served("workflow.widgets")
ROOT = pathlib.Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
WIDGETS = {
    "INT": int,
    "FLOAT": (int, float),
    "STRING": str,
    "BOOLEAN": bool,
    "COMBO": (str, int, float),
}
# nothing is missing for these
COMPLETE = {"live_webcam", "live_webcam_similarity_filter", "live_webcam_calm", "live_screen",
            "live_to_obs"}  # fmt: skip
# files that the user brings
THEIRS = {"ckpt_name", "lora_name", "file", "image"}


@pytest.fixture(scope="module")
def info(server):
    return server.json("/object_info")


def to_api(path: pathlib.Path, info: dict) -> dict:
    """What the frontend sends to the server for this workflow."""
    return prompt.to_prompt(json.loads(path.read_text(encoding="utf-8")), info).graph


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_opens_without_missing_nodes(info, server, path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    missing = {node["type"] for node in nodes.values()} - set(info) - set(saved.NOTES)
    assert not missing
    for node in nodes.values():
        if node["type"] in saved.NOTES:
            continue
        known = info[node["type"]]
        names = [*known["input"].get("required", {}), *known["input"].get("optional", {})]
        values = list(node.get("widgets_values") or [])
        shown = widgets.of_node(node["type"], known, node)
        if server.version == "0.8.0" and node["type"] == "CreateVideo":
            values = values[: len(shown)]  # bit_depth came after 0.8.0
        if node["type"] == "SaveVideo":
            shown = shown[: len(values)]  # codec goes on as a hidden widget, for older workflows
        assert len(shown) == len(values), node["type"]
        for name, type_, options, value, _ in shown:
            if type_ in WIDGETS:
                assert isinstance(value, WIDGETS[type_]), (node["type"], name, value)
            if name not in THEIRS and "options" in options:
                assert value in widgets.choices(options), (node["type"], name, value)
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
    graph = to_api(path, info)
    status, answer = server.post("/prompt", {"prompt": graph})
    assert status == 400, answer
    errors = answer["node_errors"]
    assert errors
    for node, found in errors.items():
        for error in found["errors"]:
            assert error["extra_info"]["input_name"] in THEIRS, (graph[node], error)


@pytest.mark.parametrize("name", sorted(COMPLETE))
def test_runs_live_as_it_comes(info, server, name):
    """On a film in the camera's place: each view has its pictures, and no two the same."""
    from pictures import picture

    if not server.primary:
        pytest.skip("live runs on the other versions are in test_live_server")
    rng, scene = np.random.default_rng(0), picture(3).astype(float)
    frames = [Image.fromarray((scene + rng.normal(0, 5, scene.shape)).clip(0, 255).astype(np.uint8))
              for _ in range(4)]  # fmt: skip
    frames[0].save(server.base / "input" / "noisy.gif", save_all=True, append_images=frames[1:],
                   duration=50, loop=0)  # fmt: skip
    graph = to_api(ROOT / "workflows" / f"{name}.json", info)
    for node in graph.values():
        if node["class_type"] == "LiveCamera":
            node["inputs"] |= {"source": "file", "file": "noisy.gif"}
            height, width = node["inputs"]["height"], node["inputs"]["width"]
    # there is no camera for others on this machine
    graph = {name: node for name, node in graph.items() if node["class_type"] != "LiveSend"}
    views = sum(node["class_type"] == "LiveView" for node in graph.values())
    shown = {}

    async def work(http):
        client = await inprocess.Client.start(http, server.url, graph)
        await client.wait(lambda: len({packet.view for packet, _ in client.views[3:]}) == views, 60)
        shown.update((packet.view, packet.payload) for packet, _ in client.views)
        await client.stop()
        return client

    client = inprocess.live(work)
    assert (client.state, client.problems, len(shown)) == ("ended", [], views)
    pictures = [np.asarray(Image.open(io.BytesIO(one)), dtype=float) for one in shown.values()]
    assert all(one.shape == (height, width, 3) and one.std() > 20 for one in pictures)
    for i, one in enumerate(pictures):
        assert all(np.abs(one - other).mean() > 0.5 for other in pictures[:i])


@pytest.mark.parametrize("name", ["live_webcam", "live_to_obs"])
def test_a_workflow_from_before_an_input_was_there_is_the_same(info, server, name):
    """Saved with fewer widgets than a Live Camera has now."""
    workflow = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    new = prompt.to_prompt(workflow, info).graph
    for node in workflow["nodes"]:
        if node["type"] == "LiveCamera":
            assert node["widgets_values"][8:] == ["", "", ""]
            del node["widgets_values"][8:], node["inputs"][8:]
    old = prompt.to_prompt(workflow, info).graph
    for before, now in zip(old.values(), new.values(), strict=True):
        assert now["inputs"].items() >= before["inputs"].items()
    status, answer = server.post("/prompt", {"prompt": old})
    assert status == 200 and not answer["node_errors"], answer


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
    graph = to_api(path, info)
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
