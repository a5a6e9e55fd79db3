"""NVIDIA's TensorRT for RTX itself, which builds without a GPU: parser, builder, progress, cancel.

What was built cannot run here: its ONNX file is run by ONNX Runtime under the engine's sidecar.
"""

import itertools
import os
import pathlib
import shutil
import sys
import threading

import pytest
import tiny
import torch
from compiled_models import call

pytestmark = [pytest.mark.comfy, pytest.mark.slow]
pytest.importorskip("onnxruntime")
rtx = pytest.importorskip("tensorrt_rtx", reason="no tensorrt_rtx: python run.py test brings it")

ONE, FIVE = "RTX 40", "RTX 30 and newer"
WORDS = (tuple(tiny.LAYOUTS), ("static", "dynamic"), ("fp16", "bf16"), ("", "controlnet"),
         (ONE, FIVE))  # fmt: skip
# every two of the words together, in as few builds as do it; more of all of them are asked for
PAIRS = [
    ("SD1.5", "static", "fp16", "", ONE),
    ("SD1.5", "dynamic", "bf16", "controlnet", FIVE),
    ("SD2.1", "static", "bf16", "controlnet", ONE),
    ("SD2.1", "dynamic", "fp16", "", FIVE),
    ("SDXL", "static", "fp16", "controlnet", FIVE),
    ("SDXL", "dynamic", "bf16", "", ONE),
]
REST = [case for case in itertools.product(*WORDS) if case not in PAIRS]
COUNT = int(os.environ.get("LIVEDIFFUSION_RTX_BUILDS", len(PAIRS)))
CARD = {"gpu": "NVIDIA GeForce RTX 4090", "capability": "8.9", "cuda_driver": 13}


@pytest.fixture(scope="module", autouse=True)
def alone(comfyui):
    """TensorRT for RTX on a computer without a GPU."""
    from livediffusion.compiled.trt import api

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setitem(sys.modules, "tensorrt", None)
        patch.setattr(api, "gpu", lambda: None)
        yield


def built(folder, model, precision="fp16", size=64, report=lambda *told: None, **settings):
    """An engine of two rows in a folder."""
    import folder_paths
    from livediffusion.host.models import tensorrt

    settings = {"gpus": ONE, "controlnet": False, **settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_paths, "models_dir", str(folder))
        asked = tensorrt.wish(model, size, size, 2, 77, precision=precision, **settings)
        return tensorrt.build(model, asked, "unet", report)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """One that is whole; tests copy it."""
    return built(tmp_path_factory.mktemp("models"), tiny.model())


def copied(engine, tmp_path):
    for file in (engine, pathlib.Path(f"{engine}.json")):
        shutil.copy(file, tmp_path / file.name)
    return tmp_path / engine.name


def on(card):
    """What a computer with this GPU has to match."""
    from livediffusion.compiled import onnx_export

    facts = {**card, "exporter": onnx_export.VERSION}
    return lambda library: {
        **facts, "tensorrt": rtx.__version__ if library == "tensorrt-rtx" else None
    }  # fmt: skip


def test_every_two_words_are_together():
    for i, j in itertools.combinations(range(len(WORDS)), 2):
        assert {(c[i], c[j]) for c in PAIRS} == set(itertools.product(WORDS[i], WORDS[j]))


@pytest.mark.parametrize("case", [*PAIRS, *REST][:COUNT], ids=" ".join)
def test_a_real_build(case, tmp_path, monkeypatch):
    """NVIDIA's builder takes the file, and what it took is the UNet."""
    import onnx
    import tensorrt_double
    from livediffusion.compiled import onnx_export
    from livediffusion.compiled.trt import api, files, targets
    from livediffusion.compiled.trt.engine import TensorRT
    from livediffusion.host.models.unet import ComfyUNet

    layout, size, precision, control, gpus = case
    model, told, kept, dynamic = tiny.model(layout=layout, prompt=1.0), [], [], size == "dynamic"
    export = onnx_export.export

    def keeping(*args, **kwargs):
        exported = export(*args, **kwargs)
        kept.append(onnx.load(str(exported.path)))
        return exported

    monkeypatch.setattr(onnx_export, "export", keeping)
    path = built(
        tmp_path, model, precision, 128 if dynamic else 64, lambda *step: told.append(step),
        controlnet=bool(control), dynamic_size=dynamic, gpus=gpus,
    )  # fmt: skip
    phases = {phase for phase, _, _ in told}
    assert {"exporting", "Building engine", "Optimizing graph"} <= phases
    sidecar = files.check(path, on(CARD))
    assert sidecar.made.targets == targets.SETS[gpus] and sidecar.made.gpu == ""
    assert path.read_bytes()[:4] == b"vtrt" and not list(path.parent.glob("timing-*"))
    heads = {i.name: i.type.tensor_type.elem_type for i in kept[0].graph.input}
    half = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    assert heads.pop("timesteps") == onnx.TensorProto.FLOAT and set(heads.values()) == {half}

    double = tensorrt_double.make(rtx.__version__, gpu="", rtx=True)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", double)
    monkeypatch.setattr(api, "gpu", lambda: dict(CARD))
    path.write_bytes(
        tensorrt_double.plan(
            kept[0], version=rtx.__version__, gpu="", refit=[], targets=["SM89"],
            profile=sidecar.made.profile if dynamic else {},
        )
    )  # fmt: skip
    compiled, unet = (
        TensorRT(path, sidecar, torch.device("cpu")),
        ComfyUNet(model.model.diffusion_model),
    )
    compiled.prepare(None, None)
    for latents in ((8, 8), (16, 24)) if dynamic else ((8, 8),):
        asked = call(model, 2, latents, control=bool(control))
        error = tiny.rms(compiled(asked), unet(asked))
        assert error <= {"fp16": 5e-3, "bf16": 4e-2}[precision], (latents, error)


@pytest.mark.parametrize("layout", ["SD1.5", "SDXL"])
def test_every_weight_can_be_marked_for_refit(layout, tmp_path):
    """Marking is the parser's and the network's; only the end of such a build needs a GPU."""
    from livediffusion.compiled import onnx_export
    from livediffusion.compiled.engine import Refused
    from livediffusion.compiled.trt import api, builder
    from livediffusion.host.models.unet import ComfyUNet

    model = tiny.model(layout=layout)
    unet = ComfyUNet(model.model.diffusion_model)
    exported = onnx_export.export(
        unet, call(model, 2), tmp_path / "unet.onnx", torch.float16, named=True
    )
    names = tuple(exported.weights)
    assert len(names) > 100

    def job(weights):
        return builder.Job(
            exported.path, tmp_path / "engine", tmp_path / "timing", "fp16", {}, weights, ("8.9",)
        )

    library = api.load("tensorrt-rtx")
    with pytest.raises(Refused, match="cannot exchange the weights nobodys"):
        builder.build(library, job((*names, "nobodys")), lambda *told: True)
    with pytest.raises(builder.Cancelled):
        builder.build(library, job(names), lambda *told: False)
    if layout == "SD1.5":
        with pytest.raises(Refused, match=r"TensorRT for RTX built nothing: .*(CUDA|Cuda)"):
            builder.build(library, job(names), lambda *told: True)
    assert [p.name for p in tmp_path.iterdir()] == ["unet.onnx"]


def test_what_cannot_be_built_is_said(engine, tmp_path):
    """By us where it is known before, in NVIDIA's words where not."""
    from livediffusion.compiled.engine import Refused
    from livediffusion.compiled.trt import api, builder

    model = tiny.model()
    for settings, said in (
        ({"refit": True}, "refit: tensorrt-rtx needs a GPU to build"),
        ({"precision": "bf16", "gpus": "RTX 20"}, r"precision: RTX 20 \(7\.5\) has no bf16"),
        ({"precision": "bf16", "gpus": "RTX 20 and newer"}, "has no bf16"),
        ({"gpus": "this GPU"}, "not built: there is no NVIDIA GPU here to build for"),
        ({"library": "tensorrt"}, "not built: tensorrt not installed"),
        ({"gpus": "H100"}, "targets: 'H100' is none of this GPU, RTX 30 and newer"),
    ):
        with pytest.raises(ValueError, match=said):
            built(tmp_path, model, **settings)
    library = api.load("tensorrt-rtx")
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"no ONNX file at all")
    job = builder.Job(bad, tmp_path / "engine", tmp_path / "timing", "fp16", {}, (), ("8.9",))
    with pytest.raises(Refused, match=r"TensorRT for RTX cannot read the UNet: ."):
        builder.build(library, job, lambda *told: True)
    assert not (tmp_path / "engine").exists()


def test_the_gpus_are_nvidias(comfyui):
    from livediffusion.compiled.trt import api, targets

    library = api.load("tensorrt-rtx")
    assert set(targets.GPUS) <= set(library.targets)
    assert "9.0" not in library.targets and not library.times and library.typed
    for capability in library.targets:
        assert library.capability(capability).name == f"SM{capability.replace('.', '')}"


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ({"gpu": "NVIDIA GeForce RTX 5090", "capability": "12.0"},
         r"built for other GPUs: RTX 40 \(8\.9\), and here is NVIDIA GeForce RTX 5090 \(12\.0\)"),
        ({"tensorrt": "1.8.0.1"}, "another TensorRT: .*, and here is 1.8.0.1"),
        ({"tensorrt": None}, "was built with tensorrt-rtx, which is not installed here"),
    ],
)  # fmt: skip
def test_an_engine_for_others_is_refused_naming_both(card, said, engine):
    from livediffusion.compiled.trt import files

    with pytest.raises(files.Unfit, match=said):
        files.check(engine, lambda library: {**on(CARD)(library), **card})
    # another card of the kind, another driver
    other = {"gpu": "NVIDIA RTX 6000 Ada", "capability": "8.9", "cuda_driver": 14}
    assert files.check(engine, on(other)).made.targets == ("8.9",)


def test_a_cut_engine_is_said(engine, tmp_path):
    """By its sidecar; and where that agrees, NVIDIA's runtime notices, and is quoted."""
    from livediffusion.compiled.engine import Refused
    from livediffusion.compiled.trt import files
    from livediffusion.compiled.trt.engine import TensorRT

    path = copied(engine, tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(files.Unfit, match=r"is damaged: .* bytes instead of"):
        files.check(path, on(CARD))
    cut = TensorRT(path, files.read(path), torch.device("cpu"))
    with pytest.raises(Refused, match=r"TensorRT for RTX cannot load .*: .*Serialization"):
        cut.prepare(None, None)
    whole = TensorRT(engine, files.read(engine), torch.device("cpu"))
    with pytest.raises(Refused, match=r"TensorRT for RTX cannot load .*: .*CUDA driver"):
        whole.prepare(None, None)


def test_a_cancel_ends_a_real_build(tmp_path):
    import comfy.model_management

    def stop(phase, step, steps):
        if phase == "Optimizing graph":
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        built(tmp_path, tiny.model(), report=stop)
    assert list((tmp_path / "tensorrt").iterdir()) == []
    assert "livediffusion-tensorrt" not in {t.name for t in threading.enumerate()}
