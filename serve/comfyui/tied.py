"""ComfyUI in a process that ends when its standard input does, which is when its parent is gone.

Run by its path with ComfyUI's python, orders on the first line of its standard input.
"""

import json
import os
import pathlib
import runpy
import signal
import sys
import threading


def watch() -> None:
    while sys.stdin.buffer.read(1):
        pass
    if os.name == "posix" and os.getpgrp() == os.getpid():  # with what it has started
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def main() -> None:
    orders = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=watch, daemon=True).start()
    sys.argv = [str(pathlib.Path(orders["comfyui"]) / "main.py"), *orders["arguments"]]
    sys.path[0] = orders["comfyui"]  # this file's own folder was there
    os.chdir(orders["comfyui"])
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
