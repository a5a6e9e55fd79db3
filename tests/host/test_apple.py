"""Streams on what an Apple GPU lacks and how it is called (tests/apple.py)."""

import pairs
import pytest
import tiny
import torch
from apple import apple
from photographs import scene, seen

pytestmark = pytest.mark.comfy


def test_carried_pictures_and_noise_that_moves(monkeypatch):
    from livediffusion.engine.coherence.carry import Carry
    from livediffusion.host.models.coherence import attach

    film = [seen(scene(0), x=4.0 * i, side=80)[None] for i in range(8)]
    model = attach(tiny.model(), carry=Carry())
    wanted = run(model, film)
    with apple(monkeypatch):
        ours = run(model, film)
    assert tiny.rms(ours, wanted) <= 1e-4


def run(model, film):
    from livediffusion.engine.moving import Pictures
    from livediffusion.host.sampling.noises import Brought
    from livediffusion.host.sampling.stream import Stream

    stream, guider, outs = Stream(1), pairs.guider(model), []
    for i, frame in enumerate(film):
        clean = tiny.latents(1, 0, 20) + 0.1 * tiny.latents(1, i, 20)
        brought = Brought(Pictures(frame))
        outs.append(stream.run(guider, clean, pairs.settings(), brought=brought))
    return torch.cat(outs)


def test_a_stream_keeps_its_noise_where_a_device_has_two_names(monkeypatch):
    """A model says "mps", its tensors "mps:0"."""
    from livediffusion.engine import moving
    from livediffusion.engine.moving import Pictures
    from livediffusion.host.sampling import noises

    made, begun = [], []

    class Counted(noises.SlotNoise):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(args)

    real = moving.begun
    monkeypatch.setattr(noises, "SlotNoise", Counted)
    monkeypatch.setattr(moving, "begun", lambda *args: begun.append(1) or real(*args))
    known, settings, latents = noises.Noises(), pairs.settings(), tiny.latents(1)
    given, said = torch.device("cpu", 0), latents.device
    assert given != said
    for i in range(4):
        brought = noises.Brought(Pictures(seen(scene(0), x=2.0 * i, side=64)[None]))
        met = known.of_run(given, latents, settings, brought)
        known.fixed(settings.seed, tuple(latents.shape[1:]), said)
        known.taken(met, slice(0, 1))
    assert len(made) == len(begun) == 1
