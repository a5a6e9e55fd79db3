"""Where a device lacks an operation, others give the same numbers."""

import pytest
import torch
import torch.nn.functional as F
from apple import Unsupported, apple
from livediffusion.engine import devices, flow
from photographs import scene, seen

NEAR = 2e-6  # of pictures of 1


def some(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(8, 8), (33, 48), (128, 96)])
def test_pictures_go_on_beyond_their_border(monkeypatch, mode, size):
    pictures, grid = some(2, 3, *size), 3 * some(2, 20, 30, 2, seed=1) - 1.5
    grid[0, :2] = torch.tensor([1.0, -1.0])
    grid[0, 2] = 1 - 1 / torch.tensor(size[::-1])
    wanted = F.grid_sample(pictures, grid, mode, "border", align_corners=False)
    assert torch.equal(devices.sampled(pictures, grid, mode), wanted)
    with apple(monkeypatch):
        with pytest.raises(Unsupported):
            F.grid_sample(pictures, grid, mode, "border", align_corners=False)
        assert (devices.sampled(pictures, grid, mode) - wanted).abs().max() <= NEAR


@pytest.mark.parametrize("size", [(16, 32), (17, 96), (64, 80), (100, 1)])
def test_means_of_sides_that_do_not_divide(monkeypatch, size):
    pictures = some(2, 1, 50, 64)
    wanted = F.adaptive_avg_pool2d(pictures, size)
    assert torch.equal(devices.pooled(pictures, size), wanted)
    assert torch.equal(F.interpolate(pictures, size, mode="area"), wanted)
    with apple(monkeypatch):
        assert (devices.pooled(pictures, size) - wanted).abs().max() <= NEAR


def test_motion_is_found_there(monkeypatch):
    old, new = (seen(scene(0), x=x, side=200)[None, :, :184] for x in (0.0, 3.0))

    def found():
        views = flow.view(new), flow.view(old)
        motion = flow.match(*views)
        return *flow.resized(motion, 25, 23), flow.exposure(*views, motion)

    wanted = found()
    with apple(monkeypatch):
        for ours, theirs in zip(found(), wanted, strict=True):
            assert (ours - theirs).abs().max() <= 1e-3


def test_a_device_is_what_its_tensors_say():
    one = torch.device("cpu", 0)  # which is not torch.device("cpu"), as "mps" is not "mps:0"
    assert devices.lies_on(one) == torch.zeros(1, device=one).device
    assert devices.lies_on("cpu") == torch.zeros(1).device
