"""picture_in and picture_out: the references, against Pillow, torch and numpy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from livediffusion.kernels import picture_in, picture_out
from livediffusion.live.pictures import FITS, Shape, fitted, landed, to_image

LEVELS = torch.arange(256, dtype=torch.uint8).reshape(16, 16, 1).expand(16, 16, 3)
IMAGE = (1 / 255, 0.0)
LATENT = (2 / 255, -1.0)


def picture(height, width, channels=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (height, width, channels), dtype=torch.uint8, generator=g)


def levels_in(source, height, width, fit="stretch", mirror=False):
    """As picture_in makes them, unscaled: [h, w, 3]."""
    return picture_in(source, height, width, fit, mirror, torch.float32, "BHWC", 1.0, 0.0)[0]


@pytest.mark.parametrize("size", [(19, 40), (64, 64), (37, 20), (80, 53), (5, 7), (1, 1)])
def test_stretching_is_torch_antialiased(size):
    source = picture(37, 53)
    wanted = F.interpolate(
        source.movedim(-1, 0)[None].double(), size, mode="bilinear", antialias=True
    )
    assert (levels_in(source, *size) - wanted[0].movedim(0, -1)).abs().max() < 255e-6


@pytest.mark.parametrize("fit", ["crop", "stretch"])
@pytest.mark.parametrize("size", [(19, 40), (64, 64), (24, 16), (37, 20)])
def test_fits_are_pillows_in_floating_point(fit, size):
    """Every channel alone, as a picture of floats, which Pillow does not round."""
    source = picture(37, 53)
    shape = Shape(size[1], size[0], fit, True)
    wanted = [fitted(source[..., c].float().numpy(), shape) for c in range(3)]
    error = levels_in(source, *size, fit, True).numpy() - np.stack(wanted, -1)
    # Pillow takes the box in single precision
    assert np.abs(error).max() < 1e-3


sides = st.integers(1, 40)


@settings(max_examples=60, deadline=None)
@given(sides, sides, sides, sides, st.sampled_from(FITS), st.booleans())
def test_any_picture_is_fitted_as_the_live_loop_does(height, width, h, w, fit, mirror):
    """Up to what Pillow rounds, once for each direction."""
    source = picture(height, width)
    wanted = fitted(source.numpy(), Shape(w, h, fit, mirror))
    got = levels_in(source, h, w, fit, mirror).numpy()
    assert np.abs(got - wanted).max() <= 1.01
    # the borders stay black, and nothing else becomes black
    white = np.full_like(source, 255)
    assert np.array_equal(
        levels_in(torch.from_numpy(white), h, w, fit, mirror).round().numpy(),
        fitted(white, Shape(w, h, fit, mirror)),
    )


def test_a_camera_of_the_right_size_is_the_graphs_image_exactly():
    source = picture(48, 64)
    got = picture_in(source, 48, 64, "crop", False, torch.float32, "BHWC", *IMAGE)
    assert torch.equal(got, to_image(source.numpy()))
    mirrored = picture_in(source, 48, 64, "crop", True, torch.float32, "BHWC", *IMAGE)
    assert torch.equal(mirrored, got.flip(2))


def test_layouts_hold_the_same_values():
    source = picture(20, 30, 4)[:, ::2]
    rows, planes, last = (
        picture_in(source, 8, 8, "crop", False, torch.float16, layout, *LATENT)
        for layout in ("BHWC", "NCHW", "channels_last")
    )
    assert rows.shape == (1, 8, 8, 3) and rows.is_contiguous()
    assert planes.shape == (1, 3, 8, 8) and planes.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(planes, last) and torch.equal(planes, rows.movedim(-1, 1))
    assert -1 <= rows.min() < rows.max() <= 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"picture": torch.zeros(4, 4, 3)}, "picture: expected uint8"),
        ({"picture": torch.zeros(4, 4, dtype=torch.uint8)}, "picture: expected uint8"),
        ({"fit": "squeeze"}, "fit: expected one of"),
        ({"layout": "CHWN"}, "layout: expected one of"),
    ],
)
def test_a_wrong_picture_is_named(change, words):
    arguments = {
        "picture": LEVELS, "height": 8, "width": 8, "fit": "crop", "mirror": False,
        "dtype": torch.float32, "layout": "BHWC", "scale": 1.0, "shift": 0.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        picture_in(**arguments | change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", ["BHWC", "NCHW"])
def test_every_level_comes_back(dtype, layout):
    for there, back in ((IMAGE, (255.0, 0.0)), (LATENT, (127.5, 127.5))):
        image = picture_in(LEVELS, 16, 16, "crop", False, dtype, layout, *there)
        assert torch.equal(picture_out(image, layout, *back)[0], LEVELS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_image_lands_as_in_the_live_loop(dtype):
    g = torch.Generator().manual_seed(0)
    image = (torch.rand(2, 37, 53, 3, generator=g) * 1.2 - 0.1).to(dtype)
    image[0, 0, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    halves = (torch.arange(53) + 0.5) / 255
    image[0, 1] = halves[:, None].to(dtype)
    got = picture_out(image, "BHWC", 255.0, 0.0)
    assert got.is_contiguous()
    for row, frame in zip(got, image.float(), strict=True):
        assert np.array_equal(row.numpy(), landed(frame))
    assert got[0, 0, 0].tolist() == [0, 255, 0]


def test_what_a_vae_gives_is_rounded_half_to_even():
    # steps at which float32 is exact, many of them in the middle of two levels
    values = torch.arange(-1200, 1200).reshape(1, 3, 20, 40) / 1020
    exact = (values * 1020).double().round() / 8 + 127.5
    steps = picture_out((values * 1020).round() / 8, "NCHW", 1.0, 127.5)
    wanted = np.rint(np.clip(exact.numpy(), 0, 255)).astype(np.uint8)
    assert np.array_equal(steps.numpy(), wanted.transpose(0, 2, 3, 1))
    assert steps.min() == 0 and steps.max() == 255


def test_grey_and_transparent_images_land():
    grey = torch.linspace(0, 1, 24).reshape(1, 4, 6, 1)
    assert torch.equal(picture_out(grey, "BHWC", 255.0, 0.0)[0], torch.from_numpy(landed(grey[0])))
    four = torch.rand(1, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    three = picture_out(four, "NCHW", 255.0, 0.0)
    assert torch.equal(three, picture_out(four[:, :3], "NCHW", 255.0, 0.0))


@pytest.mark.parametrize(
    ("shape", "layout"), [((4, 6, 3), "BHWC"), ((1, 4, 6, 2), "BHWC"), ((1, 3, 4, 6), "HWC")]
)
def test_a_wrong_image_is_named(shape, layout):
    with pytest.raises(ValueError, match=r"image: expected|layout: expected"):
        picture_out(torch.zeros(shape), layout, 255.0, 0.0)
