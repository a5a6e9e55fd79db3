"""What the clients of run.py share: arguments, files, and one sentence for what cannot be done.

Run inside ComfyUI's environment, by packed.py, without ComfyUI itself. Not part of the pack.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import os
import pathlib
import shutil
import signal
import time
import uuid

from PIL import Image

from .packed import pack_module

SIZE = 256  # native size of the demo model
PATCH = 4  # pixels that are one position of it
# animated previews of ComfyUI's template packages with a clear subject that moves
FAVOURITES = ("ltxv_image_to_video-1", "video_wan_vace_inpainting-2", "video_ltx2_t2v-1")
PACKAGES = ("media_video", "media_image", "media_api", "media_other")
LEFT_BEHIND = 7 * 24 * 3600  # seconds after which a copy belongs to nobody: a run may last days


class Failed(Exception):
    """Ends a client with one plain sentence."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')}\n")


def within(kind: type, low: float, high: float, step: int = 1):
    """A type of argument: an int or float from low to high, a multiple of `step`."""

    what = f"a multiple of {step}" if step > 1 else "a whole number"

    def read(text: str):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and (kind is float or value % step == 0):
                return value
        said = "a number" if kind is float else what
        raise argparse.ArgumentTypeError(f"{text!r} is not {said} from {low} to {high}.")

    return read


def parser(name: str, description: str) -> Parser:
    """The arguments that every client has."""
    made = Parser(prog=f"run.py {name}", description=description)
    # only say what cannot be done
    made.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("--server", help=argparse.SUPPRESS)
    # the server's base directory, which is on this machine
    made.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    made.add_argument("--video", type=pathlib.Path, help="your clip (default: ComfyUI's own)")
    made.add_argument("--prompt", default="neon night", help="what it shall look like")
    made.add_argument(
        "--steps", type=within(int, 1, 100), default=2, help="denoising steps n (default 2)"
    )
    made.add_argument(
        "--strength", type=within(float, 0, 1), default=0.5, help="0..1, how far from the input"
    )
    made.add_argument(
        "--cfg", type=within(float, 0, 30), default=1.2, help="guidance scale (default 1.2)"
    )
    made.add_argument(
        "--delta", type=within(float, 0, 4), default=0.6, help="residual noise (default 0.6)"
    )
    made.add_argument(
        "--size", type=within(int, 64, 2048, PATCH), default=SIZE,
        help=f"side in pixels, a multiple of {PATCH} (default {SIZE})",
    )  # fmt: skip
    made.add_argument("--out", type=pathlib.Path, default=pathlib.Path("output"))
    return made


def bundled_clip() -> pathlib.Path:
    """An animated preview that ComfyUI's template packages install."""
    folders = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(f"comfyui_workflow_templates_{package}")
        if spec is not None:
            folders += [pathlib.Path(p) / "templates" for p in spec.submodule_search_locations]
    for name in FAVOURITES:
        for folder in folders:
            if (folder / f"{name}.webp").is_file():
                return folder / f"{name}.webp"
    for folder in folders:
        for path in sorted(folder.glob("*.webp")):
            with Image.open(path) as picture:
                if getattr(picture, "n_frames", 1) >= 24:
                    return path
    raise Failed("ComfyUI's template packages hold no animated preview; pass --video FILE.")


@contextlib.contextmanager
def told(option: str):
    """What the pack's reader refuses, in the words of an option."""
    try:
        yield
    except pack_module("live.media.still").Unreadable as reason:
        raise Failed(f"{option}: {reason.what}") from None


@contextlib.contextmanager
def lent(folder: pathlib.Path, ending: str, source: pathlib.Path | None = None):
    """A name in ComfyUI's input folder, gone at the end; yields its path.

    ComfyUI has no way to have an upload removed, and takes none above its limit.

    Args:
        folder: the server's base directory.
        ending: of the name.
        source: what shall be there.
    """
    inputs = folder / "input"
    inputs.mkdir(parents=True, exist_ok=True)
    for old in inputs.glob("livediffusion-*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > LEFT_BEHIND:
                old.unlink()
    path = inputs / f"livediffusion-{uuid.uuid4().hex[:12]}{ending}"
    try:
        if source is not None:
            shutil.copyfile(source, path)
        yield path
    finally:
        path.unlink(missing_ok=True)


def out_folder(path: pathlib.Path) -> pathlib.Path:
    """The folder for the results, made. Raises Failed."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise Failed(f"--out: {path} cannot be made: {reason.strerror}.") from None
    if not os.access(path, os.W_OK):
        raise Failed(f"--out: nothing may be written in {path}.")
    return path


def looked_at(args: argparse.Namespace) -> pathlib.Path:
    """The clip to take. Raises Failed where it, or the folder for the results, cannot be used."""
    path = args.video or bundled_clip()
    out_folder(args.out)
    with told("--video"):
        pack_module("live.media.reader").look_at(path)
    return path


class Stoppable:
    """Ctrl+C and the end that run.py asks for unwind once; a second one waits for the first.

    Outside of `run` it is a KeyboardInterrupt. Inside of it nothing is raised wherever the event
    loop happens to be, which leaves coroutines behind that nobody awaits: the task is cancelled.
    """

    def __init__(self):
        self._asked = False
        self._cancel = None  # how the task is told, while there is a loop

    def __enter__(self):
        signals = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._stop) for number in signals}
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number, frame):
        # not SIG_IGN: Python tells of one that is on its way already
        if self._asked:
            return
        self._asked = True
        if self._cancel is None:
            raise KeyboardInterrupt
        self._cancel()

    def run(self, client, *args):
        """What the coroutine function returns; KeyboardInterrupt where it was stopped."""

        async def cancelled():
            task, loop = asyncio.current_task(), asyncio.get_running_loop()
            self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
            if self._asked:
                task.cancel()
            return await client(*args)

        # before there is a loop, and when there is none any more, it is kept for later
        self._cancel = lambda: None
        try:
            result = asyncio.run(cancelled())
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            self._cancel = None
        if self._asked:
            raise KeyboardInterrupt
        return result


def complaint(answer: dict) -> str:
    lines = [answer.get("error", {}).get("message", "ComfyUI refused the graph")]
    for node in answer.get("node_errors", {}).values():
        lines += [f"{node['class_type']}: {e['message']} {e['details']}" for e in node["errors"]]
    return "; ".join(lines)
