"""The kernels on a GPU, at the sizes that they are for, against their references there.

For benchmarks/gpu.py; with LIVEDIFFUSION_CUDA=rehearse on a CPU, where the references stand for
the kernels, so that the tests themselves are known to work.
"""

import copy
import os

import pytest
import torch
from livediffusion.kernels import (
    group_norm_silu,
    likeness,
    picture_in,
    picture_out,
    stream_enter,
    stream_step,
)
from torch.utils._pytree import tree_leaves

pytestmark = pytest.mark.cuda

REHEARSED = os.environ.get("LIVEDIFFUSION_CUDA") == "rehearse"
DEVICE = "cpu" if REHEARSED else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# the approximate divisions, roots and exponentials of a GPU, then rounding
LIMITS = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 2**-7}


def camera(height, width, channels=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (height, width, channels)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=g).to(DEVICE)


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


def same(op, *arguments, exact=False):
    """The op runs its kernel, and that gives what the reference gives, laid out as it does."""
    reason = op.why_not(*arguments)
    assert bool(reason) == REHEARSED, reason
    with torch.no_grad():
        wanted, got = op.reference(*arguments), op(*arguments)
        compiled = op.custom(*arguments)
    assert bool(op.why_not(*arguments)) == REHEARSED, "the kernel failed when it ran"
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    assert got.stride() == wanted.stride() and torch.equal(got, compiled)
    if exact:
        assert torch.equal(got, wanted)
        return
    error = (got.double() - wanted.double()).abs().max()
    assert error <= LIMITS[got.dtype] * wanted.double().abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["BHWC", "NCHW", "channels_last"])
def test_a_camera_comes_in(dtype, layout):
    for mirror in (False, True):
        kind = (mirror, dtype, layout, 2 / 255, -1.0)
        same(picture_in, camera(512, 512), 512, 512, "crop", *kind, exact=True)
        same(picture_in, camera(37, 53, 4)[:, ::2], 37, 27, "crop", *kind, exact=True)
        for fit in ("crop", "pad", "stretch"):
            same(picture_in, camera(720, 1280, 4), 512, 512, fit, *kind)
            same(picture_in, camera(37, 53), 99, 61, fit, *kind)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_goes_out(dtype):
    for image in (normal(1, 512, 512, 3, dtype=dtype), normal(2, 37, 53, 4, dtype=dtype)):
        image[0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        for scale, shift in ((255.0, 0.0), (127.5, 127.5)):
            same(picture_out, image, "BHWC", scale, shift, exact=True)
            same(picture_out, image.movedim(-1, 1), "NCHW", scale, shift, exact=True)
            planes = image.movedim(-1, 1).contiguous()
            same(picture_out, planes, "NCHW", scale, shift, exact=True)


@pytest.mark.parametrize("size", [(512, 512), (37, 53), (720, 1280)])
def test_pictures_are_compared(size):
    a = camera(*size)
    for b in (camera(*size, seed=1), a, 255 - a, torch.zeros_like(a), a // 2):
        same(likeness, a, b, exact=True)
    assert likeness(torch.zeros_like(a), torch.zeros_like(a)).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_group_norm(dtype, layout):
    for shape in ((1, 320, 64, 64), (2, 1280, 8, 8), (4, 1920, 16, 16), (1, 96, 37, 53)):
        x = (normal(*shape, dtype=dtype) * 3 + 2).contiguous(memory_format=layout)
        weight, bias = normal(2, shape[1], dtype=dtype)
        for silu in (True, False):
            same(group_norm_silu, x, 32, weight, bias, 1e-5, silu)


def alike(op, *arguments):
    """The same for an op that writes its arguments: all of them are compared."""
    reason = op.why_not(*arguments)
    assert bool(reason) == REHEARSED, reason
    mine, truth = copy.deepcopy(arguments), copy.deepcopy(arguments)
    got, wanted = op(*mine), op.reference(*truth)
    assert bool(op.why_not(*mine)) == REHEARSED, "the kernel failed when it ran"
    for one, other in zip(tree_leaves((got, mine)), tree_leaves((wanted, truth)), strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one.isfinite(), other.isfinite())
            one, other = (t.double().nan_to_num(0.0, 0.0, 0.0) for t in (one, other))
            limit = LIMITS[torch.float16] * other.abs().max()
            error = (one - other).abs().max()
            assert error <= limit


@pytest.mark.parametrize("size", [64, 37])
@pytest.mark.parametrize("second", ["nothing", "negative", "source", "reference"])
def test_the_ends_of_a_tick(size, second):
    shape, at, half = (4, size, size), torch.tensor([2], device=DEVICE), torch.float16
    state, row = normal(2, 4, *shape), normal(4, *shape)
    bad = torch.tensor([0, 1, 0, 0], dtype=torch.int32, device=DEVICE)
    dropped = torch.tensor([3], device=DEVICE)
    gain, base, entry = normal(2, 4, 1, 1, 1), normal(2, 4, *shape), normal(2, 1, *shape)
    base[0], entry[1] = 0, 0
    mix = torch.tensor([0.5, 1.0], device=DEVICE).view(2, 1, 1, 1, 1)
    tail = second == "reference"
    source = normal(1, *shape)
    alike(stream_enter, state, source, entry, at, mix, base, gain, bad, dropped, tail, half)
    rows = {"negative": 8, "reference": 5}.get(second, 4)
    out = normal(rows, *shape, dtype=half)
    out[0, 0, 0, 0] = torch.inf
    terms = 1 + (second != "nothing")
    # a memory each: what is written must be nobody else's
    reference, *past = (row.clone() for _ in range(3))
    alike(
        stream_step, state, row, out, normal(terms + 2, 4), second, reference if tail else None,
        past, normal(terms + 2, 4), normal(2, 1) if tail else None, at, bad,
    )  # fmt: skip


@pytest.mark.skipif(REHEARSED, reason="there are no CUDA graphs on a CPU")
def test_a_cuda_graph_holds_the_kernels():
    """From bytes to bytes, recorded once, replayed for another picture."""
    picture, weight = camera(64, 64), torch.ones(3, device=DEVICE)

    def body():
        place = (64, 64, "crop", False, torch.float16, "channels_last", 2 / 255, -1.0)
        x = group_norm_silu(picture_in(picture, *place), 3, weight, weight, 1e-5, True)
        return picture_out(x, "NCHW", 127.5, 127.5), likeness(picture, camera_before)

    camera_before = camera(64, 64, seed=2)
    body()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = body()
    picture.copy_(camera(64, 64, seed=1))
    graph.replay()
    for got, wanted in zip(recorded, body(), strict=True):
        assert torch.equal(got, wanted)
