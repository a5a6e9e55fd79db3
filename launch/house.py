"""`run.py serve`: an environment for Ray, and the process of the house. Standard library only.

Ray has an environment of its own, apart from ComfyUI's: it is the optional dependency of this
command alone. The house ends with this process, whichever way it ends, and this process sees that
nothing of it is left.
"""

import contextlib
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from . import setup
from .console import Stop, apart, say, watched
from .server import ROOT, base, has_gpu, link_pack

RAY = ["ray[serve]==2.60.0"]
MARK = "LIVEDIFFUSION_HOUSE"  # serve/main.py has it, too
PREFIX = "lds"  # of its folder, there too
PATIENCE = 60.0  # seconds for an orderly end
_KILLED = 10.0  # for one by force


def environment() -> pathlib.Path:
    """The python of an environment with Ray; LIVEDIFFUSION_RAY names one that there is."""
    named = os.environ.get("LIVEDIFFUSION_RAY")
    if named:
        if not pathlib.Path(named).is_file():
            raise Stop(f"LIVEDIFFUSION_RAY is set to {named}, but there is no Python there.")
        return pathlib.Path(named)
    home = setup.CACHE / "ray" / setup.key(
        platform.python_version(), platform.machine(), sys.platform, *RAY
    )  # fmt: skip
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    with setup.setting_up():
        if not (home / ".complete").is_file():
            if home.exists():
                shutil.rmtree(home)
            say(f"- first serve: setting up {home}")
            setup.create(home)
            pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
            try:
                # what pip leaves when it is stopped is removed with the next try
                (temporary := home / "tmp").mkdir()
                watched([*pip, *RAY], "installing Ray Serve", home.parent / "pip.log",
                        env={**os.environ, "TMPDIR": str(temporary)})  # fmt: skip
                shutil.rmtree(temporary)
            except Stop as reason:
                shutil.rmtree(home, ignore_errors=True)
                raise Stop(
                    f"Ray Serve could not be installed ({str(reason).splitlines()[0]} "
                    f"{home.parent / 'pip.log'}): connect to the network and try again, or install "
                    f'it yourself with pip install "{RAY[0]}" and name that Python in '
                    "LIVEDIFFUSION_RAY."
                ) from None
            (home / ".complete").touch()
    return python


def serve(version: str, rest: list[str]) -> int:
    """The house, until it ends."""
    own = {**os.environ, "PYTHONPATH": str(ROOT)}
    for other, module in (("--plan", "serve.plan"), ("--operator", "serve.access")):
        if other in rest:
            more = [option for option in _absolute(rest) if option != other]
            command = [sys.executable, "-m", module, *more]
            return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, env=own).returncode
    command = ["-m", "serve.main"]
    asked = bool({"--help", "-h"} & set(rest))
    # what cannot be done is said before anything is set up
    checked = subprocess.run(
        [sys.executable, *command, "--check", *_absolute(rest)], cwd=ROOT,
        stdin=subprocess.DEVNULL, env=own,
    )  # fmt: skip
    if checked.returncode or asked:
        return checked.returncode
    comfyui = setup.find_comfyui(version)
    python = setup.environment(comfyui, test=False)
    ray = environment()
    found = ["--folder", str(comfyui), "--python", str(python)]
    if not {"--base"} & {one.partition("=")[0] for one in rest}:
        with setup.setting_up():
            link_pack(base())
        found += ["--base", str(base())]
    if "--cpu" not in rest and not has_gpu(python):
        found += ["--cpu"]
    sweep()
    mark = f"{PREFIX}{os.getpid()}"
    process = subprocess.Popen(
        [str(ray), *command, *_absolute(rest), *found], stdin=subprocess.PIPE, cwd=ROOT,
        env={**own, MARK: mark}, **apart(),
    )  # fmt: skip
    try:
        return process.wait()
    finally:
        _end(process, mark)


def _absolute(rest: list[str]) -> list[str]:
    """Paths as they are meant where the command was typed: the house runs in another folder."""
    made, names = [], {"--base", "--log"}
    for before, one in zip(["", *rest], rest, strict=False):
        name, equals, value = one.partition("=")
        if equals and name in names:
            one = f"{name}={pathlib.Path(value).resolve()}"
        elif before in names or (not one.startswith("-") and pathlib.Path(one).is_file()):
            one = str(pathlib.Path(one).resolve())
        made.append(one)
    return made


def _end(process: subprocess.Popen, mark: str) -> None:
    """In order, else by force; then whatever is left of it."""
    if process.poll() is None:
        say("- ending")
    until = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(timeout=max(0.1, until - time.monotonic()))
    with _undisturbed():
        if process.poll() is None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_KILLED)
        left(mark)
        sweep()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Impatience, such as a second Ctrl+C, does not leave half of a house running."""
    numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    before = {n: signal.signal(n, signal.SIG_IGN) for n in numbers if n is not None}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def left(mark: str) -> int:
    """End the processes that carry a house's mark in their environment; how many there were."""
    found, needle = set(), f"{MARK}={mark}".encode()
    until = time.monotonic() + 5
    while sys.platform == "linux" and time.monotonic() < until:
        alive = [pid for pid in _processes() if needle in _environ(pid)]
        for pid in alive:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if not alive:
            break
        found.update(alive)
        time.sleep(0.1)
    return len(found)


def _processes() -> list[int]:
    return [int(n) for n in os.listdir("/proc") if n.isdecimal() and int(n) != os.getpid()]


def _environ(pid: int) -> list[bytes]:
    try:
        return pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def sweep() -> None:
    """Remove the folders of houses whose process is gone: they were killed."""
    for place in {tempfile.gettempdir(), "/tmp"}:
        for folder in pathlib.Path(place).glob(f"{PREFIX}*-*"):
            pid = folder.name.removeprefix(PREFIX).partition("-")[0]
            if pid.isdecimal() and not _is_there(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)


def _is_there(pid: int) -> bool:
    if os.name == "nt":
        return True  # a signal of 0 would end it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
