"""The oracle: each frame alone through ComfyUI's SamplerCustomAdvanced, and a stream against it.

Frames have numbers; what a stream gives is compared with the frame that it is, wherever it comes
out.
"""

import collections
from dataclasses import dataclass, field
from typing import Any

import comfy.samplers
import tiny
import torch
from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced
from livediffusion.engine.noise import SlotNoise
from livediffusion.host.sampling.stream import Settings, Stream

SEED = 11
NEAR = 1e-5  # relative RMS: rounding, with gentle weights
FRAMES = 4
CLIP = (0, 1, 2)  # frame i under row i
# the frames of the runs of a live stream; no two runs have the same frames in the same order
LIVE = {1: ((0,), (1,), (2,), (3,)), 2: ((0, 1), (2, 3), (1, 0))}
# n, F, and whether the frames are a clip
WAYS = tuple((n, f, clip) for n in (1, 3) for f in (1, 2) for clip in (True, False))
FEW = ((3, 2, True), (1, 2, False), (3, 1, False))  # every value of each


class SlotZero:
    """A NOISE that gives every frame the noise of slot 0."""

    seed = SEED

    def __init__(self, shape):
        self.noise = SlotNoise(SEED, shape)

    def generate_noise(self, latent):
        return self.noise.slot(0).expand_as(latent["samples"]).clone()


@dataclass
class Case:
    """What is sampled: sources, levels, and how a guider is made.

    Attributes:
        make: gives a fresh guider; make(rows) where the conditioning has a row per frame, with
            rows a tuple of row numbers.
        sources: [N, C, H, W].
        levels: n to its n + 1 noise levels.
        masks: noise masks, one per row, or None.
        rows: whether the conditioning has a row per frame; else every frame is under row 0.
    """

    make: Any
    sources: torch.Tensor
    levels: Any
    masks: torch.Tensor | None = None
    rows: bool = False
    rule: str = "euler"
    known: dict = field(default_factory=dict)

    def guider(self, rows=(0,)):
        return self.make(rows)

    def alone(self, n, frame, row=0):
        """A frame alone under a row, [1, C, H, W]; in a guider of its own, as nothing else is."""
        row = row if self.rows else 0
        if (n, frame, row) not in self.known:
            source = self.sources[frame : frame + 1]
            latent = {"samples": source}
            if self.masks is not None:
                latent["noise_mask"] = self.masks[row : row + 1]
            self.known[n, frame, row] = SamplerCustomAdvanced.execute(
                SlotZero(tuple(source.shape[1:])), self.guider((row,)),
                comfy.samplers.ksampler(self.rule), torch.tensor(self.levels(n)), latent,
            ).args[0]["samples"]  # fmt: skip
        return self.known[n, frame, row]

    def settings(self, n, drain):
        return Settings(self.levels(n), self.rule, SEED, drain=drain)

    def mask(self, rows):
        return None if self.masks is None else self.masks[list(rows)]


@dataclass
class Found:
    """What a stream gave: its road, and the worst error with where it was."""

    road: str = "?"
    error: float = 0.0
    where: str = ""
    checked: int = 0

    def compare(self, out, want, where):
        error = tiny.rms(out, want)
        error = error if error == error else float("inf")
        self.checked += 1
        if self.where == "" or error > self.error:
            self.error, self.where = error, where


def clip(case, n, f, frames=CLIP):
    """Frames drained: output i is input i, under row i."""
    stream, found = Stream(f), Found()
    rows = tuple(range(len(frames)))
    out = stream.run(
        case.guider(rows if case.rows else (0,)), case.sources[list(frames)],
        case.settings(n, True), case.mask(rows),
    )  # fmt: skip
    assert out.shape[0] == len(frames)
    for i, frame in enumerate(frames):
        found.compare(out[i : i + 1], case.alone(n, frame, i), f"output {i} of {len(frames)}")
    found.road = stream.stats().get("road", "?")
    return found


def live(case, n, f, runs=None):
    """Frames run by run; what comes out is n - 1 ticks old, or this run's on the road per frame.

    In runs of several frames, frame i of a run is under row i of that run's conditioning.
    """
    stream, found = Stream(f), Found()
    runs = LIVE[f] if runs is None else runs
    guider = None
    ticks = [
        [(frame, i + k, r) for k, frame in enumerate(run[i : i + f])]
        for r, run in enumerate(runs)
        for i in range(0, len(run), f)
    ]
    done = 0
    for r, run in enumerate(runs):
        if guider is None or len(run) != len(runs[r - 1]):
            guider = case.guider(tuple(range(len(run))) if case.rows else (0,))
        out = stream.run(
            guider, case.sources[list(run)], case.settings(n, False), case.mask(range(len(run)))
        )
        assert out.shape[0] == len(run)
        found.road = stream.stats().get("road", "?")
        count = -(-len(run) // f)
        delay = 0 if n == 1 or found.road == "per frame" else n - 1
        at, newest = 0, None
        for t in range(done, done + count):
            size = len(ticks[t])
            if t >= delay:
                for k, (frame, row, came) in enumerate(ticks[t - delay]):
                    where = f"run {r}, output {at + k}"
                    found.compare(out[at + k : at + k + 1], case.alone(n, frame, row), where)
                    newest = came
            at += size
        done += count
        if newest is not None:
            assert stream.lag == r - newest, "lag counts from the frame that came out"
    return found


def refused(error):
    """Whether an error is a refusal in words: it begins with the name of an input of the node."""
    return isinstance(error, ValueError) and str(error).startswith(
        ("guider: ", "model: ", "sigmas: ", "latent: ", "conditioning: ", "mask: ")
    )


def judge(case, way):
    """What a case gives in a way (n, F, clip): its road, or "refused".

    Raises:
        AssertionError: neither equal nor refused.
    """
    n, f, is_clip = way
    try:
        found = (clip if is_clip else live)(case, n, f)
    except ValueError as error:
        if refused(error):
            return "refused"
        raise
    assert found.checked, "something came out"
    assert found.error <= NEAR, f"{found.error:.1e} off on road {found.road}, {found.where}"
    return found.road


def judged(case, ways):
    """(how often each road, what went wrong) of a case in several ways."""
    outcomes, wrong = collections.Counter(), []
    for way in ways:
        try:
            outcomes[judge(case, way)] += 1
        except Exception as error:  # all of a case's failures tell more than the first one
            name = f"n={way[0]} F={way[1]} {'clip' if way[2] else 'live'}"
            what = str(error).partition("\n")[0]
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            wrong.append(f"{name}: {kind}{what[:200]}")
    return outcomes, wrong


def basic(model, positive):
    """BasicGuider's guider."""
    from comfy_extras.nodes_custom_sampler import Guider_Basic

    guider = Guider_Basic(model)
    guider.set_conds(positive)
    return guider


def cfg(model, positive, negative, scale=2.0):
    """CFGGuider's guider."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(scale)
    return guider


def residual(model, positive, scale=1.6):
    """LiveGuidance's guider, self-negative, which works in every ordinary sampler, too."""
    from livediffusion.engine.guidance import Guidance
    from livediffusion.host.sampling.guider import RCFGGuider

    guider = RCFGGuider(model, Guidance("self-negative", scale, 0.9))
    guider.inner_set_conds({"positive": positive})
    return guider
