"""How many replicas there should be: from streams, who waits, and the room that was measured.

`wanted` is the whole decision; the simulation (plan.py) calls it in virtual time and Serve's
controller through `Policy`: up at once, down after `idle_s`, to zero after `to_zero_s`.

Serve shows a policy what replicas recorded (`record_autoscaling_stats`), and nothing of other
deployments. How many wait is known to the lobby, so it says it to the replicas with each answer to
their reports, and each records it. Without a replica nobody records: then the lobby makes a request
at the replicas' handle (`wake`), which is what Serve starts the first one for.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# what a replica records; `waiting` and `asked` are the house's, so each has the same number
STREAMS, WAITING, SLOTS, ASKED = "streams", "waiting", "slots", "asked"
NOT_ASKED = -1.0
_FEWER = "fewer since"  # in the policy's state: when fewer would have been enough first


def wanted(
    streams: int, waiting: int, slots: float, replicas: int, spare: int, low: int, high: int
) -> int:
    """The number of replicas.

    Args:
        streams: that run now.
        waiting: visitors who wait for one.
        slots: streams that one replica keeps at the asked frame rate, above 0 and at most 1; below
            1 where replicas share a GPU whose measured time does not suffice for all of them.
        replicas: that there are now, warming ones too.
        spare: to be free for who comes next, while anybody is here.
        low, high: the fewest and the most.

    Returns:
        low..high. More than there are at once, as many as wait; fewer only as far as streams and
        spare ones leave room.
    """
    here = streams + waiting
    needed = math.ceil(here / min(max(slots, 1e-3), 1.0) - 1e-9) + (spare if here else 0)
    return min(max(needed, low), high)


class Room(NamedTuple):
    """What the replicas recorded, together; `asked` is an operator's number, or None."""

    streams: int
    waiting: int
    slots: float
    asked: int | None


def room(recorded: Iterable[Mapping[str, float]]) -> Room:
    """Of all replicas, from what each recorded last."""
    streams, waiting, slots, asked = 0.0, 0.0, [], NOT_ASKED
    for one in recorded:
        streams += one.get(STREAMS, 0.0)
        waiting = max(waiting, one.get(WAITING, 0.0))
        asked = max(asked, one.get(ASKED, NOT_ASKED))
        slots.append(one.get(SLOTS, 1.0))
    mean = sum(slots) / len(slots) if slots else 1.0
    return Room(round(streams), round(waiting), mean, None if asked < 0 else round(asked))


class Policy:
    """`wanted` as Serve's controller calls it, with `ray.serve.config.AutoscalingContext`.

    The latest value of each replica counts: a mean over a window, as Serve would aggregate it, is
    late by half of the window.

    Args:
        spare: of `wanted`.
        idle_s: seconds for which fewer have to be enough before there are fewer.
        to_zero_s: the same of the last one; None: idle_s.

    The delays are not Serve's own (`downscale_delay_s`): an operator's number holds at once.
    """

    def __init__(self, spare: int = 0, idle_s: float = 0.0, to_zero_s: float | None = None):
        self.spare, self.idle_s = spare, idle_s
        self.to_zero_s = idle_s if to_zero_s is None else to_zero_s

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        latest: dict[Any, dict[str, float]] = {}
        for name, series in (context.raw_metrics or {}).items():
            for replica, points in series.items():
                if points:
                    latest.setdefault(replica, {})[name] = points[-1].value
        running = set(context.running_replicas)
        found = room(one for replica, one in latest.items() if replica in running)
        low, high = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        state = dict(context.policy_state)
        since = state.pop(_FEWER, None)
        if found.asked is not None:
            number = min(max(found.asked, low), high)
        elif not latest and context.target_num_replicas:
            # warming, or the controller is new: what is known is who calls for a first one
            number = min(max(context.target_num_replicas, round(context.total_num_requests)), high)
        else:
            now = context.target_num_replicas
            number = wanted(
                found.streams, found.waiting, found.slots, now, self.spare, low, high
            )  # fmt: skip
            if number < now:
                since = context.current_time if since is None else since
                if context.current_time - since < (self.idle_s if now > 1 else self.to_zero_s):
                    number, state[_FEWER] = now, since
        return number, state
