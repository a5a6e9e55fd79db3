"""Engines of TensorRT that hold what frames remember of each other.

TensorRT is the double, but for the builds of NVIDIA's TensorRT for RTX, which need no GPU.
"""

import itertools
import os
import re
import sys

import coherent
import pytest
from helping import KINDS, SIGMAS, helping
from on_tensorrt import beside, built, engine, loaded

pytestmark = [pytest.mark.comfy, pytest.mark.slow]
pytest.importorskip("onnxruntime")
LONG = "LIVEDIFFUSION_LONG" in os.environ


@pytest.fixture(autouse=True)
def inference(at_once):
    """Under ComfyUI's own mode of torch."""


BOTH = {"memory": {"frames": 2, "interval": 1, "fuse": 0.3}, "future": {}}


@pytest.mark.parametrize(("kind", "precision"), [
    ("unfused", "fp16"), *(itertools.product(KINDS, ("fp32", "fp16")) if LONG else ()),
])  # fmt: skip
def test_a_stream_on_an_engine(kind, precision, trt):
    """Future attention at every number of rows that the ring has while it fills, too."""
    plain = helping(coherent.model(), **KINDS[kind])
    made, _ = loaded(built(plain, precision=precision), plain)
    steady = 20 if kind == "future" else 8
    # less precise, another of two alike features may be the nearest one
    near = 1e-4 if precision == "fp32" else 5e-2
    beside(plain, made, runs=20, steady=steady, near=near, sigmas=SIGMAS)


def test_one_engine_for_sizes_guidance_and_fewer_rows(trt):
    """With what is remembered as large as the picture; more to look at than is there is refused."""
    plain = helping(coherent.model(), **BOTH)
    made, _ = loaded(built(plain, 4, 128, dynamic_size=True), plain)
    beside(plain, made, runs=6, steady=2, size=8)
    beside(plain, made, runs=6, steady=2, size=16, mode="full")
    beside(plain, made, runs=5, steady=2, size=24, frames=2)
    ran = engine(made).ran
    beside(plain, made, runs=6, steady=0, mode="onetime-negative")
    assert engine(made).ran == ran
    assert "rows of this guidance see unequally many others" in engine(made).reason
    unfit = coherent.model(), helping(coherent.model(), memory={"fuse": 0.0}, future={})
    for other, said in zip(unfit, ("this call has none of it", "0 layers fused"), strict=True):
        # a node behind the loader that asks for something else
        behind = made.clone()
        behind.wrappers["diffusion_model"].pop("livediffusion.coherence")
        if other is unfit[1]:
            behind = helping(behind, memory={"fuse": 0.0}, future={})
        beside(other, behind, runs=6, steady=0)
        assert engine(made).ran == ran and said in engine(made).reason


def test_engine_and_model_that_differ_are_told(trt):
    from livediffusion.compiled.trt import files
    from livediffusion.host.models import tensorrt

    base = coherent.model()
    plain = helping(base, memory={})
    without, within = built(base), built(plain)
    assert without != within
    with pytest.raises(ValueError, match=(
        r"model: the MODEL has memory in \d layers, 2 keyframes, \d layers fused, and the engine "
        "was built with nothing of it. Queue Live TensorRT Build with this model"
    )):  # fmt: skip
        loaded(without, plain)
    with pytest.raises(ValueError, match=r"has memory .* 3 keyframes.* with .* 2 keyframes"):
        loaded(within, helping(base, memory={"frames": 3}))
    with pytest.raises(ValueError, match=r"model: .* was built with memory in .* has to run. Wire"):
        tensorrt.load(within, files.check(within, tensorrt.here), lambda text: None)
    # the nodes may come behind the loader
    made, said = loaded(within, base)
    assert re.search("it was built with memory in .*only behind such nodes does it run", said[-1])
    beside(plain, helping(made, memory={}), runs=8, steady=2)
    late, _ = loaded(without, base)
    beside(plain, helping(late, memory={}), runs=7, steady=0)
    assert engine(late).ran == 0 and "built without what the MODEL has now" in engine(late).reason
    # and rebuilt it is one with a memory
    again = tensorrt.again(files.check(without, tensorrt.here), plain)
    assert again.made() == files.read(within).made
    # settings that are no part of it
    loaded(within, helping(base, memory={"interval": 5, "fuse": 0.9, "threshold": 0.1}))


@pytest.mark.parametrize("kind", ["both", "unfused"] if LONG else ["both"])
def test_a_real_build(kind, tmp_path, monkeypatch):
    """NVIDIA's parser and builder take such a file."""
    pytest.importorskip("tensorrt_rtx", reason="no tensorrt_rtx: python run.py test brings it")
    import folder_paths
    from livediffusion.compiled.trt import api, files, targets

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(api, "gpu", lambda: None)
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    plain = helping(coherent.model(), **KINDS[kind])
    for dynamic in (True, False) if LONG else (True,):
        path = built(plain, 2, 128, "fp16", gpus="RTX 40", dynamic_size=dynamic)
        sidecar = files.whole(path)
        assert sidecar.made.targets == targets.SETS["RTX 40"]
        assert sidecar.made.layers.behind and path.read_bytes()[:4] == b"vtrt"
