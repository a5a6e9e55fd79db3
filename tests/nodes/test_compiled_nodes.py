"""Live Compile, Live TensorRT Build and Live TensorRT Loader in ComfyUI's executor."""

import json
import pathlib
import sys

import pytest
import tiny
import torch
from compiled_models import lora

pytestmark = pytest.mark.comfy
pytest.importorskip("onnxruntime")

DEMO = pathlib.Path(__file__).resolve().parents[2] / "demo"


@pytest.fixture(autouse=True)
def inference(comfyui):
    with torch.inference_mode():
        yield


@pytest.fixture
def trt(comfyui, tmp_path, monkeypatch):
    """TensorRT's double in its place."""
    import folder_paths
    import tensorrt_double
    from livediffusion.compiled.trt import api

    double = tensorrt_double.make()
    monkeypatch.setitem(sys.modules, "tensorrt", double)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)  # as if it were not installed
    here = {"gpu": "Double GPU", "capability": "8.9", "cuda_driver": 12}
    monkeypatch.setattr(api, "gpu", lambda: dict(here))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    return double


def compile_(model, engine="auto"):
    """The node's output: MODEL, and what it tells its page."""
    from livediffusion.nodes.compiled import LiveCompile

    LiveCompile.hidden = type("Hidden", (), {"unique_id": None})
    out = LiveCompile.execute(model, engine)
    return out.args[0], json.loads(out.ui["livediffusion_engine"][0])


def build(model, width=64, height=64, rows=4, tokens=77, controlnet=False, precision="fp32",
          name="tiny", dynamic=False, refit=False):  # fmt: skip
    from livediffusion.nodes.tensorrt import LiveTensorRTBuild

    LiveTensorRTBuild.hidden = type("Hidden", (), {"unique_id": None})
    return LiveTensorRTBuild.execute(
        model, width, height, rows, tokens, controlnet, precision, name, dynamic, refit
    ).args[0]


def load(engine, model=None, rebuild=False):
    from livediffusion.nodes.tensorrt import LiveTensorRTLoader

    LiveTensorRTLoader.hidden = type("Hidden", (), {"unique_id": None})
    return LiveTensorRTLoader.execute(engine, rebuild, model).args[0]


def sampled(model):
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(tiny.conditioning(1, 77), tiny.conditioning(2, 77))
    guider.set_cfg(1.5)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return guider.sample(
        noise, torch.zeros_like(noise), comfy.samplers.ksampler("euler"),
        torch.tensor([10.0, 5.0, 1.0, 0.0]), disable_pbar=True,
    )  # fmt: skip


def options(node, name):
    """What a COMBO of a node offers now."""
    schema = node.define_schema()
    return next(i for i in schema.inputs if i.id == name).options


def test_auto_says_what_it_took_and_why():
    from livediffusion.compiled.ov import api as openvino

    model = tiny.model()
    compiled, told = compile_(model)
    if openvino.missing():
        assert told["engine"] == "eager"
        assert told["why"].startswith("nothing faster is installed (")
    else:
        assert told["engine"] == "openvino" and told["why"] == "if it is faster here"
    assert tiny.rms(sampled(compiled), sampled(model)) <= 1e-5


def test_what_is_not_installed_is_said(monkeypatch):
    from livediffusion.compiled import ort

    monkeypatch.setattr(ort.importlib.util, "find_spec", lambda name: None)
    model = tiny.model()
    assert compile_(model)[1]["engine"] == "eager"
    with pytest.raises(ValueError, match=r"engine: onnxruntime cannot be used here\. onnx and"):
        compile_(model, "onnxruntime")


def test_auto_takes_a_graph_on_a_gpu(monkeypatch):
    from livediffusion.compiled import choice

    name, why = choice.chosen("auto", torch.device("cuda"))
    assert name == "cudagraph" and "inductor and TensorRT are faster" in why
    assert choice.chosen("auto", torch.device("mps"))[0] == "eager"
    with pytest.raises(choice.Refused, match="CUDA graphs need an NVIDIA GPU"):
        choice.chosen("cudagraph", torch.device("cpu"))


def test_what_does_not_work_here_is_named():
    with pytest.raises(ValueError, match=r"engine: cudagraph cannot be used here\. CUDA graphs"):
        compile_(tiny.model(), "cudagraph")


def test_eager_takes_an_engine_off_again():
    from livediffusion.host.models.engines import engine_of

    compiled, _ = compile_(tiny.model(), "onnxruntime")
    assert engine_of(compiled) is not None
    assert engine_of(compile_(compiled, "eager")[0]) is None


def test_build_and_load(trt):
    model = lora(tiny.model())
    name = build(model)
    assert name.startswith("tiny_64x64_r4_t77_fp32-") and name.endswith(".engine")
    for loaded in (load(name), load(name, model)):
        assert tiny.rms(sampled(loaded), sampled(model)) <= 1e-5
    assert build(model) == name and trt.built == 1


def test_what_is_gone_or_spoilt_is_built_when_queued_again(trt):
    """ComfyUI runs a node again once its fingerprint is another."""
    from livediffusion.host.models import tensorrt
    from livediffusion.nodes.tensorrt import LiveTensorRTBuild

    name = build(tiny.model())
    seen = [LiveTensorRTBuild.fingerprint_inputs()]
    assert seen[0] == LiveTensorRTBuild.fingerprint_inputs()
    engine = pathlib.Path(tensorrt.folders()[0]) / name
    (engine.with_name(f"{name}.json")).write_text("[]")
    seen.append(LiveTensorRTBuild.fingerprint_inputs())
    engine.unlink()
    seen.append(LiveTensorRTBuild.fingerprint_inputs())
    engine.mkdir()
    seen.append(LiveTensorRTBuild.fingerprint_inputs())
    assert len(set(seen)) == len(seen)


def test_the_loader_lists_what_is_there_or_what_to_do(trt, monkeypatch):
    from livediffusion.compiled.trt import api
    from livediffusion.nodes.tensorrt import LiveTensorRTLoader

    assert options(LiveTensorRTLoader, "engine") == ["none yet: run Live TensorRT Build, then R"]
    with pytest.raises(ValueError, match=r"engine: none yet.* is not there"):
        load("none yet: run Live TensorRT Build, then R")
    first, second = build(tiny.model()), build(tiny.model(), rows=2)
    assert options(LiveTensorRTLoader, "engine") == [second, first]
    monkeypatch.setattr(api, "gpu", lambda: None)
    assert options(LiveTensorRTLoader, "engine") == [
        "TensorRT needs an NVIDIA GPU, and torch sees none here"
    ]
    with pytest.raises(ValueError, match="engine: TensorRT needs an NVIDIA GPU"):
        load(first)
    monkeypatch.delitem(sys.modules, "tensorrt")
    assert options(LiveTensorRTLoader, "engine")[0].startswith(
        "tensorrt not installed: pip install"
    )
    with pytest.raises(ValueError, match=r"The engine was not built: tensorrt not installed"):
        build(tiny.model())


def test_a_mismatch_is_named_and_can_be_rebuilt(trt, monkeypatch):
    from livediffusion.compiled.trt import api

    model = tiny.model()
    name = build(model)
    moved = {"gpu": "NVIDIA Another", "capability": "9.0", "cuda_driver": 13}
    monkeypatch.setattr(api, "gpu", lambda: dict(moved))
    with pytest.raises(
        ValueError, match=r"was built for another GPU: Double GPU.*switch rebuild on"
    ):
        load(name, model)
    with pytest.raises(ValueError, match="rebuild: no model to build from"):
        load(name, rebuild=True)
    loaded = load(name, model, rebuild=True)
    assert trt.built == 2
    assert tiny.rms(sampled(loaded), sampled(model)) <= 1e-5
    # the old one stays for the machine that it is for
    from livediffusion.compiled.trt import files
    from livediffusion.host.models import tensorrt

    assert len(files.listed(tensorrt.folders())) == 2


def test_another_lora_can_be_rebuilt(trt):
    model = tiny.model()
    name = build(model)
    changed = lora(model)
    with pytest.raises(ValueError, match=r"model: .* was built from another model"):
        load(name, changed)
    loaded = load(name, changed, rebuild=True)
    assert trt.built == 2
    assert tiny.rms(sampled(loaded), sampled(changed)) <= 1e-5
    assert load(name, changed, rebuild=True) is not None and trt.built == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"width": 60}, "width: 60 is no multiple of 8"),
        ({"height": 100}, "height: 100 is no multiple of 8"),
        ({"name": "../evil"}, "name: '../evil' cannot begin a file name"),
        ({"name": ""}, "name: '' cannot begin a file name"),
        ({"refit": True, "precision": "bf16"}, "refit: weights of bf16"),
    ],
)
def test_bad_input_is_named(settings, said, trt):
    with pytest.raises(ValueError, match=said):
        build(tiny.model(), **settings)
    assert trt.built == 0


def test_a_model_that_is_no_unet_is_refused(trt):
    model = tiny.model()
    model.model.diffusion_model = torch.nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"model: Linear cannot be built\. Use a model of the SD1.5"
    ):
        build(model)


@pytest.mark.slow
def test_the_clip_workflow_gives_the_same_pictures(monkeypatch):
    """The demo's clip graph in ComfyUI's own executor, eager and on ONNX Runtime."""
    import inprocess

    pictures = []
    monkeypatch.setitem(inprocess.CLASSES, "TestKeep", keeper(pictures))
    monkeypatch.setitem(inprocess.CLASSES, "TestFrames", frames())
    with inprocess.comfy() as (server, _):
        for engine in ("eager", "onnxruntime"):
            graph = json.loads((DEMO / "clip_graph.json").read_text(encoding="utf-8"))
            for name in ("load", "video", "save"):
                del graph[name]
            graph["frames"] = {"class_type": "TestFrames", "inputs": {}}
            graph["positive"]["inputs"]["text"] = "neon night"
            graph["keep"] = {"class_type": "TestKeep", "inputs": {"image": ["decode", 0]}}
            graph["engine"]["inputs"]["engine"] = engine
            entry = server.wait_for(server.put(graph, ["keep", "engine"]), 120)
            assert entry["status"]["status_str"] == "success", entry["status"]
    eager, compiled = pictures
    assert eager.shape == (6, 256, 256, 3)
    assert float((eager - compiled).abs().max()) <= 1e-3
    assert eager.std() > 0.05


def keeper(pictures):
    class TestKeep:
        INPUT_TYPES = classmethod(lambda cls: {"required": {"image": ("IMAGE",)}})
        RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "run", True, "test"

        def run(self, image):
            pictures.append(image.clone().cpu())
            return {}

    return TestKeep


def frames():
    class TestFrames:
        INPUT_TYPES = classmethod(lambda cls: {"required": {}})
        RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "run", "test"

        def run(self):
            from pictures import pictures

            return (pictures(6),)

    return TestFrames
