"""What the host does not ask of a GPU while a stream runs: there is none here, tests/waiting.py."""

import pairs
import pytest
import tiny
import torch
from helping import helping
from tiny_models import forget, inference, tiny_model  # noqa: F401
from waiting import Device, NoWaits, Waited

pytestmark = pytest.mark.comfy
SIGMAS = (8.0, 2.0, 0.5, 0.0)


class Live:
    """A stream of scenes that move a little, and how many of its rows ran whole, tick by tick.

    Args:
        asked: of helping.
    """

    def __init__(self, frames=1, **asked):
        from livediffusion.host.sampling.stream import Stream

        self.stream, self.frames, self.ran = Stream(frames), frames, []
        self.guider = pairs.guider(helping(tiny_model(), **asked))

    def run(self, i, scene=0, bad=False):
        latents = sources(self.frames, i, scene)
        if bad:
            latents[:] = float("nan")
        out = self.stream.run(self.guider, latents, pairs.settings(SIGMAS))
        if self.reusing is not None:
            self.ran.append(self.reusing.looked())
        return out

    @property
    def reusing(self):
        known = self.stream.coherent.neighbours
        return None if known is None else known.reusing


def sources(count, i, scene=0):
    return tiny.latents(1, 100 + scene) + 0.1 * tiny.latents(count, i)


def reuse(interval, awake=0.5):
    return {"interval": interval, "depth": "outermost block", "awake": awake}


@pytest.fixture
def device(monkeypatch):
    from livediffusion.engine.blocks import reuse as kept
    from livediffusion.host.sampling import reusing

    return Device(monkeypatch, kept, reusing)


def test_a_wait_would_be_seen():
    for ask in (float, torch.Tensor.tolist, torch.Tensor.cpu, lambda t: t.to(device="cpu")):
        with NoWaits(), pytest.raises(Waited):
            ask(torch.zeros(1))


@pytest.mark.parametrize("frames", [1, 2])
def test_live_reuse_in_a_steady_stream(device, frames):
    live = Live(frames, reuse=reuse(3))
    for i in range(24):
        # at first nothing else stands for what may not be finite
        with device.ticking(waits=i < 8):
            live.run(i, scene=i // 16)
    assert sum(whole for _, whole in live.ran[8:]) < sum(rows for rows, _ in live.ran[8:])


def test_a_cut_is_seen_a_frame_later_there(device):
    live = Live(reuse=reuse(4))
    for i in range(16):
        with device.ticking(waits=True):
            live.run(i, scene=i // 9)
    whole = [whole for _, whole in live.ran]
    due = [sum((tick + k) % 4 == 0 for k in range(3)) for tick in range(16)]
    assert whole[4:9] == due[4:9]
    assert whole[9] == due[9] == 0, "it is taken for the frame before it"
    # that one is awake at the next step, and where it entered so is the frame behind it
    assert [whole[tick] - due[tick] for tick in range(10, 16)] == [2, 1, 0, 0, 0, 0]


def test_a_bad_frame_poisons_nobody_there(device):
    live = Live(reuse=reuse(2, 0.3))
    for i in range(14):
        with device.ticking(waits=True):
            out = live.run(i, bad=i in (0, 7, 8))
        assert i < 2 or out.isfinite().all(), i
        assert all(bank.features.isfinite().all() for bank in live.reusing.banks), i
    assert live.stream.stats()["dropped"] > 0


@pytest.mark.parametrize("asked", ["memory", "calm", "future", "reuse"])
def test_a_steady_stream_waits_for_nothing(device, monkeypatch, asked):
    """Frames that see each other; and the colours of a format are sent once."""
    from livediffusion.engine.coherence.carry import Carry
    from livediffusion.host.models.coherence import attach
    from livediffusion.host.sampling import carry

    sent = []
    monkeypatch.setattr(carry, "uploaded", lambda values, _: sent.append(values) or values)
    carry._weights.cache_clear()
    live = Live(**{
        "memory": {"memory": {"bank": "merged"}}, "calm": {}, "future": {"future": {}},
        "reuse": {"reuse": reuse(2)},
    }[asked])  # fmt: skip
    if asked == "calm":
        live.guider = pairs.guider(attach(tiny_model(), carry=Carry()))
    for i in range(16):
        with device.ticking(waits=i < 10):
            live.run(i)
    assert len(sent) == (asked in ("calm", "reuse"))
