"""Pictures to the device and back, on lanes that are as late as they may be."""

import gc
import types

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.comfy

SHAPE = (6, 5, 3)


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, SHAPE, np.uint8)


@pytest.fixture
def late(comfyui, monkeypatch):
    """Copies that are done only when somebody waits for them: who does not wait sees it."""
    from livediffusion.host.frames import transfer

    class Ticket:
        def __init__(self, copy):
            self.copy = copy

        def over(self):
            return self.copy is None

        def wait(self):
            if self.copy is not None:
                self.copy()
            self.copy = None

        def join(self, tensor):
            joined.append(tensor)
            self.wait()

    class Late(transfer.Lanes):
        def _pinned(self, shape):
            return torch.zeros(shape, dtype=torch.uint8)

        def _up(self, buffer):
            there = torch.zeros_like(buffer)
            return there, Ticket(lambda: there.copy_(buffer))

        def _down(self, picture, buffer):
            return Ticket(lambda: buffer.copy_(picture))

    joined = []
    lanes = Late(torch.device("cpu"))
    monkeypatch.setattr(transfer, "lanes", lambda device: lanes)
    return types.SimpleNamespace(transfer=transfer, lanes=lanes, joined=joined)


def test_a_picture_that_was_sent_is_used_where_it_is(late):
    from livediffusion.live.pictures import to_image

    shown = picture(0)
    image = to_image(shown)
    late.transfer.send(image, shown)
    shown[:] = 0  # the sender's memory is its own again
    near = late.transfer.near(image, torch.device("cpu"))
    assert len(late.joined) == 1
    assert near is not image and torch.equal(near, image)
    other = image.clone()
    assert late.transfer.near(other, torch.device("cpu")) is other
    assert late.transfer.near(image, torch.device("meta")) is image
    with torch.inference_mode():
        image.mul_(0.5)
    assert late.transfer.near(image, torch.device("cpu")) is image, "a node has written into it"


def test_a_node_may_write_into_a_picture_however_it_was_made(late):
    """Nodes run in inference_mode, whose tensors do not count what is written into them."""
    from livediffusion.live.pictures import to_image

    with torch.inference_mode():
        image = to_image(picture(0))
        late.transfer.send(image, picture(0))
        assert late.transfer.near(image, torch.device("cpu")) is not image
        image[0, :2].mul_(0.5)
        assert late.transfer.near(image, torch.device("cpu")) is image
        strange = torch.from_numpy(picture(1).astype("float32"))[None] / 255
        assert strange.is_inference()
        late.transfer.send(strange, picture(1))
        assert late.transfer.near(strange, torch.device("cpu")) is strange


def test_encoding_takes_the_picture_that_was_sent(late):
    from livediffusion.host.frames import vae
    from livediffusion.live.pictures import to_image

    class Vae:
        device = output_device = torch.device("cpu")

        def encode(self, pixels):
            return pixels

    image = to_image(picture(1))
    late.transfer.send(image, picture(1))
    assert torch.equal(vae.encode(Vae(), image), image)
    assert len(late.joined) == 1


def test_finished_pictures_come_down_in_any_order(late):
    from livediffusion.live.pictures import landed, on_its_way, to_image

    flying = [on_its_way(to_image(picture(i))) for i in range(3)]
    for i in (2, 0, 1):
        assert np.array_equal(landed(flying[i]), picture(i))


def test_pinned_memory_is_used_again_when_its_copy_is_over(late):
    from livediffusion.live.pictures import landed, on_its_way, to_image

    kept = []
    for i in range(40):
        image = to_image(picture(i))
        late.transfer.send(image, picture(i))
        there = late.transfer.near(image, torch.device("cpu"))
        flying = on_its_way(there)
        kept.append(landed(flying))
    assert late.lanes.made == 1
    assert all(np.array_equal(one, picture(i)) for i, one in enumerate(kept))
    images = [to_image(picture(i)) for i in range(5)]
    for i, image in enumerate(images):
        late.transfer.send(image, picture(i))
    for i, image in enumerate(images):
        near = late.transfer.near(image, torch.device("cpu"))
        assert torch.equal(near, to_image(picture(i))), "no copy under way was written over"


def test_a_picture_goes_with_its_image(late):
    from livediffusion.live.pictures import to_image

    image = to_image(picture(0))
    late.transfer.send(image, picture(0))
    assert len(late.transfer._sent) == 1
    del image
    gc.collect()
    assert len(late.transfer._sent) == 0


def test_without_a_gpu_pictures_go_the_ordinary_way(comfyui):
    from livediffusion.host.frames import transfer

    image = torch.rand(1, *SHAPE)
    transfer.send(image, picture(0))
    assert transfer.near(image, torch.device("cpu")) is image
    assert transfer.fetch(image) is None


def test_pinned_memory_is_kept_for_a_few_sizes_only(late):
    for side in range(8, 400, 8):
        buffers = [late.lanes._take((side, 8, 3)) for _ in range(6)]
        for buffer in buffers:
            late.lanes.give(buffer)
    assert len(late.lanes._free) == 4
    assert {len(spare) for spare in late.lanes._free.values()} == {4}
    made = late.lanes.made
    late.lanes.give(late.lanes._take((392, 8, 3)))
    assert late.lanes.made == made
