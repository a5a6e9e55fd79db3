"""Records until it is killed or told to end: a script, run by tests/live/test_recordings.py.

It imports once and makes a child per recording, because importing takes seconds.
"""

import json
import os
import pathlib
import random
import signal
import sys
import time

import conftest  # noqa: F401  the pack and ComfyUI
import folder_paths
import numpy as np
from films import BEEPS_LAST, write_beeps
from livediffusion.live.feeds import Place
from livediffusion.live.sinks.names import Wish
from livediffusion.live.sinks.record import Recorder

NOTHING = Wish(True, "kill", {"1": {}}, {"workflow": {"id": "w"}})


def record(seed: int, folder: str) -> None:
    """Pictures at changing rates, and stretches without any; every second one with sound."""
    chance = random.Random(seed)
    size = chance.choice([(64, 64), (63, 95), (256, 192)])
    recorder, began = Recorder(NOTHING, lambda event: None), time.monotonic()
    film = pathlib.Path(folder) / "beeps.mp4" if seed % 2 else None
    while True:
        rate = chance.choice([3, 12, 30])
        for _ in range(chance.randint(1, rate)):
            place = film and Place(film, (time.monotonic() - began) % BEEPS_LAST)
            recorder.put(np.full((*size, 3), chance.randint(0, 255), np.uint8), place)
            time.sleep(1 / rate)
        time.sleep(chance.choice([0, 0, 1.5]))


def main() -> None:
    folder, ends = sys.argv[1], json.loads(sys.argv[2])
    # a shell starts what runs in the background with Ctrl+C ignored, and it is inherited
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.makedirs(folder)
    write_beeps(pathlib.Path(folder) / "beeps.mp4", "aac")
    children = []
    for number, (kind, after) in enumerate(ends):
        place = os.path.join(folder, str(number))
        os.makedirs(place)
        began = time.monotonic()
        child = os.fork()
        if not child:
            folder_paths.set_output_directory(place)
            return record(number, folder)
        children.append((child, began, getattr(signal, kind), after, place))
    told = []
    for child, began, kind, after, place in sorted(children, key=lambda one: one[1] + one[3]):
        time.sleep(max(0.0, began + after - time.monotonic()))
        os.kill(child, kind)
        told.append((place, time.monotonic() - began))
        os.waitpid(child, 0)
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
