"""Every input of ours that names a file names one in its folder, whatever a link brings."""

import asyncio
import contextlib
import json
import os
import threading
import types

import fuzz
import pytest

pytestmark = pytest.mark.comfy

# an input of text or a choice, by what its value can reach; a new one is to be placed here
READS = {"LiveCamera.file", "LiveLearnedSteps.result", "LiveSearchedSteps.result",
         "LiveTensorRTLoader.engine"}  # fmt: skip
WRITES = {"LiveTensorRTBuild.name", "LiveView.filename_prefix"}
# what they name is opened only if it was allowed at the server
ALLOWED = {"LiveCamera.device", "LiveCamera.address", "LiveSend.address"}
WORDS = {
    "LiveCamera.source", "LiveCamera.fit", "LiveCamera.sender",
    "LiveStreamSampler.step_rule", "LiveStreamSampler.mode",
    "LiveStreamSampler.conditioning", "LiveStreamBatch.step_rule", "LiveRCFGGuider.mode",
    "LiveFutureAttention.levels", "LiveMemory.bank", "LiveMemory.levels", "LiveMemory.preset",
    "LiveReuse.depth",
    "LivePFDiff.base", "LivePromptBlend.method", "LiveTimesteps.indices", "LiveStrength.spacing",
    "LiveOptimizedSteps.solver", "LiveLearnedSteps.solver", "LiveSearchedSteps.solver",
    "LiveSearchedSteps.objective", "LiveSimilarityFilter.measure", "LiveCompile.engine",
    "LiveTensorRTBuild.precision", "LiveTensorRTBuild.library", "LiveTensorRTBuild.targets",
    "LiveRun.session", "LiveCompile.precision", "LiveCompile.device", "LiveCompileVAE.engine",
    "LiveCompileVAE.precision", "LiveCompileVAE.device", "LiveKeep.name", "LiveLast.name",
    "LiveSend.to", "LiveSend.name",
}  # fmt: skip


def registered():
    from livediffusion.nodes.extension import LiveDiffusionExtension

    return {n.define_schema().node_id: n
            for n in asyncio.run(LiveDiffusionExtension().get_node_list())}  # fmt: skip


def test_every_input_of_text_is_placed(comfyui):
    found = {
        f"{name}.{i.id}"
        for name, node in registered().items()
        for i in node.define_schema().inputs
        if i.get_io_type() in ("STRING", "COMBO") or isinstance(i.get_io_type(), list)
    }
    assert found == READS | WRITES | WORDS | ALLOWED


@pytest.fixture
def folders(comfyui, tmp_path, monkeypatch):
    """ComfyUI's folders with a good file in each, and beside them what nobody may reach."""
    import folder_paths
    from livediffusion.compiled.trt import api

    outside = tmp_path / "outside"
    outside.mkdir()
    for kind in ("json", "gif", "engine", "engine.json"):
        (outside / f"secret.{kind}").write_bytes(b"{}")
    inside = {
        "LiveCamera.file": (tmp_path / "input", "gif"),
        "LiveLearnedSteps.result": (tmp_path / "user" / "livediffusion" / "schedules", "json"),
        "LiveSearchedSteps.result": (tmp_path / "user" / "livediffusion" / "schedules", "json"),
        "LiveTensorRTLoader.engine": (tmp_path / "models" / "tensorrt", "engine"),
    }
    for folder, kind in set(inside.values()):
        folder.mkdir(parents=True)
        (folder / f"good.{kind}").write_bytes(b"{}")
        (folder / f"good.{kind}.json").write_bytes(b"{}")
        (folder / "folder").mkdir()
        (folder / f"empty.{kind}").mkdir()
        (folder / f"link.{kind}").symlink_to(outside / f"secret.{kind}")
        (folder / f"link.{kind}.json").symlink_to(outside / "secret.engine.json")
        (folder / f"zero.{kind}").symlink_to("/dev/zero")
        (folder / "out").symlink_to(outside)
        os.mkfifo(folder / f"pipe.{kind}")
        os.mkfifo(folder / f"pipe.{kind}.json")
        (folder / f"piped.{kind}").write_bytes(b"{}")
        os.mkfifo(folder / f"piped.{kind}.json")
        (folder / f"round.{kind}").symlink_to(folder / f"round.{kind}")
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path / "input"))
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path / "user"))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(api, "missing", lambda: None)
    return tmp_path, inside


def hostile(kind, tmp_path):
    secret = f"outside/secret.{kind}"
    return [
        None, True, 0, -1, 2**70, 0.5, float("nan"), b"good", [], ["good"], [[f"good.{kind}"]], {},
        {"a": 1}, object(), "", " ", ".", "..", "/", "\\", f"../{secret}", f"../../{secret}",
        f"../../../{secret}", f"folder/../../{secret}", f"..\\{secret}", f"folder/..\\..\\{secret}",
        str(tmp_path / secret), f"//{tmp_path / secret}", f"good.{kind}\0", f"\0{secret}",
        "x" * 10_000, "a/" * 5000,
        f"C:\\{secret}", f"C:{secret}", f"\\\\host\\share\\secret.{kind}",
        f"//host/share/secret.{kind}", f"good.{kind}:stream", f"good.{kind}::$DATA", "NUL", "CON",
        f"link.{kind}", f"out/secret.{kind}", "folder", f"empty.{kind}", f"zero.{kind}",
        f"pipe.{kind}", f"round.{kind}", "/dev/zero", "/dev/stdin", "~", "file:///etc/passwd",
        "%2e%2e/x", "\ud800", "\u202e", "nothing",
    ]  # fmt: skip


def values(schema):
    """Something for each input of a node."""
    import tiny
    import torch

    made = {
        "MODEL": tiny.model, "CONDITIONING": lambda: tiny.conditioning(1),
        "LATENT": lambda: {"samples": torch.zeros(1, 4, 8, 8)},
    }  # fmt: skip
    out = {}
    for one in schema.inputs:
        kind = one.get_io_type()
        out[one.id] = made[kind]() if kind in made else getattr(one, "default", None)
    return out


def tried(node, given):
    """What the node raised, None if nothing; never in the test's own thread, for it may hang."""
    raised = []

    def work():
        try:
            node.execute(**given)
        except BaseException as reason:
            raised.append(reason)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits for a file"
    return raised[0] if raised else None


@pytest.mark.parametrize("place", sorted(READS))
def test_only_what_is_inside_is_read(place, folders):
    tmp_path, inside = folders
    folder, kind = inside[place]
    name, _, field = place.partition(".")
    node = registered()[name]
    node.hidden = types.SimpleNamespace(unique_id="1", extra_pnginfo=None, prompt=None)
    given = values(node.define_schema())
    if name == "LiveCamera":
        given["source"] = "file"
    with fuzz.watched() as watch:
        tried(node, {**given, field: f"good.{kind}"})
    read = {os.path.realpath(path) for path in watch.opened}
    assert any(path.startswith(str(folder / f"good.{kind}")) for path in read)
    said = {}
    with fuzz.watched() as watch:
        for value in [*hostile(kind, tmp_path), f"piped.{kind}"]:
            reason = tried(node, {**given, field: value})
            said[str(value)[:60]] = reason
            with contextlib.suppress(NotImplementedError):
                node.fingerprint_inputs(**{**given, field: value})
    assert {v: r for v, r in said.items() if not isinstance(r, ValueError)} == {}
    assert all(str(r).startswith(f"{field}: ") and len(str(r)) < 400 for r in said.values())
    read = {os.path.realpath(path) for path in watch.opened if "\0" not in path}
    assert not [path for path in read if path.startswith((str(tmp_path / "outside"), "/dev/zero"))]


@pytest.mark.parametrize("bad", [None, 5, ["a"], {}, "", "../x", "/x", "a/b", "a\\b", "C:x", ".x",
                                 "a\0", "x" * 101, "a\n", "\ud800", "a:b"])  # fmt: skip
def test_an_engine_is_written_into_its_folder(bad, folders):
    node = registered()["LiveTensorRTBuild"]
    node.hidden = types.SimpleNamespace(unique_id="1")
    with fuzz.watched() as watch:
        reason = tried(node, {**values(node.define_schema()), "name": bad})
    assert isinstance(reason, ValueError) and str(reason).startswith("name: ")
    assert not any(str(folders[0]) in path for path in watch.opened)


def attacks():
    """Families of an engine's JSON file that name what is no model."""
    base, config = ["comfy.model_base", "BaseModel"], ["comfy.supported_models", "SD15"]
    model, loader = "comfy.model_base", ".demo.loader"
    other = [
        ["subprocess", "call"], ["os", "system"], ["builtins", "eval"], ["stranger_module", "call"],
        ["comfy.utils", "load_torch_file"], [model, "torch"], [model, "__name__"],
        [model, "logging"], ["comfy.supported_models", "BaseModel"], [".demo.train", "main"],
        [loader, "load"], [f".{loader}", "load"], [".nodes.live", "LiveRun"], [model, "ModelType"],
        [model, "BaseModel.__init__"], [model, "__builtins__"], ["torch", "load"],
        ["comfy.supported_models", "models"], ["comfy.ldm.models.autoencoder", "AutoencoderKL"],
        [loader, "WEIGHTS"], model, [[], {}], [None, None], [model], {"a": 1}, None,
    ]  # fmt: skip
    return [(place, config) for place in other] + [(base, place) for place in other]


@pytest.mark.parametrize(("base", "config"), attacks(), ids=str)
def test_an_engine_names_models_only(base, config, comfyui, tmp_path, monkeypatch):
    """What is not a class of a model is neither imported nor called."""
    import sys

    import torch
    from livediffusion.host.models import skeleton

    (tmp_path / "stranger_module.py").write_text("def call(*a, **k): open('ran', 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    family = {
        "base": base, "config": config, "unet_config": {"in_channels": 4}, "model_type": "EPS",
        "sampling_settings": {}, "memory_usage_factor": 1.0,
    }  # fmt: skip
    with fuzz.watched() as watch, pytest.raises(ValueError, match="engine: it was built from"):
        skeleton.made(json.loads(json.dumps(family)), torch.float32)
    assert watch.started == [] and "stranger_module" not in sys.modules
    assert not (tmp_path / "ran").exists()
    assert not [name for name in watch.imported if "demo.train" in name or "nodes" in name]


def test_the_models_that_engines_are_built_from_are_made_again(comfyui):
    """ComfyUI's own, and the bundled one."""
    import tiny
    import torch
    from livediffusion.demo import loader
    from livediffusion.host.models import skeleton

    for model in (tiny.model(), loader.load_model()):
        told = json.loads(json.dumps(skeleton.described(model)))
        made = skeleton.made(told, torch.float32)
        assert type(made) is type(model.model)
        assert type(made.model_config) is type(model.model.model_config)
