"""What a node shows of a schedule: its levels beside others, and the error to expect."""

import json
from typing import Any

from ..schedules.find import PICTURES, TEACHER
from ..schedules.results import Result

_WORDS = {TEACHER: "RMSE to 100 steps", PICTURES: "Frechet distance"}


def plot(levels, others: dict[str, Any], lines: list[str]) -> dict[str, list]:
    """For web/live/plot.mjs.

    Args:
        levels: n + 1, of the node itself.
        others: levels of other schedules, by name.
        lines: of text below.
    """
    shown = {
        "levels": [float(level) for level in levels],
        "others": {name: [float(v) for v in other] for name, other in others.items()},
        "lines": lines,
    }
    # as text: what is not text in a node's output is taken for a file by those who list files
    return {"livediffusion_steps": [json.dumps(shown)]}


def plotted(result: Result) -> dict[str, list]:
    """Of found steps."""
    lines = []
    for goal, (error, hand) in result.errors.items():
        ratio = f" ({error / hand:.2f} x)" if hand > 0 else ""
        lines.append(f"{_WORDS.get(goal, goal)}: {error:.3g}, {result.hand_made} {hand:.3g}{ratio}")
        if goal in result.whole:
            lines.append(f"the whole network: {result.whole[goal][0]:.3g}")
    if result.skips:
        blocks = ", ".join(str(len(names)) for names in result.skips)
        lines.append(f"{result.flops:.0%} of the network runs: use the model output")
        lines.append(f"blocks left out at each step: {blocks}")
    if result.shifts:
        lines.append("time shift: use the model output")
    if not result.complete:
        lines.append(f"{result.rounds[0]} of {result.rounds[1]} rounds")
    return plot(result.levels, result.curves, lines)
