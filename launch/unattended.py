"""`run.py live --unattended`: a workflow without a page, in a ComfyUI that is started again when it
dies. Standard library only.

The run itself is kept by the pack (live/keeper.py): it begins anew after a failure, and with a
ComfyUI that was started again. This process looks after ComfyUI, and ends when the run has ended.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from . import setup
from .console import Stop, apart, say
from .server import ROOT, base, server

STARTED = "LIVEDIFFUSION_UNATTENDED"  # live/kept.py has it, too; the one run that is to go on
_NONE = "none"  # in it: nothing is to begin by itself, whatever the setting says and a cut has left
_FIRST, _MOST = 1.0, 60.0  # seconds before ComfyUI is started again
_WELL = 600.0  # seconds up after which the next pause is the first again
_LOOK = 1.0  # seconds between two looks whether the run goes on
_UNANSWERED = 300.0  # seconds without an answer after which ComfyUI is taken to hang
_ANSWER = 10.0  # seconds that a look waits for an answer
_LAST = 10.0  # seconds for ComfyUI to end in order
_WRITTEN = 10.0  # seconds that the file of kept runs has to say that a run is over, too
_FINISH = 3.0  # seconds for recordings to be whole and for who asked to be answered


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="run.py live", description="Run a workflow without a page until it is stopped: here "
        "with Ctrl+C, or in any page of this ComfyUI.",
    )  # fmt: skip
    made.add_argument(
        "--unattended", type=pathlib.Path, nargs="?", metavar="WORKFLOW.json",
        help="saved by ComfyUI's page, or its export in API format",
    )  # fmt: skip
    made.add_argument("--port", type=int, default=8188, help="default 8188, else a free one")
    return made


def live(version: str, rest: list[str], options: tuple[str, ...]) -> int:
    """Until the run has ended.

    Args:
        version: of ComfyUI.
        rest: the command line.
        options: that ComfyUI gets.

    Raises:
        Stop: the workflow cannot be run, or ComfyUI does not start at all.
    """
    own = parser().parse_args(rest)
    if own.unattended is None:
        raise Stop("--unattended: name the workflow's file.")
    path = own.unattended.resolve()
    _workflow(path, "--check")
    comfyui = setup.find_comfyui(version)
    python = setup.environment(comfyui, test=False)
    run, port, deaths, pause = None, own.port, 0, _FIRST
    while True:
        began = time.monotonic()
        env = {**os.environ, STARTED: run or _NONE}
        how = {"env": env, **apart()}
        why = "ComfyUI ended by itself"
        try:
            with contextlib.ExitStack() as up:
                with _quiet(deaths):
                    place = server(comfyui, python, port, options, **how)
                    url, process, log = up.enter_context(place)
                # pages and players know where it is
                run, port = _run(url, run, path), int(url.rpartition(":")[2])
                with _quiet(deaths):
                    say(f"\n  {path.name} runs at {url}\n  its heartbeat: {heartbeat()}\n"
                        "  Ctrl+C here ends it.\n")  # fmt: skip
                try:
                    if _watched(url, process, run):
                        say("- the live run has ended: it was stopped, or its film is over")
                        return 0
                    if process.poll() is None:
                        why = f"ComfyUI has not answered for {_UNANSWERED:.0f} s"
                except KeyboardInterrupt:
                    _end(url, process, run)
                    raise
        except Stop as reason:
            if run is None:
                raise
            why = str(reason).splitlines()[0]
        else:
            # the log of the one that died is not written over by the next
            with contextlib.suppress(OSError):
                log.replace(log.with_name("server-died.log"))
        deaths += 1
        pause = _FIRST if time.monotonic() - began > _WELL else pause
        with _quiet(deaths):
            say(f"- {why} ({deaths} times now); it is started again in {pause:.0f} s")
        time.sleep(pause)
        pause = min(2 * pause, _MOST)


def heartbeat() -> pathlib.Path:
    """The file that tells how old the last frame is."""
    return base() / "user" / "livediffusion" / "heartbeat.json"


def _listed(run: str) -> bool:
    """Whether the file of kept runs has this one, so that a ComfyUI that starts goes on with it."""
    try:
        text = heartbeat().with_name("runs.json").read_text(encoding="utf-8")
        return run in {one["run"] for one in json.loads(text)["runs"]}
    except (OSError, ValueError, LookupError, TypeError):
        return False


@contextlib.contextmanager
def _quiet(deaths: int) -> Iterator[None]:
    """What is said for the fourth time is left out, but for the tenth, the hundredth and so on."""
    loud = deaths <= 3 or deaths == 10 ** (len(str(deaths)) - 1)
    with contextlib.nullcontext() if loud else contextlib.redirect_stdout(io.StringIO()):
        yield


def _workflow(path: pathlib.Path, *how: str, info: bytes = b"") -> bytes:
    """What serve/workflow says of a file. Raises Stop."""
    done = subprocess.run(
        [sys.executable, "-m", "serve.workflow", str(path), *how], cwd=ROOT, input=info,
        capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
    )  # fmt: skip
    if done.returncode:
        raise Stop(done.stderr.decode(errors="replace").strip().splitlines()[-1])
    return done.stdout


def _run(url: str, run: str | None, path: pathlib.Path) -> str:
    """The name of the run: the one that ComfyUI has started again, else a new one. Raises Stop."""
    try:
        if run is not None and run in _runs(url):
            return run
        with urllib.request.urlopen(f"{url}/object_info", timeout=60) as reply:
            made = json.loads(_workflow(path, info=reply.read()))
        body = {**made, "client_id": "", "unattended": True, "name": path.stem}
        return _asked(url, "start", body)["run"]
    except urllib.error.HTTPError as reason:
        raise Stop(f"{path.name}: {_complaint(reason)}") from None
    except (OSError, ValueError) as reason:
        raise Stop(f"ComfyUI does not answer: {reason}") from None


def _asked(url: str, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Raises OSError, of which HTTPError is one, or ValueError."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/livediffusion/{route}", data, headers)
    with urllib.request.urlopen(request, timeout=60 if data else _ANSWER) as reply:
        return json.load(reply)


def _runs(url: str) -> set[str]:
    return {one["run"] for one in _asked(url, "runs")["runs"]}


def _complaint(reason: urllib.error.HTTPError) -> str:
    with contextlib.suppress(ValueError, LookupError):
        answer = json.load(reason)
        said = [answer["error"]["message"]]
        for node, told in answer.get("node_errors", {}).items():
            words = (": ".join(filter(None, (e["message"], e["details"]))) for e in told["errors"])
            said += [f"node {node} ({told['class_type']}): {'; '.join(words)}"]
        return "\n".join(dict.fromkeys(said))
    return str(reason)


def _watched(url: str, process: subprocess.Popen, run: str) -> bool:
    """Whether the run has ended; False where ComfyUI has, or answers no more."""
    # seconds so far; since when the run is gone, while the file still has it
    silent, gone = 0.0, None
    while process.poll() is None and silent < _UNANSWERED:
        began = time.monotonic()
        try:
            if run in _runs(url):
                gone = None
            # read only now: a file that is being read cannot be replaced on Windows
            elif not _listed(run):
                time.sleep(_FINISH)
                return True
            elif time.monotonic() - (gone := gone or time.monotonic()) > _WRITTEN:
                say(f"- {heartbeat().with_name('runs.json')} still has the run: it may be there "
                    "again after ComfyUI's restart")  # fmt: skip
                return True
            silent = 0.0
        except (OSError, ValueError, LookupError):
            # one that hangs lets each look wait; what is longer is a machine that slept
            silent += min(time.monotonic() - began, _ANSWER) + _LOOK
        time.sleep(_LOOK)
    return False


def _end(url: str, process: subprocess.Popen, run: str) -> None:
    """In order: the run first, so that its recordings are whole."""
    say("- ending")
    with contextlib.suppress(OSError, ValueError):
        _asked(url, "end", {"run": run})
        time.sleep(_FINISH)
    if os.name != "nt":
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_LAST)
