"""likeness and group_norm_silu: the references, against numpy, torch and the engine's measure."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from livediffusion.engine.similarity import score, sketch
from livediffusion.kernels import group_norm_silu, likeness


def pair(height=37, width=53):
    """A picture and the same one, darker and with noise."""
    g = torch.Generator().manual_seed(0)
    a = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=g)
    noise = torch.randint(-9, 10, a.shape, generator=g)
    return a, (a * 0.8 + noise).clamp(0, 255).to(torch.uint8)


def test_likeness_is_the_engines_cosine_and_numpys_correlation():
    a, b = pair()
    cosine, correlation, a_mean, b_mean = likeness(a, b).tolist()
    views = [sketch(picture.double() / 255, "cosine") for picture in (a, b)]
    assert cosine == pytest.approx(score(*views), abs=1e-6)
    wanted = np.corrcoef(a.flatten().double(), b.flatten().double())[0, 1]
    assert correlation == pytest.approx(wanted, abs=1e-7)
    assert a_mean == pytest.approx(float(a.double().mean()) / 255)
    assert b_mean == pytest.approx(float(b.double().mean()) / 255)


def test_correlation_knows_no_brightness_and_no_contrast():
    a, _ = pair()
    half = a // 2
    assert likeness(half, half * 2 + 1)[1] == 1
    assert likeness(half, half * 2 + 1)[0] < 0.99
    assert likeness(a, 255 - a)[1] == -1
    assert torch.equal(likeness(a, a)[:2], torch.ones(2))


def test_flat_pictures():
    a, _ = pair()
    grey, black = torch.full_like(a, 128), torch.zeros_like(a)
    assert likeness(grey, black)[1] == 1
    assert likeness(a, grey)[1] == 0
    assert likeness(black, black).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(4, 4, 3), torch.zeros(4, 4, 3)),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), torch.zeros(4, 5, 3, dtype=torch.uint8)),
        (torch.zeros(0, 4, 3, dtype=torch.uint8), torch.zeros(0, 4, 3, dtype=torch.uint8)),
    ],
)
def test_wrong_pictures_are_named(a, b):
    with pytest.raises(ValueError, match="expected two uint8 pictures"):
        likeness(a, b)


def values(dtype=torch.float32, mean=5.0):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 12, 5, 7, generator=g) * 3 + mean
    weight, bias = torch.randn(2, 12, generator=g)
    return x.to(dtype), 4, weight.to(dtype), bias.to(dtype), 1e-5


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_group_norm_is_what_numpy_makes_of_it(silu, mean):
    x, groups, weight, bias, eps = values(mean=mean)
    rows = x.double().numpy().reshape(2, groups, -1)
    y = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + eps)
    y = y.reshape(x.shape) * weight.numpy()[:, None, None] + bias.numpy()[:, None, None]
    y = y / (1 + np.exp(-y)) if silu else y
    got = group_norm_silu(x, groups, weight, bias, eps, silu)
    # at a mean of 300 the input itself has four digits of its deviation less
    assert np.abs(got.numpy() - y).max() < 2e-6 * (1 + mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_group_norm_is_torchs_in_the_layout_that_came(dtype):
    x, *rest = values(dtype)
    wanted = F.silu(F.group_norm(x, *rest))
    step = torch.finfo(dtype).eps * 2
    for layout in (torch.contiguous_format, torch.channels_last):
        got = group_norm_silu(x.contiguous(memory_format=layout), *rest, True)
        assert got.dtype == dtype and got.is_contiguous(memory_format=layout)
        assert (got.float() - wanted.float()).abs().max() <= step * wanted.abs().max()


def test_shapes_that_do_not_fit_are_torchs_error():
    x, _, weight, bias, eps = values()
    with pytest.raises(RuntimeError, match="divisible"):
        group_norm_silu(x, 5, weight, bias, eps, True)
    with pytest.raises(RuntimeError, match="weight"):
        group_norm_silu(x, 4, weight[:6], bias, eps, True)
