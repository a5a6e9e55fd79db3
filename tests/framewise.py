"""The oracle: each frame alone through ComfyUI's SamplerCustomAdvanced, and a stream against it.

Frames have numbers; what a stream gives is compared with the frame that it is, wherever it comes
out.
"""

import collections
from dataclasses import dataclass, field
from typing import Any

import comfy.samplers
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
LEAST = FEW[::2]


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
        masks: noise masks, one per row, or None; every frame has the mask of its row.
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
        row = row if self.rows or self.masks is not None else 0
        if (n, frame, row) not in self.known:
            guider = self.guider((row if self.rows else 0,))
            self.known[n, frame, row] = self._sampled(guider, n, frame, row)
        return self.known[n, frame, row]

    def _sampled(self, guider, n, frame, row):
        source = self.sources[frame : frame + 1]
        latent = {"samples": source}
        if self.masks is not None:
            latent["noise_mask"] = self.masks[row : row + 1]
        return SamplerCustomAdvanced.execute(
            SlotZero(tuple(source.shape[1:])), guider, comfy.samplers.ksampler(self.rule),
            torch.tensor(self.levels(n)), latent,
        ).args[0]["samples"]  # fmt: skip

    def in_order(self, n, entered):
        """The same frame by frame with one guider, entered being (frame, row) in order.

        Where a patch keeps something from one sampling to the next, this is what ComfyUI gives.
        """
        guider = self.guider((0,))
        return [self._sampled(guider, n, frame, row) for frame, row in entered]

    def settings(self, n, drain):
        return Settings(self.levels(n), self.rule, SEED, drain=drain)

    def mask(self, rows):
        return None if self.masks is None else self.masks[list(rows)]


def off(out, want, sources):
    """Relative RMS error; relative to the sources where next to nothing is wanted.

    ComfyUI leaves rounding where no conditioning is active at a level.
    """
    scale = max(want.double().square().mean().sqrt(), sources.double().square().mean().sqrt())
    error = float((out.double() - want.double()).square().mean().sqrt() / scale)
    return error if error == error else float("inf")


@dataclass
class Found:
    """What a stream gave.

    Attributes:
        road: how, by its own account.
        error: the worst one, relative RMS.
        where: it was.
        checked: how many frames came out.
    """

    road: str
    error: float
    where: str
    checked: int


def found(case, n, entered, outs, road):
    """Judges what came out.

    Args:
        entered: (frame, row) of all frames in the order in which they entered.
        outs: (place in that order, what came out, where).
    """

    def judged(wants):
        errors = [
            off(out, want, case.sources) for (_, out, _), want in zip(outs, wants, strict=True)
        ]
        worst = max(range(len(outs)), key=errors.__getitem__)
        return Found(road, errors[worst], outs[worst][2], len(outs))

    assert outs, "something came out"
    out = judged([case.alone(n, *entered[i]) for i, _, _ in outs])
    if out.error > NEAR and not case.rows:
        # a patch that never forgets, at one step: stock gives this, and nothing else, either
        order = case.in_order(n, entered)
        again = judged([order[i] for i, _, _ in outs])
        out = again if again.error <= NEAR else out
    return out


def clip(case, n, f, frames=CLIP):
    """Frames drained: output i is input i, under row i."""
    stream, rows = Stream(f), tuple(range(len(frames)))
    out = stream.run(
        case.guider(rows if case.rows else (0,)), case.sources[list(frames)],
        case.settings(n, True), case.mask(rows),
    )  # fmt: skip
    assert out.shape[0] == len(frames)
    entered = list(zip(frames, rows, strict=True))
    outs = [(i, out[i : i + 1], f"output {i} of {len(frames)}") for i in rows]
    return found(case, n, entered, outs, stream.stats().get("road", "?"))


def live(case, n, f, runs=None, moving=False):
    """Frames run by run; what comes out is n - 1 ticks old, or this run's on the road per frame.

    In runs of several frames, frame i of a run is under row i of that run's conditioning.

    Args:
        moving: each run has a conditioning of its own: every frame is under the row of its number.
    """
    runs = LIVE[f] if runs is None else runs
    stream, guider, outs = Stream(f), None, []
    entered = [(frame, frame if moving else i) for run in runs for i, frame in enumerate(run)]
    came = [r for r, run in enumerate(runs) for _ in run]
    start = 0
    for r, run in enumerate(runs):
        rows = run if moving else tuple(range(len(run)))
        if guider is None or moving:
            guider = case.guider(rows if case.rows else (0,))
        out = stream.run(guider, case.sources[list(run)], case.settings(n, False), case.mask(rows))
        assert out.shape[0] == len(run)
        road = stream.stats().get("road", "?")
        # all runs are multiples of f frames, so that ticks are full
        delay = 0 if road == "per frame" else f * (n - 1)
        there = [(start + j - delay, j) for j in range(len(run)) if start + j >= delay]
        outs += [(i, out[j : j + 1], f"run {r}, output {j}") for i, j in there]
        if there:
            newest = came[there[-1][0]]
            assert stream.lag == r - newest, "lag counts from the frame that came out"
        start += len(run)
    return found(case, n, entered, outs, road)


def refused(error):
    """Whether an error is a refusal in words: it begins with the name of an input of the node."""
    return isinstance(error, ValueError) and str(error).startswith(
        ("guider: ", "model: ", "sigmas: ", "latent: ", "positive: ", "negative: ")
    )


def judge(case, way):
    """What a case gives in a way (n, F, clip): its road, or "refused".

    Raises:
        AssertionError: neither equal nor refused.
    """
    n, f, is_clip = way
    try:
        out = (clip if is_clip else live)(case, n, f)
    except ValueError as error:
        if refused(error):
            return "refused"
        raise
    assert out.error <= NEAR, f"{out.error:.1e} off on road {out.road}, {out.where}"
    return out.road


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
