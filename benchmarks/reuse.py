"""What Live Reuse saves, and how far its pictures are from those of the whole network.

The part `reuse` of `run.py bench`: interval by depth on the judged half of the clips of calm_clips,
the first frames after a cut, times in turns. A frame is compared with the one that the same stream
makes of the same picture with the whole network; errors of a clip are put together as squares, as
one frame in a few is exact and a mean of decibels would be flattered. Beside the JSON come contact
sheets and a film: look at them. With --docs it also writes the table and the pictures of
docs/reuse.md.
"""

import contextlib
import math
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import calm_clips
import calm_figures
import calm_sheets
import torch
from calm_clips import WARM, Clip
from calm_cost import taken
from calm_ways import BEST, Kit, Run, Way, attached, preset
from measure import Bar, Report
from torch import Tensor

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 4
OFF = Way("the whole network")
BEFORE = 12  # frames before a cut: memories have filled
AFTER = 3  # that are told after one
FRAMES = 12  # of a clip that count, behind WARM: some rounds of every interval
Seen = Callable[[Clip, dict[str, Tensor]], None]
TOKENS = 77  # of a prompt
SHOWN = (8, 6)  # clips of the film in docs, by their number
SIDE, QUALITY = 160, 45  # of its pictures
MARKS = "<!-- written by run.py bench --only reuse --docs -->", "<!-- end of what is written -->"
PICTURES = """

![The camera, the whole network, Live Reuse as it is put in, and two that save more](reuse.webp)

![Frames, what changes beside the motion, and a line over time](reuse.jpg)
"""


def reused(interval: int, depth: str | None = None, awake: float | None = None) -> Way:
    """A way with Live Reuse; what is None is as it is put in."""
    from livediffusion.engine.blocks.schedule import Reuse

    asked = {"interval": interval, "depth": depth, "awake": awake}
    reuse = Reuse(**{key: value for key, value in asked.items() if value is not None})
    name = f"{reuse.depth}, every {interval}"
    if awake is not None:
        name += f", awake {awake:g}"
    return Way(name, attached(reuse=reuse))


def default() -> Way:
    """Live Reuse as it is put in."""
    return reused(settings().interval)


def settings():
    """engine.blocks.schedule.Reuse as it is put in."""
    from livediffusion.engine.blocks.schedule import Reuse

    return Reuse()


def ways(quick: bool = False) -> list[Way]:
    """What is compared."""
    from livediffusion.engine.blocks.schedule import DEPTHS

    outermost, finest = DEPTHS[0], DEPTHS[-1]
    intervals = (4, 8) if quick else (2, 3, 4, 6, 8)
    made = [OFF, *(reused(i, finest) for i in intervals)]
    made += [reused(i, outermost) for i in ((2,) if quick else (2, 4))]
    if default().name not in [way.name for way in made]:
        made.insert(1, default())
    return made


class Watched(Run):
    """A run whose network is watched.

    Attributes:
        rows, whole: of the network's calls, and those of them that ran whole.
        ms: of the network, of each frame.
    """

    def __init__(self, kit: Kit, clip: Clip, way: Way):
        super().__init__(kit, clip, way)
        self.rows = self.whole = 0
        self.ms: list[float] = []
        self._shape: tuple[int, ...] = ()  # of a latent

    def frame(self, image: Tensor) -> Tensor | None:
        height, width = image.shape[1:3]
        patch = self.kit.vae.downscale_ratio
        self._shape = (self.kit.vae.latent_channels, height // patch, width // patch)
        unet = self.kit.model.get_model_object("diffusion_model")
        with clocked(unet) as spent:
            shown = super().frame(image)
        self.ms.append(1000 * sum(spent))
        if self._reusing is not None:
            rows, whole = self._reusing.looked()
            self.rows, self.whole = self.rows + rows, self.whole + whole
        return shown

    def forget(self) -> None:
        """What has been counted so far."""
        self.rows = self.whole = 0

    @property
    def share(self) -> float:
        """Of the network's FLOPs that were spent, as they are counted."""
        from livediffusion.host.models.flops import cost_of
        from livediffusion.host.models.walk import is_inner

        reusing = self._reusing
        if reusing is None or not self.rows:
            return 1.0
        unet = self.kit.model.get_model_object("diffusion_model")
        cost = cost_of(unet, self._shape, TOKENS)
        inner = sum(f for name, f in cost.parts.items() if is_inner(name, reusing.depth, unet))
        return 1 - inner * (1 - self.whole / self.rows) / cost.whole

    @property
    def _reusing(self):
        neighbours = self.stream.coherent.neighbours
        return None if neighbours is None else neighbours.reusing


@contextlib.contextmanager
def clocked(unet: torch.nn.Module, clock: Callable[[], float] = time.perf_counter):
    """Seconds of each call of a network, while it lasts.

    By a class of its own: a hook or a forward on the module would be noticed, and frames sampled
    one by one.
    """
    spent: list[float] = []
    kind = type(unet)

    def forward(self, *args: Any, **named: Any) -> Tensor:
        began = clock()
        try:
            return kind.forward(self, *args, **named)
        finally:
            spent.append(clock() - began)

    unet.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    try:
        yield spent
    finally:
        unet.__class__ = kind


def film(kit: Kit, clip: Clip, way: Way, pictures: Tensor | None = None) -> tuple[Tensor, float]:
    """Every frame of a clip restyled, [T', 3, H, W] in 0..1, and the share of the FLOPs that the
    frames took that count."""
    run, out = Watched(kit, clip, way), []
    for t, picture in enumerate(clip.noisy if pictures is None else pictures):
        if t == WARM:
            run.forget()
        shown = run.frame(picture.movedim(0, -1)[None])
        if shown is not None:
            out.append(shown)
    return torch.cat(out).movedim(-1, 1), run.share


def errors(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each frame, [T]."""
    return (a.clamp(0, 1) - b.clamp(0, 1)).square().flatten(1).mean(1)


def decibels(error: float) -> float:
    """PSNR of a mean squared error; 100 at most."""
    return -10 * math.log10(max(error, 1e-10))


def compared(
    kit: Kit, every: list[Way], half: str, few: int, against: Way = OFF,
    told: Callable[[str], None] = print, seen: Seen | None = None,
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """Every way on every clip of a half: {way: [figures of a clip, and its name]}.

    Args:
        few: clips, of twelve, and a fourth as many still scenes.
        against: whose frames are the right ones; the first of the ways.
        seen: called with (clip, {way: frames that count}) for each clip.
    """
    rows: dict[str, list[dict[str, Any]]] = {way.name: [] for way in every}
    moving, stills = calm_clips.clips(half, True, few), max(1, few // 4)
    for clip in [*moving, *calm_clips.clips(half, False, stills)]:
        last = min(WARM + FRAMES, clip.frames)
        counted, pictures = slice(WARM, last), clip.noisy[: last + STEPS - 1]
        made: dict[str, Tensor] = {}
        for way in every:
            whole, share = film(kit, clip, way, pictures)
            out = made[way.name] = whole[counted]
            right = made[against.name]
            each = errors(out, right)
            own = {
                "clip": clip.name, "share": share, "moves": clip.moves,
                "psnr": decibels(float(each.mean())), "frame": decibels(float(each.max())),
                **calm_figures.measure(out, clip, WARM, right),
            }  # fmt: skip
            rows[way.name].append(own)
            told(f"{clip.name:<28} {way.name:<26} {own['psnr']:6.2f} dB  {share:.3f}")
        if seen is not None:
            seen(clip, made)
    return rows


def table(rows: dict[str, list[dict[str, Any]]], against: str = OFF.name) -> list[dict[str, Any]]:
    """A row per way. PSNR is of the clips that move: their mean, the worst, the worst frame."""
    told = []
    for name, own in rows.items():
        moving = [one for one in own if one["moves"]]
        row: dict[str, Any] = {
            "way": name,
            "share of FLOPs": statistics.mean(one["share"] for one in moving),
            "most": max(one["share"] for one in moving),
            "PSNR": statistics.mean(one["psnr"] for one in moving),
            "worst clip": min(one["psnr"] for one in moving),
            "worst frame": min(one["frame"] for one in moving),
            "sharpness": calm_figures.geometric(one["sharpness"] for one in moving),
        }
        for figure in ("warp error", "flicker"):
            pairs = [(a[figure], b[figure]) for a, b in zip(own, rows[against], strict=True)
                     if figure in a]  # fmt: skip
            row[f"{figure} / whole"] = calm_figures.geometric(a / b for a, b in pairs)
        told.append(row)
    return told


def cuts(kit: Kit, every: list[Way], half: str, pairs: int) -> list[dict[str, Any]]:
    """The first frames after a cut from one clip to another, in the look of the other.

    Returns:
        a row per way and frame after the cut: PSNR to the whole network's, and what is lost of the
        PSNR to the look's own filter; the least of all cuts.
    """
    clips = calm_clips.clips(half, True, 12)
    lost: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for i in range(pairs):
        first, then = clips[(5 * i + 7) % 12], clips[5 * i % 12]
        pictures = torch.cat([first.noisy[:BEFORE], then.noisy[: AFTER + STEPS]])
        right: Tensor | None = None
        for way in every:
            out = film(kit, then, way, pictures)[0][BEFORE : BEFORE + AFTER]
            right = out if right is None else right
            for t in range(AFTER):
                ideal = then.filtered(t)
                own, best = (decibels(float(errors(x[t : t + 1], ideal))) for x in (out, right))
                psnr = decibels(float(errors(out[t : t + 1], right[t : t + 1])))
                lost.setdefault((way.name, t), []).append((psnr, own - best))
    return [
        {"way": name, "frame after the cut": t + 1,
         "PSNR, the worst cut": min(psnr for psnr, _ in own),
         "look, dB more, the worst": min(more for _, more in own)}
        for (name, t), own in lost.items()
    ]  # fmt: skip


def times(kit: Kit, every: list[Way], clip: Clip, frames: int) -> dict[str, dict[str, float]]:
    """Frames of each way in turns: {way: ms, and how much of OFF's the network takes, and all}.

    Ratios are medians of those of each round, so that a busy machine slows both.
    """
    runs = {way.name: Watched(kit, clip, way) for way in every}
    whole = taken(runs, clip, frames)
    told = {}
    for name, own in whole.items():

        def ratio(mine: list[float], theirs: list[float]) -> float:
            return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))

        count = len(own.ms)
        told[name] = {
            "ms": own.median, "A/A": own.spread,
            "frame": ratio(own.ms, whole[OFF.name].ms),
            "UNet": ratio(runs[name].ms[-count:], runs[OFF.name].ms[-count:]),
        }  # fmt: skip
    return told


def part(report: Report, quick: bool, docs: bool) -> None:
    """The whole part.

    Args:
        quick: four clips, fewer ways.
        docs: write what docs/reuse.md shows.
    """
    every, kit, place = ways(quick), Kit(steps=STEPS), report.path.parent / "reuse"
    place.mkdir(parents=True, exist_ok=True)
    # cuts, and as many clips beside Live Memory
    few, rounds, pairs = (4, 12, 2) if quick else (12, 24, 4)
    names = [name for name, _, _ in calm_clips.MOTIONS]
    wanted = [names[i] for i in SHOWN]
    films: list[dict[str, Tensor]] = []
    flows: list[Tensor] = []

    def seen(clip: Clip, made: dict[str, Tensor]) -> None:
        count = len(made[OFF.name])
        pictures = {"camera": clip.noisy[WARM : WARM + count], **made}
        name = clip.name.replace(", ", "_").replace(" ", "_")
        flow = clip.flow[WARM : WARM + count - 1] if clip.moves else None
        calm_sheets.sheet(pictures, place / f"{name}.png", flow=flow)
        if clip.name in wanted or (quick and not films):
            films.append({key: calm_sheets.kept(x) for key, x in shown(pictures).items()})
            flows.append(flow)

    def say(text: str) -> None:
        print(text, flush=True)

    rows = compared(kit, every, "judged", few, told=say, seen=seen)
    figures = table(rows)
    clip = calm_clips.clips("judged", True, few)[0]
    spent = times(kit, every, clip, rounds)
    for row in figures:
        row |= {f"{key} / whole": spent[row["way"]][key] for key in ("UNet", "frame")}
    report.told["reuse, clip by clip"] = rows
    report.told["reuse, times"] = spent
    report.add("reuse, the embedded model", figures, f"n = {STEPS}, {calm_clips.SIDE} pixels")
    asleep = reused(settings().interval, awake=0.0)
    after = cuts(kit, [OFF, default(), asleep], "judged", pairs)
    report.add("reuse, after a cut", after, "the worst of the cuts")
    helped = beside_calm(kit, "judged", pairs, say)
    report.add("reuse beside Live Memory", helped, "against Live Memory with the whole network")
    bars(report, figures, after)
    if docs:
        run = (
            f"These tables are of whole pictures of {few} clips, {pairs} cuts, {pairs} clips "
            f"beside Live Memory; times of {rounds} rounds."
        )
        write(run, figures, after, helped, films, flows, ROOT / "docs")
    size = calm_sheets.film(films, place / "reuse.webp", SIDE, QUALITY)
    print(f"\n{place}: the sheets and the film ({size / 1e6:.2f} MB). Look at them.")


def shown(pictures: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the film: the camera, the whole network, what is put in, and what saves more."""
    from livediffusion.engine.blocks.schedule import DEPTHS

    wanted = ["camera", OFF.name, default().name, reused(8).name, reused(2, DEPTHS[0]).name]
    return {name: pictures[name] for name in wanted if name in pictures}


def beside_calm(
    kit: Kit, half: str, few: int, told: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Live Memory with and without Live Reuse."""
    memory, reuse = preset(BEST), default()
    calm = Way(BEST, memory)
    both = Way(f"{BEST}, {reuse.name}", lambda model: reuse.model(memory(model)))
    return table(compared(kit, [calm, both], half, few, calm, told), calm.name)


def bars(report: Report, figures: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    """What the project asked of Live Reuse as it is put in."""
    name = default().name
    row = next(row for row in figures if row["way"] == name)
    third = next(one for one in after
                 if (one["way"], one["frame after the cut"]) == (name, 3))  # fmt: skip
    told = (
        Bar("FLOPs / whole", row["share of FLOPs"], 0.65, counted=True),
        Bar("the UNet's time / whole", row["UNet / whole"], 0.65),
        Bar("PSNR, dB", row["PSNR"], least=34, counted=True),
        Bar("PSNR of the worst clip, dB", row["worst clip"], least=28, counted=True),
        Bar("third frame after a cut: PSNR to the look's filter - the whole network's, dB",
            third["look, dB more, the worst"], least=-0.5, counted=True),
    )  # fmt: skip
    report.bars += [Bar(f"reuse: {b.name}", b.figure, b.most, b.least, b.counted) for b in told]


def write(
    run: str, figures: list[dict[str, Any]], after: list[dict[str, Any]],
    helped: list[dict[str, Any]], films: list[dict[str, Tensor]], flows: list[Tensor],
    folder: pathlib.Path,
) -> None:  # fmt: skip
    """The tables and the pictures of reuse.md in a folder.

    Args:
        run: what they are of, in a sentence.
        films: as `calm_sheets.kept`, by name; the sheet is of the first, with its flow.
    """
    page = folder / "reuse.md"
    before, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    _, behind = rest.split(MARKS[1])
    calm_sheets.film(films, folder / "reuse.webp", SIDE, QUALITY)
    calm_sheets.sheet(films[0], folder / "reuse.jpg", 160, flows[0] if flows else None)
    three = (figures, COLUMNS), (after, CUT), (helped, COLUMNS)
    tables = "\n\n".join(markdown(*one) for one in three if one[0])
    whole = f"{before}{MARKS[0]}\n\n{run}\n\n{tables}{PICTURES}\n{MARKS[1]}{behind}"
    page.write_text(whole, encoding="utf-8")


COLUMNS = {
    "way": "", "share of FLOPs": "FLOPs, x whole", "UNet / whole": "the UNet's time, x whole",
    "frame / whole": "a frame, x whole", "PSNR": "PSNR, dB", "worst clip": "worst clip",
    "worst frame": "worst frame", "warp error / whole": "warp error, x whole",
    "flicker / whole": "flicker, x whole", "sharpness": "sharpness, x whole",
}  # fmt: skip
CUT = {
    "way": "", "frame after the cut": "frame after the cut", "PSNR, the worst cut": "PSNR, dB",
    "look, dB more, the worst": "look, dB more than whole",
}  # fmt: skip


def markdown(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """A table, of the columns that the rows have."""
    columns = {key: name for key, name in columns.items() if any(key in row for row in rows)}
    lines = [list(columns.values()), ["---"] * len(columns)]
    for row in rows:
        lines.append([_cell(row.get(key)) for key in columns])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        # a frame that is the same has no error at all
        return "same" if value >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return "" if value is None else str(value)
