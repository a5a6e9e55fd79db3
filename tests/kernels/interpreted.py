"""The Triton kernels on the CPU, against their references. Run by test_triton.py.

Triton decides when it is imported whether its functions are compiled or interpreted, so this is
its own process with TRITON_INTERPRET=1. The interpreter cuts bfloat16 off instead of rounding it.
"""

import copy
import functools
import importlib
import pathlib
import sys

import pytest
import torch
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import kernels

torch.set_num_threads(1)
G = torch.Generator().manual_seed(0)
PICTURE = torch.randint(0, 256, (37, 53, 4), dtype=torch.uint8, generator=G)
VIEWS = {
    "four channels": PICTURE,
    "contiguous": PICTURE[..., :3].contiguous(),
    "sliced": PICTURE[::2, 1::3],
    "turned": PICTURE.transpose(0, 1),
    "reversed": PICTURE[..., [2, 1, 0]].movedim(-1, 0).contiguous().movedim(0, -1),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = (torch.contiguous_format, torch.channels_last)


def same(op, *arguments):
    """The kernel's result is the reference's, up to rounding, and lies in memory as it does."""
    wanted, got = op.reference(*arguments), op.launch(*arguments)
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    assert got.stride() == wanted.stride()
    if got.dtype == torch.uint8:
        assert torch.equal(got, wanted)
        return
    error, size = (got.double() - wanted.double()).abs(), wanted.double().abs()
    if got.dtype == torch.bfloat16:
        assert (error <= size * 2**-7 + size.max() * 1e-6).all()
    else:
        limit = 1e-6 if got.dtype == torch.float32 else 1e-3
        assert error.max() <= limit * size.max()


def test_triton_comes_with_the_first_kernel_only():
    """The first test here: nothing else has imported it."""
    arguments = (PICTURE, 8, 8, "crop", False, torch.float32, "BHWC", 1.0, 0.0)
    assert kernels.picture_in(*arguments).shape == (1, 8, 8, 3)
    assert kernels.picture_in.why_not(*arguments)
    assert "triton" not in sys.modules
    assert kernels.picture_in.launch(*arguments).shape == (1, 8, 8, 3)
    assert "triton" in sys.modules


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("layout", ["BHWC", "NCHW", "channels_last"])
def test_a_picture_of_the_right_size(view, layout):
    picture = VIEWS[view]
    for mirror, dtype in ((False, torch.float32), (True, torch.float16), (False, torch.bfloat16)):
        size = picture.shape[:2]
        same(kernels.picture_in, picture, *size, "crop", mirror, dtype, layout, 2 / 255, -1.0)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(19, 40), (48, 32), (9, 14)])
def test_a_picture_is_fitted(fit, size, monkeypatch):
    # a few large programs are interpreted faster than many
    monkeypatch.setattr(importlib.import_module("kernels.triton_pictures"), "RESIZED", 2048)
    for view, layout, dtype in (
        ("four channels", "BHWC", torch.float32),
        ("sliced", "NCHW", torch.float16),
    ):
        same(kernels.picture_in, VIEWS[view], *size, fit, True, dtype, layout, 1 / 255, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_goes_out(dtype):
    image = torch.randn(2, 37, 53, 4, generator=G).to(dtype)
    image[0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    image[0, 1, :, 0] = (torch.arange(53) + 0.5) / 255
    three = image[..., :3].contiguous()
    for scale, shift in ((255.0, 0.0), (127.5, 127.5)):
        for rows in (image, three, image[..., :1], image[:, ::2, 1::3]):
            same(kernels.picture_out, rows, "BHWC", scale, shift)
        for planes in (image.movedim(-1, 1).contiguous(), three.movedim(-1, 1)):
            same(kernels.picture_out, planes, "NCHW", scale, shift)


@pytest.mark.parametrize("shape", [(37, 53, 3), (1, 1, 3), (64, 64, 3)])
def test_likeness_is_equal_to_the_last_bit(shape):
    a = torch.randint(0, 256, shape, dtype=torch.uint8, generator=G)
    noise = torch.randint(-9, 10, shape, generator=G)
    b = (a.int() + noise).clamp(0, 255).to(torch.uint8)
    flat, brighter, darker = torch.full_like(a, 7), torch.full_like(a, 7), torch.full_like(a, 8)
    brighter[0, 0, 0], darker[0, 0, 0] = 8, 7
    pairs = [(a, b), (a, a), (a, 255 - a), (a, flat), (flat, flat), (flat, flat + 9)]
    for one, other in [*pairs, (brighter, darker), (darker, darker), (darker, a)]:
        wanted, got = kernels.likeness.reference(one, other), kernels.likeness.launch(one, other)
        assert torch.equal(got, wanted)


def test_sums_of_the_largest_pictures_fit():
    """Of 4096 x 4096, white but for one level: the sums of blocks are made here."""
    module = importlib.import_module("kernels.triton_compare")
    total, block = 3 * 4096**2, module.BLOCK
    one = torch.tensor([255 * 255, 255 * 255, 255 * 255, 255, 255]) * block
    assert one.max() < 2**31
    sums = one[:, None].repeat(1, total // block).int()
    # in a one level is 254, in b another one is 253
    sums[:, 0] -= torch.tensor([255 + 510, 255**2 - 254**2, 255**2 - 253**2, 1, 2])
    result = torch.empty(4)
    module._finish_kernel[(1,)](sums, result, total, total // block, BLOCK=256)
    cosine = (65025 * total - 6 * 255) / (
        (65025 * total - 1016) ** 0.5 * (65025 * total - 2024) ** 0.5
    )
    means = [(255 * total - off) / (255 * total) for off in (1, 2)]
    # two single points in different places correlate as -1 / (n - 1)
    assert torch.equal(result, torch.tensor([cosine, -1 / (total - 1), *means]))


@pytest.fixture
def small_blocks(monkeypatch):
    """As if the input was large: every loop turns, every group comes in parts."""
    module = importlib.import_module("kernels.triton_norm")
    for name, size in {"BLOCK": 64, "TILE": 256, "CHANNELS": 8, "PARTS": 4}.items():
        monkeypatch.setattr(module, name, size)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_group_norm(dtype, memory_format, small_blocks):
    for shape, groups, silu in (((2, 12, 13, 11), 4, True), ((1, 20, 8, 16), 2, False)):
        x = (torch.randn(shape, generator=G) * 3 + 5).to(dtype).to(memory_format=memory_format)
        weight, bias = torch.randn(2, shape[1], generator=G).to(dtype)
        same(kernels.group_norm_silu, x, groups, weight, bias, 1e-5, silu)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_group_norm_at_its_own_block_sizes(memory_format):
    x = torch.randn(1, 96, 17, 9, generator=G).to(memory_format=memory_format)
    weight, bias = torch.randn(2, 96, generator=G)
    same(kernels.group_norm_silu, x, 4, weight, bias, 1e-5, True)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_group_norm_keeps_a_small_deviation_beside_a_large_mean(memory_format, small_blocks):
    """Where a sum of squares in float32 would have lost it; the exact result decides."""
    x = (torch.randn(1, 8, 24, 24, generator=G) + 1000).to(memory_format=memory_format)
    weight, bias = torch.ones(8), torch.zeros(8)
    got = kernels.group_norm_silu.launch(x, 2, weight, bias, 1e-5, False)
    wanted = torch.nn.functional.group_norm(x.double(), 2, eps=1e-5)
    # the mean itself is good to a part in ten million of 1000
    assert (got - wanted).abs().max() < 3e-4


def tick_rows(rows, shape, planes, dtype):
    """What the two ends of a tick work on."""
    draw = functools.partial(torch.randn, generator=G)
    gain, base = draw(planes + 1, rows, 1, 1, 1), draw(planes + 1, rows, *shape)
    # what the model sees has no noise of its own, and is the same both times
    gain[1:planes], base[:planes] = gain[0], 0
    return {
        "state": draw(2, rows, *shape), "gain": gain, "base": base, "mix": draw(2, 1, 1, 1, 1),
        "bad": (draw(rows) > 0).int(), "dropped": torch.tensor([7]), "dtype": dtype,
    }  # fmt: skip


def alike(op, arguments):
    """Results and everything that is written are the reference's."""
    mine, truth = (copy.deepcopy(arguments) for _ in range(2))
    got, wanted = op.launch(**mine), op.reference(**truth)
    pairs = list(zip(tree_leaves((got, mine)), tree_leaves((wanted, truth)), strict=True))
    for one, other in pairs:
        if not isinstance(one, torch.Tensor):
            assert one == other
            continue
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(one.isfinite(), other.isfinite())
        error = (one.double() - other.double()).nan_to_num(0.0).abs()
        limit = {torch.float16: 1e-3, torch.bfloat16: 2**-7}.get(one.dtype, 1e-6)
        assert error.max() <= limit * max(1.0, float(other.double().nan_to_num(0.0).abs().max()))


@pytest.mark.parametrize(
    ("rows", "entering", "shape", "planes", "tail", "dtype"),
    [
        (4, [2], (4, 8, 8), 1, False, torch.float32),
        (6, [2, 3], (4, 7, 5), 2, False, torch.float16),
        (4, [3], (3, 9, 5), 1, True, torch.bfloat16),
        (1, [0], (4, 20, 20), 1, True, torch.float32),
    ],
)
@pytest.mark.parametrize("noise", ["none", "one", "each"])
def test_frames_enter(rows, entering, shape, planes, tail, dtype, noise):
    given = tick_rows(rows, shape, planes, dtype)
    source = torch.randn(len(entering), *shape, generator=G)
    source[0, 0, 0, 0] = torch.nan
    count = {"none": None, "one": 1, "each": len(entering)}[noise]
    entry = None if count is None else torch.randn(2, count, *shape, generator=G)
    if entry is not None:
        entry[1] = 0
    if noise == "none":
        given["base"] = None
    given["mix"][1] = 1
    alike(kernels.stream_enter, {
        **given, "source": source.half() if dtype == torch.float16 else source, "entry": entry,
        "entering": torch.tensor(entering), "tail": tail,
    })  # fmt: skip


@pytest.mark.parametrize("second", ["nothing", "negative", "source", "reference", "own"])
@pytest.mark.parametrize("history", [0, 1, 2, 3])
def test_rows_take_their_step(second, history):
    rows, shape, entering = (4, (4, 7, 5), [2, 3]) if history % 2 else (3, (4, 16, 16), [1])
    dtype = torch.float16 if history == 2 else torch.float32
    draw = functools.partial(torch.randn, generator=G)
    own = second == "own"
    many = {"negative": 2 * rows, "own": rows + len(entering)}.get(second, rows)
    terms = 1 + (second != "nothing")
    state, out = draw(2, rows, *shape), draw(many, *shape).to(dtype)
    state[1, entering[0], 0, 0, 0] = torch.inf
    out[0, 1, 2, 3] = torch.nan
    alike(kernels.stream_step, {
        "state": state, "after": draw(rows, *shape), "out": out,
        "weights": draw(terms + history, rows), "second": "reference" if own else second,
        "reference": draw(rows, *shape) if second in ("reference", "own") else None,
        "past": [draw(rows, *shape) for _ in range(history)],
        "kept": draw(terms + 2, rows) if history else None,
        "own": draw(2, len(entering)) if own else None, "entering": torch.tensor(entering),
        "bad": torch.zeros(rows, dtype=torch.int32),
    })  # fmt: skip
