"""Found steps as small files, to be loaded again and shared."""

import contextlib
import datetime
import hashlib
import json
import os
import pathlib
import tempfile
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from ..trust.boundary import RESULT, SCHEDULE, contents, told
from ..trust.schema import BadData
from .pupil import Steps

_VERSION = 1
_OF_SKIPS = ("skips", "flops", "whole")


@dataclass(frozen=True)
class Result:
    """What was found, for what, and how good it is.

    Attributes:
        method: `learned` or `searched`.
        solver: the step rule it was made for.
        levels, shifts: see pupil.Steps.
        goal: what it was made for: `teacher` or `pictures`.
        errors: on held-out noise, its own and that of the best hand-made schedule; by goal:
            RMSE to the fine solution in parts of its size, feature Frechet distance to pictures.
        hand_made: name of the best hand-made schedule.
        model: fingerprint of the model.
        rounds: done, of those asked for.
        asked: the settings it was made with.
        curves: levels and error of a few hand-made schedules, by name.
        date: in UTC, ISO 8601.
        skips: for each model call, names of the bodies that are passed by; () for none.
        flops: share of the network's that runs.
        whole: `errors` of the steps before anything was left out; then the best made by hand of
            `errors` is a rule that leaves out as much.
    """

    method: str
    solver: str
    levels: tuple[float, ...]
    shifts: tuple[float, ...]
    goal: str
    errors: dict[str, tuple[float, float]]
    hand_made: str
    model: str
    rounds: tuple[int, int]
    asked: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Any] = field(default_factory=dict)
    date: str = ""
    skips: tuple[tuple[str, ...], ...] = ()
    flops: float = 1.0
    whole: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def steps(self) -> Steps:
        return Steps(self.levels, self.shifts, tuple(map(frozenset, self.skips)))

    @property
    def complete(self) -> bool:
        return self.rounds[0] >= self.rounds[1]


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def key(parts: dict[str, Any]) -> str:
    """Of everything that a result depends on."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save(result: Result, path: pathlib.Path) -> None:
    """Whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = asdict(result)
    if not result.skips:
        for name in _OF_SKIPS:  # so that packs from before there were any can read it
            del parts[name]
    text = json.dumps({"livediffusion": _VERSION, **parts}, indent=1)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(text)
        os.replace(name, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def load(path: pathlib.Path) -> Result:
    """
    Raises:
        OSError: there is no such file.
        ValueError: it holds no result.
    """
    try:
        data = told(contents(path, RESULT.bytes), path.name, RESULT, SCHEDULE)
        version = data.pop("livediffusion")
        result = Result(**data)
        sound = (
            version == _VERSION
            and result.goal in result.errors
            and all(a > b for a, b in pairwise(result.levels))
            and result.levels[-1] == 0
        )
        why = "" if sound else "its levels do not fall to 0, or it is of another version"
    except BadData as reason:
        why = str(reason).rstrip(".")
    if why:
        raise ValueError(
            f"{path.name} holds no schedule of Live Learned or Live Searched Steps ({why})."
        )
    return result
