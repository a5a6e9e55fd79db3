"""`python run.py serve --plan`: how many GPUs, who waits, what autoscaling does - on paper.

The number of GPUs comes from queueing theory (Erlang's formula for M/M/c) and is corrected by the
simulation (simulation.py), which runs a house's own admission and scaling; the rest is counted
there. What a door or a lobby bears is arithmetic on figures that were measured (docs/serve.md).
"""

import argparse
import json
import math
import pathlib
import random
import sys
from collections.abc import Iterable
from typing import Any

from . import arrivals, capacity, simulation
from .arrivals import Visit
from .simulation import Plan, Result, World

SIZES = (10, 30, 100, 300, 1000, 3000, 10_000)
_LOG = 256 * 2**20  # bytes of a log that is replayed
_TRIES = 6
_SIMULATED = 2400.0  # seconds, if nothing else is said


def erlang_c(servers: int, load: float) -> float:
    """The part of visitors who wait, of those who come to `servers` at random and stay as long as
    exponential times (M/M/c).

    Args:
        load: visitors who would be there at the same time if nobody waited; below `servers`.

    Source: A. K. Erlang, 1917; computed by his loss formula's recursion, which cannot overflow.
    """
    if load >= servers:
        return 1.0
    lost = 1.0
    for n in range(1, servers + 1):
        lost = load * lost / (n + load * lost)
    return lost / (1 - load / servers * (1 - lost))


def mean_wait(servers: int, load: float, mean: float, variation: float = 1.0) -> float:
    """Seconds that a visitor waits, in the mean.

    Args:
        mean: seconds that a visit takes.
        variation: the lengths' variance by the square of their mean; 1 is exact (M/M/c), of others
            it is the approximation by Allen and Cunneen (M/G/c, arrivals at random).
    """
    if load >= servers:
        return math.inf
    return erlang_c(servers, load) * mean / (servers - load) * (1 + variation) / 2


def slow_wait(servers: int, load: float, mean: float, part: float) -> float:
    """The wait that `part` of visitors do not exceed (M/M/c)."""
    waiting = erlang_c(servers, load)
    if load >= servers:
        return math.inf
    over = 1 - part
    return 0.0 if waiting <= over else math.log(waiting / over) * mean / (servers - load)


def slots_for(load: float, mean: float, wait_s: float, part: float = 0.95) -> int:
    """The fewest slots with which `part` of visitors wait no longer than `wait_s` (M/M/c)."""
    low = high = math.floor(load) + 1
    while slow_wait(high, load, mean, part) > wait_s:
        low, high = high, high + max(1, round(math.sqrt(high)))
    while low < high:
        middle = (low + high) // 2
        if slow_wait(middle, load, mean, part) > wait_s:
            low = middle + 1
        else:
            high = middle
    return high


class Crowd:
    """Who comes, of the command line's words."""

    def __init__(self, asked: argparse.Namespace, streams: float):
        self.asked = asked
        usual = _SIMULATED if streams <= 2000 else _SIMULATED / 2
        self.seconds = asked.hours * 3600 if asked.hours else usual

    def held(self) -> tuple[float, float]:
        """Mean seconds that a place is taken, and the variation of it, with the limit in force."""
        draw = random.Random(0)
        most = self.asked.limit or math.inf
        found = [min(length + self.asked.connect, most) for length, _ in zip(
            arrivals.lengths(self.asked.length, self.asked.sigma, draw), range(20_000),
            strict=False)]  # fmt: skip
        mean = sum(found) / len(found)
        return mean, sum((one - mean) ** 2 for one in found) / len(found) / mean**2

    def visits(self, streams: float, seed: int) -> list[Visit]:
        draw = random.Random(seed)
        length = arrivals.lengths(self.asked.length, self.asked.sigma, draw)
        patience = self.asked.patience or math.inf
        rate = streams / self.held()[0]
        made = arrivals.poisson(rate, self.seconds, length, draw, patience)
        if self.asked.rush:
            made += arrivals.rush(round(self.asked.rush * streams), self.seconds / 2, 300.0,
                                    length, draw, patience)  # fmt: skip
        return made


def world(asked: argparse.Namespace, streams: float) -> World:
    return World(
        tick_s=asked.tick / 1000, start_s=asked.start, connect_s=asked.connect,
        # a lobby of thousands takes longer to decide; seconds are little beside a visit
        interval_s=min(5.0, max(0.25, streams / 2000)),
        fails_s=asked.fails * 3600 if asked.fails else math.inf,
    )  # fmt: skip


def planned(asked: argparse.Namespace, streams: float) -> dict[str, Any]:
    """One row: the GPUs for so many streams at the same time, fixed and with autoscaling."""
    crowd, around = Crowd(asked, streams), world(asked, streams)
    mean, variation = crowd.held()
    visits = crowd.visits(streams, asked.seed)
    each = asked.per_gpu * capacity.slots(around.tick_s, asked.fps, 1 / asked.per_gpu)
    theory = math.ceil(slots_for(streams, mean, asked.wait) / each - 1e-9)
    plan = Plan(fps=asked.fps, limit_s=asked.limit or None, per_gpu=asked.per_gpu,
                spare=asked.spare, idle_s=asked.idle, most_waiting=asked.most_waiting)  # fmt: skip

    def run(low: int, high: int) -> Result:
        return simulation.simulate(
            visits, Plan(**{**vars(plan), "low": low, "high": high}), around, crowd.seconds,
            asked.seed, warm_up=min(crowd.seconds / 4, 2 * mean),
        )  # fmt: skip

    gpus = asked.gpus or theory
    fixed = run(gpus, gpus)
    for _ in range(0 if asked.gpus else _TRIES):
        if fixed.wait(0.95) <= asked.wait and not fixed.refused:
            break
        gpus += max(1, round(math.sqrt(streams) / 8))
        fixed = run(gpus, gpus)
    scaled = run(asked.low, gpus)
    return {
        "streams": streams, "gpus": gpus, "theory": theory, "fixed": fixed, "scaled": scaled,
        "theory_wait": mean_wait(round(gpus * each), streams, mean, variation),
        "ingress": streams * asked.fps * 2 * asked.frame / 1e3,
    }  # fmt: skip


HEAD = ("streams", "GPUs", "used", "wait p50 / p95", "refused, gave up", "peak queue",
        "autoscaled: GPU hours of fixed", "wait p50 / p95", "starts", "moves",
        "frames through one door")  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row in Markdown, under HEAD."""
    fixed, scaled = row["fixed"], row["scaled"]
    share = scaled.paid / fixed.paid if fixed.paid else 0.0
    return _cells((
        f"{row['streams']:g}", f"{row['gpus']}", f"{fixed.utilisation:.0%}",
        f"{fixed.wait(0.5):.1f} / {fixed.wait(0.95):.1f} s",
        f"{fixed.refused}, {fixed.gave_up}", f"{fixed.most_waiting}",
        f"{share:.0%}", f"{scaled.wait(0.5):.1f} / {scaled.wait(0.95):.1f} s",
        f"{scaled.starts}", f"{scaled.moves}", f"{row['ingress']:,.0f} MB/s",
    ))  # fmt: skip


def _cells(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def compared(found: arrivals.Trace, result: Result, slots: int) -> dict[str, float]:
    """A real house and its simulation: mean wait, its 95 % quantile, utilisation of the slots."""
    seconds = found.ended - found.began
    real = sum(found.waits) / len(found.waits)
    return {
        "visits": len(found.visits), "seconds": seconds,
        "real_wait": real, "wait": result.mean_wait,
        "real_p95": simulation.quantile(found.waits, 0.95), "p95": result.wait(0.95),
        "real_used": found.busy / (slots * seconds) if seconds else 0.0,
        "used": result.busy / (slots * seconds) if seconds else 0.0,
    }  # fmt: skip


def _number(low: float, high: float, kind: type = float):
    def read(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    read.__name__ = kind.__name__
    return read


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="run.py serve --plan",
        description="How many GPUs a house needs, simulated; nothing is started.",
    )
    add = made.add_argument
    whole = lambda low, high: _number(low, high, int)  # noqa: E731
    add("--streams", type=_number(0.1, 20_000), nargs="+", metavar="N", default=list(SIZES),
        help="visitors who want a stream at the same time, in the mean")  # fmt: skip
    add("--length", type=_number(1, 1e6), default=180.0, metavar="S",
        help="mean seconds that a visitor stays, if nobody ends it")  # fmt: skip
    add("--sigma", type=_number(0, 3), default=1.0,
        help="how different visits are: sigma of a lognormal; 0: all alike")  # fmt: skip
    add("--limit", type=_number(0, 1e6), default=300.0, metavar="S",
        help="seconds that a visitor may have; 0: no limit")  # fmt: skip
    add("--patience", type=_number(0, 1e6), default=0.0, metavar="S",
        help="mean seconds after which who waits leaves; 0: never")  # fmt: skip
    add("--rush", type=_number(0, 10), default=0.0, metavar="X",
        help="a show ends half-way: X times the streams come within minutes")  # fmt: skip
    add("--fps", type=_number(1, 120), default=25.0)
    add("--tick", type=_number(0.1, 10_000), default=20.0, metavar="MS",
        help="milliseconds of a tick, as measured")  # fmt: skip
    add("--per-gpu", type=whole(1, capacity.MOST), default=1, metavar="N")
    add("--gpus", type=whole(1, 100_000), metavar="N",
        help="so many; else as many as --wait needs")  # fmt: skip
    add("--wait", type=_number(0.1, 1e5), default=10.0, metavar="S",
        help="what 95 of 100 visitors may wait")  # fmt: skip
    add("--low", type=whole(0, 100_000), default=1, metavar="N",
        help="GPUs that autoscaling always keeps")  # fmt: skip
    add("--spare", type=whole(0, 1000), default=0, metavar="N")
    add("--idle", type=_number(0, 1e5), default=120.0, metavar="S")
    add("--start", type=_number(0, 1e5), default=30.0, metavar="S",
        help="seconds until a new replica is warm, its machine's start included")  # fmt: skip
    add("--connect", type=_number(0, 60), default=0.5, metavar="S")
    add("--fails", type=_number(0, 1e6), default=0.0, metavar="H",
        help="hours between two losses of one replica; 0: none")  # fmt: skip
    add("--most-waiting", type=whole(0, 1_000_000), default=1000, metavar="N")
    add("--frame", type=_number(0.1, 10_000), default=30.0, metavar="KB", help="of one frame")
    add(
        "--hours",
        type=_number(0.01, 168),
        help="simulated; 40 minutes, of thousands 20, if not given",
    )
    add("--seed", type=whole(0, 2**31), default=1)
    add("--replay", type=pathlib.Path, metavar="LOG",
        help="the log of a real house: its visitors again, with --gpus and --per-gpu")  # fmt: skip
    return made


def main(argv: list[str] | None = None) -> int:
    """Print a plan; returns the process's exit status."""
    asked = parser().parse_args(argv)
    if asked.replay is not None:
        try:
            if asked.replay.stat().st_size > _LOG:
                raise ValueError(f"it has more than {_LOG // 2**20} MiB")
            gpus = asked.gpus or 1
            with asked.replay.open(encoding="utf-8") as lines:
                found, result = simulation.replay(
                    lines, Plan(fps=asked.fps, low=gpus, high=gpus, per_gpu=asked.per_gpu,
                                most_waiting=10**6),
                    world(asked, 1),
                )  # fmt: skip
        except (OSError, ValueError) as reason:
            print(f"{asked.replay.name} cannot be replayed: {reason}", file=sys.stderr)
            return 2
        each = asked.per_gpu * capacity.slots(asked.tick / 1000, asked.fps, 1 / asked.per_gpu)
        print(json.dumps(compared(found, result, round(gpus * each)), indent=2))
        return 0
    mean, _ = Crowd(asked, 1).held()
    print(
        f"Visits of {mean:.0f} s in the mean, {asked.fps:g} frames/s of {asked.frame:g} kB, "
        f"ticks of {asked.tick:g} ms.\n"
    )
    print(_cells(HEAD))
    print(_cells(["---:"] * len(HEAD)))
    for streams in asked.streams:
        print(line(planned(asked, streams)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
