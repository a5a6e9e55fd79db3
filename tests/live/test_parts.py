"""The parts of a live run, each alone: mailbox, wire, codecs, pictures, pacing, meters, viewer."""

import asyncio
import io
import threading

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from livediffusion.live import pacing, wire
from livediffusion.live.codecs import JPEG, MOST_PIXELS
from livediffusion.live.mailbox import Closed, Slot
from livediffusion.live.meters import Rate, Spread
from livediffusion.live.pictures import Shape, fitted, landed, on_its_way, to_image
from livediffusion.live.viewer import CREDIT, Viewer
from livediffusion.live.wire import NotTaken, Packet
from PIL import Image

pytestmark = pytest.mark.timeless


@given(st.lists(st.sampled_from(["put", "take"]), max_size=40))
def test_a_slot_gives_the_latest_and_counts_the_rest(steps):
    slot, put, held, replaced = Slot(), 0, None, 0
    for step in steps:
        if step == "put":
            put += 1
            replaced += held is not None
            assert slot.put(put) == (held is not None)
            held = put
        else:
            assert slot.take() == held
            held = None
    assert slot.replaced == replaced


def test_a_slot_wakes_who_waits_in_another_thread():
    slot = Slot()
    threading.Timer(0.05, slot.put, ["frame"]).start()
    assert asyncio.run(slot.get(5)) == "frame"
    assert asyncio.run(slot.get(0.01)) is None
    threading.Timer(0.05, slot.close).start()
    with pytest.raises(Closed):
        asyncio.run(slot.get(5))
    assert slot.put("late") is False and slot.take() is None


def test_a_closed_slot_still_gives_what_is_in_it():
    slot = Slot()
    slot.put("last")
    slot.close()
    assert asyncio.run(slot.get(1)) == "last"
    with pytest.raises(Closed):
        asyncio.run(slot.get(1))


def test_the_wire_gives_back_what_was_packed():
    packet = Packet(wire.CAMERA, 1, 0, 7, 1700000000.125, 3, 9, b"picture")
    assert wire.unpacked(packet.packed()) == packet
    assert len(packet.packed()) == 24 + 7


def test_an_input_travels_behind_its_picture():
    packet = Packet(wire.VIEW, 1, 0, 7, 1700000000.125, 3, 9, b"picture", b"frame")
    message = packet.packed()
    assert message[0] == wire.COMPARED
    assert message[24:] == (7).to_bytes(4, "little") + b"pictureframe"
    # nobody sends the server one
    with pytest.raises(NotTaken, match="kind 3"):
        wire.unpacked(message)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_frame_or_refused(data):
    try:
        assert wire.unpacked(data).payload == data[24:]
    except NotTaken as reason:
        assert str(reason)


def test_codec_keeps_the_picture_and_refuses_what_is_none():
    picture = np.zeros((40, 56, 3), np.uint8)
    picture[:, 28:] = 200
    back = JPEG.decode(JPEG.encode(picture, 95))
    assert back.shape == picture.shape
    assert np.abs(back.astype(int) - picture)[:, [5, 50]].max() <= 3
    data = JPEG.encode(picture, 95)
    png = io.BytesIO()
    Image.fromarray(picture).save(png, "PNG")
    for bad in (b"", b"\xff\xd8", data[: len(data) // 2], png.getvalue(), bytes(500)):
        with pytest.raises(NotTaken):
            JPEG.decode(bad)


def test_a_header_that_promises_too_much_is_refused_before_decoding():
    data = bytearray(JPEG.encode(np.zeros((16, 16, 3), np.uint8), 90))
    at = data.index(b"\xff\xc0") + 5  # height and width in the frame header
    data[at : at + 4] = (10_000).to_bytes(2, "big") * 2
    assert MOST_PIXELS < 10_000**2
    with pytest.raises(NotTaken, match="10000 x 10000"):
        JPEG.decode(bytes(data))


@given(
    st.integers(1, 90), st.integers(1, 90), st.integers(16, 80), st.integers(16, 80),
    st.sampled_from(["crop", "pad", "stretch"]), st.booleans(),
)  # fmt: skip
@example(22, 53, 16, 39, "crop", False)  # rounding reached outside the picture
def test_any_picture_fits_any_shape(height, width, wanted_height, wanted_width, fit, mirror):
    picture = np.full((height, width, 3), 90, np.uint8)
    out = fitted(picture, Shape(wanted_width, wanted_height, fit, mirror))
    assert out.shape == (wanted_height, wanted_width, 3)
    assert out.max() == 90
    if fit != "pad":
        assert out.min() == 90


def test_fits_keep_or_ignore_the_aspect():
    picture = np.zeros((60, 120, 3), np.uint8)
    picture[:, :60] = 255  # left half white
    crop = fitted(picture, Shape(60, 60, "crop"))
    assert crop[30, 5, 0] == 255 and crop[30, 55, 0] == 0
    pad = fitted(picture, Shape(120, 120, "pad"))
    assert pad[10, 20, 0] == 0 and pad[60, 20, 0] == 255 and pad[110, 20, 0] == 0
    mirrored = fitted(picture, Shape(120, 60, "stretch", True))
    assert mirrored[30, 20, 0] == 0 and mirrored[30, 100, 0] == 255


def test_pictures_and_images_are_each_others_inverse():
    picture = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    image = to_image(picture)
    assert image.shape == (1, 9, 7, 3) and image.dtype == torch.float32
    assert image.min() >= 0 and image.max() <= 1
    assert np.array_equal(landed(on_its_way(image)), picture)
    batch = torch.cat([image * 0, image])
    assert np.array_equal(landed(on_its_way(batch)), picture)
    wild = torch.tensor([[[[float("nan"), 3.0, -2.0]]]])
    assert landed(on_its_way(wild)).tolist() == [[[0, 255, 0]]]
    assert landed(on_its_way(image[..., :1])).shape == (9, 7, 3)


@given(st.floats(0, 10), st.floats(1, 120))
def test_the_camera_is_asked_no_faster_than_it_helps(frame, fps):
    interval = pacing.capture_interval(frame, fps)
    assert interval >= 1 / fps and interval >= frame / 3
    assert interval == max(1 / fps, frame / 3)


@pytest.mark.parametrize("fps", [0.01, 0.3, 1, 25, 200])
def test_a_rate_is_told_however_slow_and_falls_when_nothing_comes(fps):
    rate = Rate()
    assert rate.value(0) == 0 and rate.last is None
    for i in range(90):
        rate.add(i / fps)
        if i:
            assert rate.value(i / fps) == pytest.approx(fps)
            assert rate.value((i + 0.9) / fps) == pytest.approx(fps)
    last = rate.last
    assert last == 89 / fps
    assert rate.value(last + 2 / fps) == pytest.approx(fps / 2)
    assert rate.value(last + 100 / fps) == pytest.approx(fps / 100)


def test_a_rate_is_of_the_last_few():
    rate = Rate(5)
    for i in range(20):
        rate.add(i / 10)
    for i in range(5):
        rate.add(10 + i)
    assert rate.value(14) == pytest.approx(1)


def test_spread():
    spread = Spread(100)
    assert spread.percentile(50) is None
    for i in range(1, 201):
        spread.add(float(i))
    assert (spread.percentile(50), spread.percentile(95)) == (150.0, 195.0)


def packet(sequence, view=0):
    return Packet(wire.VIEW, 1, view, sequence, 0.0, 1, sequence, b"x")


def test_a_viewer_has_two_pictures_on_their_way_and_then_only_the_latest():
    async def work():
        viewer, got = Viewer(), []
        for i in range(CREDIT):
            viewer.offer(packet(i))
            got.append((await viewer.next()).sequence)
        for i in range(CREDIT, 10):
            viewer.offer(packet(i))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(viewer.next(), 0.02)
        viewer.offer(packet(50, view=1))  # another view has a credit of its own
        got.append((await viewer.next()).sequence)
        viewer.shown(0)
        got.append((await viewer.next()).sequence)
        viewer.tell({"type": "state"})
        assert '"state"' in await viewer.next()
        viewer.close(4410)
        assert await viewer.next() is None
        return got, viewer.unsent

    got, unsent = asyncio.run(work())
    assert got == [0, 1, 50, 9]
    assert unsent == 7


def test_a_viewer_that_does_not_listen_costs_no_memory():
    async def work():
        viewer = Viewer()
        for i in range(5000):
            viewer.tell({"i": i})
            viewer.offer(packet(i))
        return len(viewer._messages), len(viewer._packets)

    assert asyncio.run(work()) == (64, 1)
