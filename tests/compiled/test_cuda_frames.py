"""Whole frames on a GPU, through ComfyUI's own queue and executor: what waits between their nodes.
Run as test_cuda.py is; under dynamic VRAM it is about something."""

import collections
import contextlib

import inprocess
import pytest
from inprocess import Client, camera, flat, grey, view

pytestmark = [pytest.mark.comfy, pytest.mark.cuda]
FRAMES = 12


def graph():
    """A camera through the bundled model at one level."""
    guider = {
        "model": ["3", 0], "positive": ["5", 0], "cfg": 1.0, "delta": 1.0, "mode": "off",
    }  # fmt: skip
    levels = {"model": ["3", 0], "steps": 1, "strength": 0.5, "spacing": "uniform t"}
    stream = {
        "guider": ["6", 0], "sigmas": ["7", 0], "latent": ["8", 0], "noise_seed": 0,
        "step_rule": "lcm", "frames_per_slot": 1, "mode": "live", "conditioning": "per frame",
        "add_noise": True,
    }  # fmt: skip
    return {
        "1": camera(width=64, height=64),
        "2": view(["10", 0]),
        "3": {"class_type": "LiveDemoModel", "inputs": {}},
        "5": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["3", 1], "text": "neon night"}},
        "6": {"class_type": "LiveRCFGGuider", "inputs": guider},
        "7": {"class_type": "LiveStrength", "inputs": levels},
        "8": {"class_type": "LiveEncode", "inputs": {"pixels": ["1", 0], "vae": ["3", 2]}},
        "9": {"class_type": "LiveStreamSampler", "inputs": stream},
        "10": {"class_type": "LiveDecode", "inputs": {"samples": ["9", 0], "vae": ["3", 2]}},
    }


def shown(comfy, asked):
    """The greys of one picture each of FRAMES frames, and what the later half has asked of the
    device."""

    async def work(http):
        client = await Client.start(http, comfy.url, graph())
        for i in range(FRAMES):
            if i == FRAMES // 2:
                asked.clear()
            await client.send(flat(20 * i, 64))
            await client.wait(lambda i=i: len(client.views) > i, 120)
        counted = dict(asked)
        await client.stop()
        return [grey(packet) for packet, _ in client.views], counted

    return inprocess.live(work)


def test_frames_wait_for_nothing_and_show_what_they_did(monkeypatch):
    import comfy.model_management as management
    from livediffusion.live import run

    asked = collections.Counter()
    for name in ("synchronize", "soft_empty_cache"):
        real = getattr(management, name)
        monkeypatch.setattr(
            management, name, lambda *a, r=real, n=name, **k: (asked.update([n]), r(*a, **k))[1]
        )
    with inprocess.comfy() as (comfy, _):
        ours, waited = shown(comfy, asked)
        assert waited == {}
        monkeypatch.setattr(run, "unhurried", contextlib.nullcontext)
        theirs, _ = shown(comfy, asked)
    assert len(set(theirs)) > FRAMES // 2
    assert all(abs(a - b) <= 1 for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
