"""TensorRT and TensorRT for RTX side by side: which one is taken, for which GPUs, and what is kept.

Both are the double; test_rtx.py has NVIDIA's own.
"""

import json
import sys

import pytest
import tensorrt_double
import tiny
import torch
from compiled_models import call

pytestmark = pytest.mark.comfy
pytest.importorskip("onnxruntime")

ADA = {"gpu": "NVIDIA GeForce RTX 4090", "capability": "8.9", "cuda_driver": 13}
HOPPER = {"gpu": "NVIDIA H100", "capability": "9.0", "cuda_driver": 13}
BLACKWELL = {"gpu": "NVIDIA GeForce RTX 5090", "capability": "12.0", "cuda_driver": 13}


@pytest.fixture
def computer(comfyui, tmp_path, monkeypatch):
    """Says what this computer has: a GPU or None, and which libraries; gives their doubles."""
    import folder_paths
    from livediffusion.compiled.trt import api

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    doubles = {
        "tensorrt": tensorrt_double.make(),
        "tensorrt-rtx": tensorrt_double.make("1.7.1.116", gpu="", rtx=True),
    }

    def has(gpu, *names):
        monkeypatch.setattr(api, "gpu", lambda: gpu and dict(gpu))
        for name, module in api.MODULES.items():
            monkeypatch.setitem(sys.modules, module, doubles[name] if name in names else None)
        if gpu:
            doubles["tensorrt-rtx"].here = gpu["capability"]
        return doubles["tensorrt-rtx"]

    with torch.inference_mode():
        yield has


BOTH = ("tensorrt", "tensorrt-rtx")


@pytest.mark.parametrize(
    ("gpu", "names", "asked", "taken", "told", "why"),
    [
        (ADA, BOTH, None, "tensorrt-rtx", ("8.9",), "it builds in less time"),
        (ADA, ["tensorrt"], None, "tensorrt", (), "tensorrt-rtx is not installed"),
        (ADA, ["tensorrt-rtx"], None, "tensorrt-rtx", ("8.9",), "tensorrt is not installed"),
        (HOPPER, BOTH, None, "tensorrt", (), "tensorrt-rtx does not run on compute capability 9.0"),
        (HOPPER, BOTH, ("8.9",), "tensorrt-rtx", ("8.9",), "tensorrt builds for no other GPUs"),
        (None, BOTH, ("8.6", "12.0"), "tensorrt-rtx", ("8.6", "12.0"), "tensorrt builds for no"),
    ],
)
def test_auto_takes_one_and_says_why(gpu, names, asked, taken, told, why, computer):
    from livediffusion.compiled.trt import api

    computer(gpu, *names)
    library, capabilities, said = api.chosen("auto", asked)
    assert (library.name, capabilities) == (taken, told)
    assert said.startswith(why)
    assert api.chosen(taken, asked)[::2] == (library, "chosen")


@pytest.mark.parametrize(
    ("gpu", "names", "name", "asked", "said"),
    [
        (ADA, [], "auto", None, r"tensorrt not installed: pip install tensorrt_rtx .* or pip inst"),
        (HOPPER, [], "auto", None, r"tensorrt not installed: pip install tensorrt \("),
        (HOPPER, ["tensorrt-rtx"], "auto", None, r"capability 9\.0: pip install tensorrt \("),
        (HOPPER, BOTH, "tensorrt-rtx", None, r"does not build for 9\.0, only for RTX 20 \(7\.5\)"),
        (ADA, ["tensorrt"], "auto", ("8.6",), "tensorrt-rtx not installed: pip install tensorrt_r"),
        (ADA, BOTH, "tensorrt", ("8.6",), "for the GPU it runs on alone: choose targets this GPU"),
        (None, BOTH, "auto", None, "no NVIDIA GPU here to build for: choose targets by name"),
        (None, ["tensorrt"], "auto", None, "TensorRT needs an NVIDIA GPU"),
        (None, BOTH, "tensorrt", None, "TensorRT needs an NVIDIA GPU"),
    ],
)
def test_what_none_can_do_is_said(gpu, names, name, asked, said, computer):
    from livediffusion.compiled.engine import Refused
    from livediffusion.compiled.trt import api

    computer(gpu, *names)
    with pytest.raises(Refused, match=said):
        api.chosen(name, asked)


def node(model, **settings):
    from livediffusion.nodes.tensorrt import LiveTensorRTBuild

    LiveTensorRTBuild.hidden = type("Hidden", (), {"unique_id": None})
    asked = {"width": 64, "height": 64, "rows": 2, "context_tokens": 77, "controlnet": False,
             "precision": "fp32", "name": "x", "dynamic_size": False, "refit": False}  # fmt: skip
    out = LiveTensorRTBuild.execute(model, **{**asked, **settings})
    return out.args[0], json.loads(out.ui["livediffusion_engine"][0])


def load(engine, model=None, rebuild=False):
    from livediffusion.nodes.tensorrt import LiveTensorRTLoader

    LiveTensorRTLoader.hidden = type("Hidden", (), {"unique_id": None})
    return LiveTensorRTLoader.execute(engine, rebuild, model).args[0]


@pytest.mark.slow
def test_one_engine_for_several_gpus(computer):
    """Built where there is none, refused naming both where it is for others, built anew there."""
    from livediffusion.compiled.trt import files
    from livediffusion.host.models import tensorrt

    rtx = computer(None, *BOTH)
    model = tiny.model()
    wide, told = node(model, targets="RTX 30 and newer")
    assert told["library"] == "tensorrt-rtx" and "no other GPUs" in told["why"]
    assert rtx.targets == [["SM80", "SM86", "SM89", "SM120", "SM121"]]
    assert rtx.flags == {"STRONGLY_TYPED"} and rtx.timing == [None]
    narrow, _ = node(model, targets="RTX 40")
    with pytest.raises(ValueError, match="engine: TensorRT needs an NVIDIA GPU"):
        load(wide)

    for card in (ADA, BLACKWELL):
        computer(card, *BOTH)
        assert node(model, targets="RTX 30 and newer")[0] == wide and rtx.built == 2
        assert load(wide) is not None
    with pytest.raises(ValueError, match=r"built for other GPUs: RTX 40 \(8\.9\), and here is NV"):
        load(narrow)
    load(narrow, model, rebuild=True)
    assert rtx.built == 3 and rtx.targets[-1] == ["SM120"]
    computer(HOPPER, *BOTH)
    with pytest.raises(ValueError, match=r"RTX 50 \(12\.0\).*, and here is NVIDIA H100 \(9\.0\)"):
        load(wide)
    computer(BLACKWELL, "tensorrt")
    with pytest.raises(ValueError, match="built with tensorrt-rtx, which is not installed here"):
        load(wide)
    with pytest.raises(ValueError, match="targets: 7 is none of"):
        node(model, targets=7)
    with pytest.raises(ValueError, match="library: 'tensor' is none of auto"):
        node(model, library="tensor")
    # the same engine for another GPU is another file, and a stranger's word is not taken
    made = {p.name: files.read(p).made for p in files.listed(tensorrt.folders()).values()}
    assert len({m.key() for m in made.values()}) == len(made) == 3
    path = files.listed(tensorrt.folders())[narrow]
    beside = files.beside(path)
    told = json.loads(beside.read_text())
    for change in ({"targets": []}, {"library": "tensorrt"}, {"targets": ["9"]}, {"library": "x"}):
        beside.write_text(json.dumps({**told, "made": {**told["made"], **change}}))
        with pytest.raises(files.Unfit):
            files.read(path)


@pytest.mark.slow
def test_an_engine_is_built_anew_with_its_own_library(computer):
    """For the GPUs that it was for, although auto would take the other one by now."""
    from livediffusion.compiled.trt import files
    from livediffusion.host.models import tensorrt

    rtx = computer(ADA, "tensorrt")
    model, changed = tiny.model(), tiny.model(seed=1)
    name, told = node(model)
    assert told == {"engine": name, "library": "tensorrt", "why": "tensorrt-rtx is not installed"}
    computer(ADA, *BOTH)
    wide, _ = node(model, targets="RTX 30 and newer")
    for engine, library in ((name, "tensorrt"), (wide, "tensorrt-rtx")):
        before = set(files.listed(tensorrt.folders()))
        load(engine, changed, rebuild=True)
        ((_, path),) = [x for x in files.listed(tensorrt.folders()).items() if x[0] not in before]
        made, old = files.read(path).made, files.read(path.with_name(engine)).made
        assert made.library == library and made.targets == old.targets and made.model != old.model
    assert rtx.built == 2


def test_engines_of_before_keep_their_names(computer):
    """The key of what TensorRT built does not know that there are two libraries now."""
    from livediffusion.compiled.trt.files import Made

    made = Made("g", "8.9", 12, "10.3", 1, 17, "fp16", "m", ("x",), {"x": ((1,), (1,), (1,))})
    assert made.key() == "63b964462e4c"


@pytest.mark.slow
def test_what_is_compiled_is_kept(computer, caplog):
    """In a file for each kind of GPU; what is damaged, too large or of others is compiled anew."""
    from livediffusion.compiled.trt import files
    from livediffusion.compiled.trt.engine import TensorRT
    from livediffusion.host.models import tensorrt
    from livediffusion.trust import boundary

    rtx = computer(ADA, "tensorrt-rtx")
    model = tiny.model()
    name, _ = node(model, targets="RTX 30 and newer", width=128, height=128, dynamic_size=True)
    path = files.listed(tensorrt.folders())[name]
    sidecar = files.check(path, tensorrt.here)

    def ran(*sizes):
        """How many kernels had to be compiled."""
        before, engine = rtx.compiled, TensorRT(path, sidecar, torch.device("cpu"))
        engine.prepare(None, None)
        for size in sizes:
            engine(call(model, 2, size))
        engine.release()
        return rtx.compiled - before

    assert ran((16, 16)) == 1
    assert ran((16, 16)) == 0 and ran((16, 16), (8, 24)) == 1 and ran((8, 24), (16, 16)) == 0
    config = rtx.configs[-1]
    assert config.cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE"
    assert config.dynamic_shapes_kernel_specialization_strategy.name == "LAZY"
    (file,) = path.parent.glob("*.runtime")
    assert file.name == f"{name}.nvidia-geforce-rtx-4090.runtime"
    assert files.listed(tensorrt.folders()) == {name: path}
    good = file.read_bytes()

    for bad in (good[:-1], b"", good[:40] + b"?" + good[41:], b"x" * 40):
        caplog.clear()
        file.write_bytes(bad)
        assert ran((16, 16), (8, 24)) == 2 and "is damaged" in caplog.text
        assert file.read_bytes() == good
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boundary, "RUNTIME_CACHE", 8)
        assert ran((16, 16)) == 1 and "is larger than" in caplog.text
        assert "too large to be kept" in caplog.text and file.read_bytes() == good
    file.unlink()
    file.mkdir()  # whatever it is, the picture comes
    assert ran((16, 16)) == 1 and "was not written" in caplog.text
    file.rmdir()
    # a driver or version that does not take it
    rtx.__version__ = "1.7.2"
    ran((16, 16))
    rtx.__version__ = "1.7.1.116"
    assert ran((16, 16)) == 1
    # another kind of GPU has its own
    file.write_bytes(good)
    computer(BLACKWELL, "tensorrt-rtx")
    assert ran((16, 16)) == 1 and ran((16, 16)) == 0
    assert len(list(path.parent.glob("*.runtime"))) == 2 and file.read_bytes() == good


@pytest.mark.slow
def test_what_is_compiled_is_written_when_nobody_ends_it(computer):
    """An engine that is dropped, or still there when Python ends."""
    from livediffusion.compiled.trt import files
    from livediffusion.compiled.trt.engine import TensorRT
    from livediffusion.host.models import tensorrt

    computer(ADA, "tensorrt-rtx")
    model = tiny.model()
    name, _ = node(model)
    path = files.listed(tensorrt.folders())[name]
    engine = TensorRT(path, files.read(path), torch.device("cpu"))
    engine.prepare(None, None)
    engine(call(model, 2))
    file = files.runtime_cache(path, ADA["gpu"])
    assert b"unet" not in file.read_bytes()
    assert engine._compiled._end.atexit
    del engine
    assert b"unet" in file.read_bytes()


@pytest.mark.parametrize(("now", "order"), [(7, ["run 7"]), (0, ["9 waits", "run 9", "0 waits"])])
def test_an_engine_runs_beside_cudas_default_stream(now, order, monkeypatch):
    """In the order of torch's stream: on another one it runs itself, on the default one aside."""
    from livediffusion.compiled.trt import api

    seen = []

    class Stream:
        def __init__(self, handle):
            self.cuda_stream = handle

        def wait_stream(self, other):
            assert {self.cuda_stream, other.cuda_stream} == {0, 9}
            seen.append(f"{self.cuda_stream} waits")

    class Context:
        def execute_async_v3(self, stream_handle):
            seen.append(f"run {stream_handle}")
            return "done"

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(now))
    assert api.run(Context(), torch.device("cuda"), Stream(9)) == "done"
    assert seen == order
