"""`run.py live --unattended`: a workflow without a page, in a ComfyUI that is started again when it
dies. Standard library only.

The run itself is kept by the pack (live/keeper.py): it begins anew after a failure, and with a
ComfyUI that was started again. This process looks after ComfyUI, and ends when the run has ended.
"""

import argparse
import contextlib
import http.client
import io
import json
import os
import pathlib
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

from . import lan, setup
from .console import Stop, apart, say
from .server import ROOT, base, port, server

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
    made.add_argument("--port", type=port, default=8188, help="default 8188, else a free one")
    made.add_argument(
        "--lan", action="store_true", help="for the phones, encoders and pages of this network, "
        "too: https, with a certificate made for this computer",
    )  # fmt: skip
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
    here: lan.Lan | None = None
    run, wanted, deaths, pause = None, own.port, 0, _FIRST
    while True:
        began = time.monotonic()
        env = {**os.environ, STARTED: run or _NONE}
        how = {"env": env, **apart()}
        why = "ComfyUI ended by itself"
        try:
            with contextlib.ExitStack() as up:
                with _quiet(deaths):
                    here = _prepared(python, here) if own.lan else None
                    passed = (*options, *here.options) if here else options
                    trusted = here.authority if here else None
                    place = server(comfyui, python, wanted, passed, trusted, **how)
                    url, process, log = up.enter_context(place)
                comfy = _ComfyUI.at(url, trusted)
                # pages and players know where it is
                run, wanted = _run(comfy, run, path), int(url.rpartition(":")[2])
                with _quiet(deaths):
                    say(_told(path, url, here))
                try:
                    if _watched(comfy, process, run):
                        say("- the live run has ended: it was stopped, or its film is over")
                        return 0
                    if process.poll() is None:
                        why = f"ComfyUI has not answered for {_UNANSWERED:.0f} s"
                except KeyboardInterrupt:
                    _end(comfy, process, run)
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


class _ComfyUI(NamedTuple):
    """One that is asked. What asks raises OSError, of which HTTPError is one, or ValueError.

    Attributes:
        url: its address.
        context: that trusts its certificate, where it has one.
    """

    url: str
    context: ssl.SSLContext | None

    @classmethod
    def at(cls, url: str, trusted: pathlib.Path | None) -> "_ComfyUI":
        return cls(url, ssl.create_default_context(cafile=str(trusted)) if trusted else None)

    def asked(self, path: str, body: dict[str, Any] | None = None, seconds: float = 60.0) -> bytes:
        """The answer to a GET, or to a POST of `body`, after so many seconds at the most."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=seconds, context=self.context) as reply:
                return reply.read()
        except http.client.HTTPException as reason:  # it ended in the middle of its answer
            raise ConnectionError(str(reason)) from None

    def runs(self) -> set[str]:
        """What is kept there."""
        said = json.loads(self.asked("livediffusion/runs", seconds=_ANSWER))
        return {one["run"] for one in said["runs"]}


def _prepared(python: pathlib.Path, before: lan.Lan | None) -> lan.Lan:
    """The certificate for where this computer is now; where none can be made, the one before, so
    that a run does not wait for a network. Raises Stop where there was none.
    """
    try:
        return lan.prepared(python)
    except Stop:
        if before is None:
            raise
        return before


def _told(path: pathlib.Path, url: str, here: lan.Lan | None) -> str:
    """What the user reads."""
    how = f"  its heartbeat: {heartbeat()}\n"
    if here is None:
        return f"\n  {path.name} runs at {url}\n{how}  Ctrl+C here ends it.\n"
    how += (
        "  Open the saved workflow there: the page comes to this run. With source phone, the Live\n"
        "  Camera shows a code to scan.\n"
    )
    return f"\n  {path.name} runs at" + here.told(int(url.rpartition(":")[2]), "/", how)


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


def _run(comfy: _ComfyUI, run: str | None, path: pathlib.Path) -> str:
    """The name of the run: the one that ComfyUI has started again, else a new one. Raises Stop."""
    try:
        if run is not None and run in comfy.runs():
            return run
        made = json.loads(_workflow(path, info=comfy.asked("object_info")))
        body = {**made, "client_id": "", "unattended": True, "name": path.stem}
        return json.loads(comfy.asked("livediffusion/start", body))["run"]
    except urllib.error.HTTPError as reason:
        raise Stop(f"{path.name}: {_complaint(reason)}") from None
    except (OSError, ValueError) as reason:
        raise Stop(f"ComfyUI does not answer: {reason}") from None


def _complaint(reason: urllib.error.HTTPError) -> str:
    with contextlib.suppress(ValueError, LookupError):
        answer = json.load(reason)
        said = [answer["error"]["message"]]
        for node, told in answer.get("node_errors", {}).items():
            words = (": ".join(filter(None, (e["message"], e["details"]))) for e in told["errors"])
            said += [f"node {node} ({told['class_type']}): {'; '.join(words)}"]
        return "\n".join(dict.fromkeys(said))
    return str(reason)


def _watched(comfy: _ComfyUI, process: subprocess.Popen, run: str) -> bool:
    """Whether the run has ended; False where ComfyUI has, or answers no more."""
    # seconds so far; since when the run is gone, while the file still has it
    silent, gone = 0.0, None
    while process.poll() is None and silent < _UNANSWERED:
        began = time.monotonic()
        try:
            if run in comfy.runs():
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


def _end(comfy: _ComfyUI, process: subprocess.Popen, run: str) -> None:
    """In order: the run first, so that its recordings are whole."""
    say("- ending")
    with contextlib.suppress(OSError, ValueError):
        comfy.asked("livediffusion/end", {"run": run})
        time.sleep(_FINISH)
    if os.name != "nt":
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_LAST)
