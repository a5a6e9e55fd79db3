"""Engines of TensorRT whose rows go on with kept features.

TensorRT is the double, but for the build of NVIDIA's TensorRT for RTX, which needs no GPU.
"""

import itertools
import os
import sys

import coherent
import pytest
from helping import SIGMAS, helping
from on_tensorrt import beside, built, engine, loaded

pytestmark = [pytest.mark.comfy, pytest.mark.slow]
pytest.importorskip("onnxruntime")
LONG = "LIVEDIFFUSION_LONG" in os.environ


@pytest.fixture(autouse=True)
def inference(at_once):
    """Under ComfyUI's own mode of torch."""


@pytest.mark.parametrize(("depth", "precision", "dynamic"), [
    ("finest level", "fp32", True),
    *(itertools.product(("outermost block", "two blocks"), ("fp32", "fp16"), (False, True))
      if LONG else ()),
])  # fmt: skip
def test_a_stream_on_an_engine(depth, precision, dynamic, trt):
    """Every number of rows that run whole, none and all among them; fewer rows than it was built
    for while the ring fills, and other sizes."""
    plain = helping(coherent.model(), reuse={"interval": 6, "depth": depth})
    made, _ = loaded(built(plain, 6, 64, precision, dynamic_size=dynamic), plain)
    near = 1e-4 if precision == "fp32" else 5e-2
    beside(plain, made, runs=10, steady=10, near=near, sigmas=SIGMAS)
    beside(plain, made, runs=4, steady=4, near=near, frames=3)
    if dynamic:
        beside(plain, made, runs=4, steady=4, near=near, size=12, mode="full")


def test_engine_and_model_that_differ_are_told(trt):
    from livediffusion.compiled.trt import files
    from livediffusion.host.models import tensorrt

    base = coherent.model()
    plain = helping(base, reuse={})
    without, within = built(base), built(plain)
    assert files.read(within).made.depth is not None and files.read(without).made.depth is None
    with pytest.raises(ValueError, match=(
        r"model: the MODEL has Live Reuse at depth 1, and the engine was built with none\. Queue"
    )):  # fmt: skip
        loaded(without, plain)
    with pytest.raises(ValueError, match=r"Reuse at depth 0, and .* built with it at depth 1"):
        loaded(within, helping(base, reuse={"depth": "outermost block"}))
    with pytest.raises(ValueError, match="was built with Live Reuse, whose node needs the model"):
        tensorrt.load(within, files.check(within, tensorrt.here), lambda text: None)
    # the node may come behind the loader
    made, said = loaded(within, base)
    assert said[-1].endswith("it was built with Live Reuse: only behind such a node does it run")
    beside(base, made, runs=1, steady=0)
    assert engine(made).ran == 0 and "this call has none of it" in engine(made).reason
    behind, _ = loaded(within, base)
    beside(plain, helping(behind, reuse={}), runs=3, steady=2)
    late, _ = loaded(without, base)
    beside(plain, helping(late, reuse={}), runs=1, steady=0)
    assert engine(late).ran == 0 and "was built without Live Reuse" in engine(late).reason
    # settings that are no part of it
    other = helping(base, reuse={"interval": 9})
    again = tensorrt.again(files.check(without, tensorrt.here), other)
    assert again.made() == files.read(within).made


@pytest.mark.skipif(not LONG, reason="long: LIVEDIFFUSION_LONG")
def test_a_real_build(tmp_path, monkeypatch):
    """NVIDIA's parser and builder take such a file."""
    pytest.importorskip("tensorrt_rtx", reason="no tensorrt_rtx: python run.py test brings it")
    import folder_paths
    from livediffusion.compiled.trt import api, files

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(api, "gpu", lambda: None)
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    plain = helping(coherent.model(), reuse={})
    path = built(plain, 4, 128, "fp16", gpus="RTX 40", dynamic_size=True)
    assert files.whole(path).made.depth == 1 and path.read_bytes()[:4] == b"vtrt"
