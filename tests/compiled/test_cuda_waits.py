"""What frames have of each other, on a GPU: no waiting in a steady stream, eager or recorded, and
the same frames from both. Run as test_cuda.py is; tests/host/test_waits.py has what needs no GPU.
"""

import pytest
import replaying
import tiny
import torch
from helping import helping
from on_cuda import CLOSE, REHEARSED, latents, model, no_waits
from pairs import Pair, settings
from photographs import scene, seen

pytestmark = [pytest.mark.comfy, pytest.mark.cuda, pytest.mark.usefixtures("at_once")]
WARM, STEADY = 24, 16


def asked(kind):
    from livediffusion.engine.coherence.carry import Carry
    from livediffusion.host.models.coherence import attach

    base = model()
    if kind == "reuse":
        return helping(base, reuse={"interval": 3, "awake": 0.5})
    if kind == "future":
        return helping(base, future={})
    if kind in ("memory", "calm"):
        base = helping(base, memory={"bank": "merged"})
    return attach(base, carry=Carry()) if kind == "calm" else base


def brought(i):
    """A camera that pans over a photograph, for noise that goes with it."""
    from livediffusion.engine.moving import Pictures
    from livediffusion.host.sampling.noises import Brought

    return Brought(Pictures(seen(scene(0), x=5.0 * i, y=-2.0 * i, side=64)[None]))


@pytest.mark.parametrize("kind", ["reuse", "memory", "calm", "future", "flow noise"])
def test_a_steady_stream(kind):
    from livediffusion.compiled.graph import CudaRecording

    pair = Pair(asked(kind), recording=replaying.Replaying if REHEARSED else CudaRecording)
    pair.guide()
    still = latents(1000)
    clean = [still + 0.1 * latents(i) for i in range(WARM + STEADY)]
    given = [brought(i) if kind == "flow noise" else None for i in range(WARM + STEADY)]
    outs = []

    def both(i):
        for stream, guider in zip((pair.plain, pair.graph), pair.guiders, strict=True):
            outs.append(stream.run(guider, clean[i], settings(), brought=given[i]))

    for i in range(WARM):
        both(i)
    with no_waits():
        for i in range(WARM, WARM + STEADY):
            both(i)
    for i in range(0, len(outs), 2):
        assert tiny.rms(outs[i + 1], outs[i]) <= CLOSE, i // 2
    assert pair.captures and pair.attached.reason is None, pair.attached.reason


def test_a_cut_is_awake_in_a_recorded_stream_as_in_another():
    from livediffusion.compiled.graph import CudaRecording

    pair = Pair(asked("reuse"), recording=replaying.Replaying if REHEARSED else CudaRecording)
    pair.guide()
    for i in range(3 * WARM):
        frame = latents(1000 + i // 16) + 0.1 * latents(i)
        if i % 29 == 7:
            frame = torch.full_like(frame, float("nan"))
        a, b = pair.run(settings(), frame)
        assert tiny.rms(b, a) <= CLOSE, i
        banks = pair.graph.coherent.neighbours.reusing.banks
        assert i < 10 or all(bank.features.isfinite().all() for bank in banks), i
    assert pair.plain.stats()["reuse"] == pair.graph.stats()["reuse"]
