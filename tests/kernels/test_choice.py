"""Who runs an op, and why: the kernel, its reference, or the custom op under torch.compile."""

import contextlib
import copy
import importlib.util
import logging

import pytest
import torch
from livediffusion.kernels import (
    choice,
    group_norm_silu,
    likeness,
    picture_in,
    picture_out,
    stream_enter,
    stream_step,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

PICTURE = torch.arange(37 * 53 * 3).reshape(37, 53, 3).to(torch.uint8)
IN = {
    "picture": PICTURE, "height": 32, "width": 32, "fit": "crop", "mirror": False,
    "dtype": torch.float16, "layout": "NCHW", "scale": 1.0, "shift": 0.0,
}  # fmt: skip
OUT = {"image": torch.rand(2, 3, 5, 7), "layout": "NCHW", "scale": 255.0, "shift": 0.0}
LIKE = {"a": PICTURE, "b": PICTURE}
NORM = {
    "x": torch.rand(2, 8, 5, 7).contiguous(memory_format=torch.channels_last), "groups": 4,
    "weight": torch.ones(8), "bias": torch.zeros(8), "eps": 1e-5, "silu": True,
}  # fmt: skip


ROW, ROWS = torch.rand(2, 4, 5, 7), torch.tensor([1])
ENTER = {
    "state": torch.rand(2, 2, 4, 5, 7), "source": torch.rand(1, 4, 5, 7), "entry": None,
    "entering": ROWS, "mix": torch.rand(2, 1, 1, 1, 1), "base": None,
    "gain": torch.rand(2, 2, 1, 1, 1), "bad": torch.ones(2, dtype=torch.int32),
    "dropped": torch.ones(1, dtype=torch.int64), "tail": True, "dtype": torch.float32,
}  # fmt: skip
STEP = {
    "state": torch.rand(2, 2, 4, 5, 7), "after": ROW, "out": torch.rand(3, 4, 5, 7),
    "weights": torch.rand(3, 2), "second": "reference", "reference": ROW.clone(),
    "past": [ROW.clone()], "kept": torch.rand(4, 2), "own": torch.rand(2, 1), "entering": ROWS,
    "bad": torch.zeros(2, dtype=torch.int32),
}  # fmt: skip


@pytest.mark.parametrize(("op", "arguments"), [(stream_enter, ENTER), (stream_step, STEP)])
def test_the_ends_of_a_tick_are_sound_too(op, arguments):
    """They write what they are given."""
    results = torch.library.opcheck(op.custom, (), arguments)
    assert set(results.values()) == {"SUCCESS"}
    mine, truth = copy.deepcopy(arguments), copy.deepcopy(arguments)
    op.custom(**mine), op.reference(**truth)
    written = "state" if op is stream_enter else "reference"
    assert torch.equal(mine[written], truth[written])
    assert not torch.equal(mine[written], arguments[written])


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (picture_in, IN),
        (picture_in, IN | {"layout": "channels_last", "fit": "pad", "mirror": True}),
        (picture_in, IN | {"layout": "BHWC", "height": 37, "width": 53}),
        (picture_out, OUT),
        (likeness, LIKE),
        (group_norm_silu, NORM),
    ],
)
def test_the_custom_op_and_its_fake_are_sound(op, arguments):
    """Among others that fake and real results have the same shape, type and strides."""
    results = torch.library.opcheck(op.custom, (), arguments)
    assert set(results.values()) == {"SUCCESS"}
    assert torch.equal(op.custom(**arguments), op.reference(**arguments))


def test_a_compiled_graph_holds_the_custom_op():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def body(image):
        return picture_out(image, "NCHW", 255.0, 0.0) // 2

    compiled = torch.compile(body, backend=backend, fullgraph=True)
    assert torch.equal(compiled(OUT["image"]), body(OUT["image"]))
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert called[0] == "livediffusion.picture_out.default" and len(called) == 2


@pytest.mark.parametrize(
    ("op", "arguments", "words"),
    [
        (picture_in, IN, ""),
        (picture_in, IN | {"picture": PICTURE[::2, 1::3]}, ""),
        (picture_in, IN | {"picture": PICTURE.float()}, "float16 of torch.float32"),
        (picture_in, IN | {"dtype": torch.float64}, "not torch.float64"),
        (picture_in, IN | {"layout": "CHWN"}, "arguments are wrong"),
        (picture_in, IN | {"picture": PICTURE[:0]}, "empty"),
        (picture_in, IN | {"width": 16385}, "too large: more than 16384 pixels"),
        (picture_in, IN | {"height": 4, "fit": "stretch"}, "shrinks by more than 8"),
        (picture_in, IN | {"height": 5, "width": 7}, ""),
        (picture_out, OUT, ""),
        (picture_out, OUT | {"image": PICTURE[None]}, "not torch.uint8"),
        (picture_out, OUT | {"image": torch.rand(3, 5, 7)}, "arguments are wrong"),
        (picture_out, OUT | {"image": torch.rand(0, 3, 5, 7)}, "empty"),
        (picture_out, OUT | {"image": torch.rand(1).expand(1, 3, 30000, 30000)}, "too large"),
        (likeness, LIKE, ""),
        (likeness, LIKE | {"a": PICTURE.float()}, "uint8, not torch.float32 and torch.uint8"),
        (likeness, LIKE | {"a": PICTURE[1:]}, "different shapes"),
        (likeness, {"a": PICTURE[:, ::2], "b": PICTURE[:, ::2]}, "not contiguous"),
        (group_norm_silu, NORM, ""),
        (group_norm_silu, NORM | {"x": torch.rand(2, 8, 5, 7)}, ""),
        (group_norm_silu, NORM | {"weight": torch.ones(8, dtype=torch.float16)}, ""),
        (group_norm_silu, NORM | {"x": NORM["x"].double()}, "not torch.float64"),
        (group_norm_silu, NORM | {"x": NORM["x"][0]}, "not [N, C, H, W]"),
        (group_norm_silu, NORM | {"groups": 3}, "arguments are wrong"),
        (group_norm_silu, NORM | {"x": NORM["x"][..., ::2]}, "neither contiguous nor"),
        (group_norm_silu, NORM | {"bias": torch.zeros(16)[::2]}, "bias is not contiguous"),
        (group_norm_silu, NORM | {"x": torch.empty(1, 8, 4096, 4096, device="meta")}, "large"),
    ],
)
def test_every_constraint_has_its_words(op, arguments, words):
    reason = op.unfit(**arguments)
    assert words in reason and bool(reason) == bool(words)


@pytest.fixture
def no_cache():
    for cached in (choice.triton_missing, choice.gpu_unfit):
        cached.cache_clear()
    yield
    for cached in (choice.triton_missing, choice.gpu_unfit):
        cached.cache_clear()


def test_where_a_kernel_runs(monkeypatch, no_cache):
    """Decided on fake tensors, which are on a GPU without there being one."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with FakeTensorMode():
        here, there, second = (torch.empty(2, 2, device=d) for d in ("cpu", "cuda:0", "cuda:1"))
        assert choice.place_unfit(there, there) == ""
        assert choice.place_unfit(here) == "not a CUDA tensor but one on cpu"
        assert "different devices" in choice.place_unfit(there, here)
        assert "different devices" in choice.place_unfit(there, second)
        there.requires_grad = True
        assert "no gradient" in choice.place_unfit(there)
        with torch.no_grad():
            assert choice.place_unfit(there) == ""

            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
            choice.gpu_unfit.cache_clear()
            assert choice.place_unfit(there) == "the GPU is older than sm_75: sm_70"
            monkeypatch.setattr(torch.version, "hip", "6.4")
            choice.gpu_unfit.cache_clear()
            assert "NVIDIA" in choice.place_unfit(there)
            monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
            choice.triton_missing.cache_clear()
            assert choice.place_unfit(there) == "Triton is not installed"


def _unfit(x, count):
    return "the count is odd" if count % 2 else ""


@pytest.fixture
def double(monkeypatch):
    """An op whose kernel would run on this CPU, and what the kernel was called with."""

    def test_double(x: Tensor, count: int) -> Tensor:
        if count < 0:
            raise ValueError("count: expected none below 0")
        return x * count

    op = choice.op("triton_double", unfit=_unfit)(test_double)
    monkeypatch.setattr(choice, "place_unfit", lambda *tensors: "")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return op


def test_the_kernel_runs_where_it_can(double):
    double.launch = lambda x, count: x * 100
    assert double(torch.ones(1), count=2) == 100
    assert torch.ops.livediffusion.test_double(torch.ones(1), 2) == 100
    assert double(torch.ones(1), 3) == 3
    assert double.why_not(torch.ones(1), 3) == "the count is odd"
    assert double.__name__ == "test_double"


def test_a_kernel_that_fails_is_not_tried_again(double, caplog):
    calls = []

    def launch(x, count):
        calls.append(count)
        raise RuntimeError("no compiler found")

    double.launch = launch
    with caplog.at_level(logging.WARNING):
        assert double(torch.ones(1), 2) == 2
    assert "test_double runs without its kernel" in caplog.text
    assert double(torch.ones(1), 4) == 4
    assert calls == [2]
    assert double.why_not(torch.ones(1), 2) == "Triton failed: RuntimeError: no compiler found"


def test_a_kernel_that_fails_in_a_capture_is_not_given_up(double, monkeypatch):
    """The capture is broken either way: nothing else may run in it, and later the kernel may."""

    def launch(x, count):
        raise RuntimeError("operation not permitted when stream is capturing")

    double.launch = launch
    monkeypatch.setattr(choice, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match="not permitted"):
        double(torch.ones(1), 2)
    assert double.failed == ""
    monkeypatch.setattr(choice, "capturing", lambda: False)
    double.launch = lambda x, count: x * 100
    assert double(torch.ones(1), 2) == 100


def test_nothing_is_captured_without_a_gpu():
    assert choice.capturing() is False or torch.cuda.is_available()


def test_a_kernel_is_not_blamed_for_what_its_reference_cannot_do(double):
    def launch(x, count):
        raise ZeroDivisionError

    double.launch = launch
    with pytest.raises(ValueError, match="count: expected"):
        double(torch.ones(1), -2)
    assert double.why_not(torch.ones(1), 2) == ""

    def full(x, count):
        raise torch.cuda.OutOfMemoryError

    double.launch = full
    with pytest.raises(torch.cuda.OutOfMemoryError):
        double(torch.ones(1), 2)
    assert double.why_not(torch.ones(1), 2) == ""
