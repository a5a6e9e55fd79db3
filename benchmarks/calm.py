"""How calm each way is: clips with known motion, still scenes with a camera's noise.

The part `calm` of `run.py bench`; calm_figures.py says what the figures are, calm_ways.py what the
ways are. Beside the JSON come contact sheets and films: look at them. With --docs it also writes
the table and the pictures of docs/coherence.md.
"""

import pathlib
from typing import Any

import calm_clips
import calm_cost
import calm_figures
import calm_sheets
from calm_clips import WARM, Clip
from calm_ways import BEST, OFF, Kit, Way, ways
from measure import Bar, Report
from torch import Tensor

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHOWN = (8, 6)  # clips of the film in docs, by their number
SHOWN_WAYS = ("off", "future attention", "what is remembered", "what is carried", "flow noise",
              "calm")  # fmt: skip
SIDE, QUALITY = 144, 45  # of its pictures
MARKS = "<!-- written by run.py bench --only calm --docs -->", "<!-- end of what is written -->"
PICTURES = """

![The camera, the stream without, each part by itself, and calm](coherence.webp)

![Frames, what changes beside the motion, and a line over time](coherence.jpg)
"""


def frames(kit: Kit, clip: Clip, way: Way, pictures: Tensor | None = None) -> Tensor:
    """The frames that count, restyled."""
    return kit.run(clip, way, pictures)[WARM : clip.frames]


def judged(
    kit: Kit, every: list[Way], half: str = "judged", few: int = 12, told=print, seen=None
) -> dict[str, list[dict[str, Any]]]:
    """Every way on every clip of a half: {way: [figures of a clip, its name, the look asked for]}.

    Args:
        few: clips, of twelve, and half as many still scenes.
        seen: called with (clip, {way: frames}) for each clip.
    """
    rows: dict[str, list[dict[str, Any]]] = {way.name: [] for way in every}
    moving = calm_clips.clips(half, True, few)
    for clip in [*moving, *calm_clips.clips(half, False, max(1, few // 2))]:
        off, made = frames(kit, clip, OFF), {}
        for way in every:
            out = made[way.name] = off if way is OFF else frames(kit, clip, way)
            own = calm_figures.measure(out, clip, WARM, off)
            rows[way.name].append({"clip": clip.name, "asked": clip.look, **own})
            figures = [f"{key} {own[key]:.3f}" for key in calm_figures.FIGURES if key in own]
            told(f"{clip.name:<28} {clip.look:<11} {way.name:<24} {'  '.join(figures)}")
        if seen is not None:
            seen(clip, made)
    return rows


def table(rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row per way; warp error and flicker also as shares of off's, geometric means."""
    told = []
    for name, own in rows.items():
        row: dict[str, Any] = {"way": name, **calm_figures.together(own)}
        for figure in ("warp error", "flicker"):
            pairs = [(a[figure], b[figure]) for a, b in zip(own, rows[OFF.name], strict=True)
                     if figure in a]  # fmt: skip
            row[f"{figure} / off"] = calm_figures.geometric(a / b for a, b in pairs)
        told.append(row)
    return told


def part(report: Report, quick: bool, docs: bool) -> None:
    """The whole part.

    Args:
        quick: four clips and two still scenes.
        docs: write what docs/coherence.md shows.
    """
    every, kit, place = ways(), Kit(), report.path.parent / "calm"
    place.mkdir(parents=True, exist_ok=True)
    shown = [name for name, _, _ in calm_clips.MOTIONS]
    films: list[dict[str, Tensor]] = []
    flows: list[Tensor] = []

    def seen(clip: Clip, made: dict[str, Tensor]) -> None:
        pictures = {"camera": clip.noisy[WARM : clip.frames], **made}
        name = clip.name.replace(", ", "_").replace(" ", "_")
        flow = clip.flow[WARM : clip.frames - 1] if clip.moves else None
        calm_sheets.sheet(pictures, place / f"{name}.png", flow=flow)
        if clip.name in [shown[i] for i in SHOWN]:
            films.append({key: calm_sheets.kept(pictures[key]) for key in ("camera", *SHOWN_WAYS)})
            flows.append(flow)

    rows = judged(kit, every, "judged", 4 if quick else 12, lambda text: print(text, flush=True),
                  seen)  # fmt: skip
    films.append(filmed(kit, every, place))
    figures = table(rows)
    clip = calm_clips.clips("judged", True, 4 if quick else 12)[0]
    times = calm_cost.ticks(
        Kit(steps=calm_cost.STEPS), [way for way in every if way.slots is None], clip,
        20 if quick else 40,
    )  # fmt: skip
    operations = calm_cost.shares(every, kit)
    for row in figures:
        row["tick / off, n = 4"] = times.get(row["way"], {}).get("ratio")
        row["SD-Turbo's operations / off, n = 4"] = operations[row["way"]]
    report.told["calm, clip by clip"] = rows
    report.told["calm, ticks"] = times
    report.add("calm, the embedded model", figures, "bytes; geometric means over clips")
    bars(report, {row["way"]: row for row in figures})
    if docs:
        write(figures, films, ROOT / "docs", flows[0] if flows else None)
    calm_sheets.film(films, place / "calm.webp", SIDE, QUALITY)
    print(f"\n{place}: the sheets and the film. Look at them.")


def filmed(kit: Kit, every: list[Way], place: pathlib.Path) -> dict[str, Tensor]:
    """A held-out film, whose motion nobody knows: a sheet, and the frames that count."""
    name = calm_clips.FILMS["judged"]
    pictures = calm_clips.film(name)
    plan = calm_clips.Plan(name, calm_clips.FILM_LOOK, (), False)
    clip = calm_clips.Clip(plan, 0)
    made = {way.name: frames(kit, clip, way, pictures) for way in every if way.name in SHOWN_WAYS}
    made = {"camera": pictures[WARM : clip.frames], **made}
    calm_sheets.sheet(made, place / "film.png")
    return {key: calm_sheets.kept(x) for key, x in made.items()}


def bars(report: Report, rows: dict[str, dict[str, Any]]) -> None:
    """What the project asked of the best preset."""
    best, off = rows[BEST], rows[OFF.name]
    told = (
        Bar("warp error / off", best["warp error / off"], 0.75, counted=True),
        Bar("flicker / off", best["flicker / off"], 0.5, counted=True),
        Bar("sharpness / off", best["sharpness"], least=0.95, counted=True),
        Bar("PSNR to the look's filter - off's, dB", best["look"] - off["look"], least=-0.1,
            counted=True),
        Bar("edges as the camera's - off's", best["layout"] - off["layout"], least=-0.005,
            counted=True),
        Bar("tick / off, n = 4", best["tick / off, n = 4"], 1.15),
    )  # fmt: skip
    report.bars += [Bar(f"{BEST}: {b.name}", b.figure, b.most, b.least, b.counted) for b in told]


def write(
    figures: list[dict[str, Any]], films: list[dict[str, Tensor]], folder: pathlib.Path,
    flow: Tensor | None = None,
) -> None:  # fmt: skip
    """The table and the pictures of coherence.md in a folder.

    Args:
        films: as `calm_sheets.kept`, of the ways by name; the sheet is of the first.
        flow: of the first.
    """
    page = folder / "coherence.md"
    text = page.read_text(encoding="utf-8")
    size = calm_sheets.film(films, folder / "coherence.webp", SIDE, QUALITY)
    calm_sheets.sheet(films[0], folder / "coherence.jpg", 160, flow)
    print(f"{folder / 'coherence.webp'}: {size / 1e6:.2f} MB")
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    whole = f"{before}{MARKS[0]}\n\n{markdown(figures)}{PICTURES}\n{MARKS[1]}{after}"
    page.write_text(whole, encoding="utf-8")


def markdown(figures: list[dict[str, Any]]) -> str:
    """The table."""
    columns = {
        "way": "", "warp error": "warp error, bytes", "warp error / off": "x off",
        "flicker": "flicker, bytes", "flicker / off": "x off", "sharpness": "sharpness, x off",
        "look": "look, dB", "layout": "layout", "tick / off, n = 4": "tick, x off",
        "SD-Turbo's operations / off, n = 4": "SD-Turbo's operations, x off",
    }  # fmt: skip
    lines = [columns.values(), ["---"] * len(columns)]
    for row in figures:
        cells = []
        for key in columns:
            value = row.get(key)
            cells.append("" if value is None else value if key == "way" else _cell(key, value))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(key: str, value: float) -> str:
    return f"{value:.1f}" if key == "look" else f"{value:.2f}"
