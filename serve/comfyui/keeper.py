"""The keeper: a process that has what ComfyUI imports, and forks ComfyUI from it.

Run by its path with ComfyUI's own python, orders on its standard input; nothing but the standard
library until it imports what ComfyUI will. A ComfyUI that dies is there again in the time that its
own modules and nodes take: torch and the like are imported once. The keeper outlives who holds it
by `linger_s`, so that the next replica of the same configuration adopts a ComfyUI that is up.

It never makes a CUDA context, which no fork survives: what it imports (keeping.py) was looked at,
and a fork tells before the first ComfyUI whether CUDA was touched all the same. Then, and where
there is no fork, ComfyUI is a process of its own that imports all of it.
"""

import contextlib
import ctypes
import gc
import hmac
import importlib
import json
import os
import pathlib
import runpy
import secrets
import selectors
import shutil
import signal
import socket
import sys
import time
import traceback
from typing import Any

import keeping  # beside this file, which is run by its path

# ComfyUI's main.py sets them before it imports anything of size, and these look at them then
SET_FIRST = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}

_LINE = 65536  # bytes of an order
_ASKING = 8  # connections that have not said who they are
_ASKED = 3.0  # seconds that they have for it
_LOOK = 1.0  # seconds between two looks at what has a bound
_LOG = 8 * 2**20  # bytes of the log, of which the second half is kept when it is full
_PROBE = 60.0  # seconds that a look in a fork may take
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


class Keeper:
    """Serves orders on a socket and keeps one ComfyUI running.

    Args:
        orders: `comfyui` (its folder), `arguments` (of its main.py, without port), `place` (a
            private folder, which is removed at the end), `linger_s`, `imports` (PRELOADED),
            `probe` (add --cpu where there is no GPU).
    """

    def __init__(self, orders: dict[str, Any]):
        self.comfyui = pathlib.Path(orders["comfyui"])
        self.arguments: list[str] = list(orders["arguments"])
        self.place = pathlib.Path(orders["place"])
        self.linger = float(orders["linger_s"])
        self.imports: list[str] = list(orders["imports"])
        self._probe_gpu = bool(orders["probe"])
        self._forks = True
        self._key = ""
        self._selector = selectors.DefaultSelector()
        self._asking: dict[socket.socket, float] = {}
        self._holder: socket.socket | None = None
        self._alone = time.monotonic()  # since when nobody holds it
        self._read: dict[socket.socket, bytes] = {}
        self._child: int | None = None
        self._port = 0
        self._again: float | None = None
        self._answers, self._mute = False, 0  # whether it has answered; how many have not
        self._over = False

    # -- before the first ComfyUI -----------------------------------------------------------

    def open(self) -> None:
        """The private folder, its lock, its key and the socket in it."""
        for name in ("output", "temp", "user"):
            (self.place / name).mkdir()
        import fcntl

        self._lock = os.open(self.place / "locking", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)  # free when this process is gone, however it ended
        os.rename(self.place / "locking", self.place / "lock")
        self._key = secrets.token_hex(32)
        handle = os.open(self.place / "key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(self._key)
        self._listener = socket.socket(socket.AF_UNIX)
        here = os.open(self.place, os.O_RDONLY)
        # a socket's name has at most 107 bytes, a folder's may have more
        self._listener.bind(f"/proc/self/fd/{here}/s")
        os.close(here)
        self._listener.listen(8 * _ASKING)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def prepare(self) -> None:
        """Import, as ComfyUI would: with its arguments' effect on torch's allocator."""
        sys.argv = [str(self.comfyui / "main.py"), *self.arguments]
        sys.path[0] = str(self.comfyui)  # this file's own folder was there
        os.chdir(self.comfyui)
        before = dict(os.environ)
        # torch looks at its allocator's settings when it is imported
        os.environ.update(SET_FIRST | _in_a_fork(_allocator))
        # so asked, torch.cuda.is_available looks without CUDA
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        began = time.monotonic()
        missing, asked = keeping.preload(self.imports)
        for what in (*missing, *asked):
            _say(f"while importing: {what}")
        os.environ.clear()
        os.environ.update(before)
        _say(f"imported in {time.monotonic() - began:.1f} s")
        found = _in_a_fork(_device)
        if asked or found.get("forks") is not True:
            _say("what was imported has touched the GPU: ComfyUI is not forked but started anew")
            self._forks = False
        if self._probe_gpu and not found.get("gpu"):
            self.arguments.append("--cpu")
        gc.collect()
        gc.freeze()  # pages that a fork shares stay shared

    # -- its course -------------------------------------------------------------------------

    def run(self) -> None:
        """Until it is told to end, or nobody has held it for `linger_s`."""
        wake, woken = socket.socketpair()
        for one in (wake, woken):
            one.setblocking(False)
        self._wakers = wake, woken
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.signal(signal.SIGTERM, self._end)
        signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
        self._selector.register(wake, selectors.EVENT_READ, self._reap)
        self._fork()
        looked, self._alone = 0.0, time.monotonic()  # the imports may have taken long
        while not self._over:
            now = time.monotonic()
            if self._again is not None and now >= self._again:
                self._fork()
            if self._holder is None and now - self._alone >= self.linger:
                break
            if now - looked >= _LOOK:
                looked = now
                self._look(now)
            wait = _LOOK if self._again is None else max(0.0, min(_LOOK, self._again - now))
            for event, _ in self._selector.select(wait):
                event.data(event.fileobj)

    def close(self) -> None:
        """End ComfyUI; nothing is left."""
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
        if self._child is not None:
            _kill_group(self._child)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._child, 0)
            _forget_shared(self._child)
        shutil.rmtree(self.place, ignore_errors=True)

    def _end(self, number: int, frame: Any) -> None:
        self._over = True

    def _look(self, now: float) -> None:
        for asking, until in list(self._asking.items()):
            if now >= until:
                self._drop(asking)
        with contextlib.suppress(OSError):
            _shorten(self.place / "log")

    # -- ComfyUI ----------------------------------------------------------------------------

    def _fork(self) -> None:
        self._again = None
        self._port = keeping.free_port()
        self._answers = False
        sys.stdout.flush()
        sys.stderr.flush()
        keeper = os.getpid()
        child = os.fork()
        if child == 0:
            self._become(keeper)
        with contextlib.suppress(OSError):  # the child does the same: whoever is first
            os.setpgid(child, child)
        self._child = child
        self._tell({"event": "forked", **self._state()})

    def _become(self, keeper: int) -> None:
        """This process, a fork, is ComfyUI from now on."""
        code = 1
        try:
            os.setpgid(0, 0)
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            _ends_with(keeper)
            self._selector.close()
            for one in (self._listener, *self._wakers, *self._asking, self._holder):
                if one is not None:
                    one.close()
            os.close(self._lock)
            arguments = [*self.arguments, "--port", str(self._port)]
            main = str(self.comfyui / "main.py")
            if not self._forks:
                os.execv(sys.executable, [sys.executable, main, *arguments])
            _new_randomness()
            gc.unfreeze()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = [main, *arguments]
            runpy.run_path(main, run_name="__main__")
            code = 0
        except SystemExit as asked:
            code = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _reap(self, wake: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while wake.recv(4096):
                pass
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._child:
                self._died(pid, status)

    def _died(self, pid: int, status: int) -> None:
        _kill_group(pid)  # what it has started ends with it
        _forget_shared(pid)
        self._child = None
        self._mute = 0 if self._answers else self._mute + 1
        wait = keeping.later(self._mute)
        self._again = time.monotonic() + wait
        said = os.waitstatus_to_exitcode(status)
        _say(f"ComfyUI {pid} ended with {said}; again in {wait} s")
        # what it wrote is of no use to the next one
        shutil.rmtree(self.place / "temp", ignore_errors=True)
        (self.place / "temp").mkdir(exist_ok=True)
        self._tell({"event": "died", "pid": pid, "status": said, "again_s": wait})

    def _state(self) -> dict[str, Any]:
        return {"pid": self._child, "port": self._port, "keeper": os.getpid()}

    # -- who holds it -----------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        try:
            asking, _ = listener.accept()
        except OSError:
            return
        asking.setblocking(False)
        if len(self._asking) >= _ASKING:
            asking.close()
            return
        self._asking[asking] = time.monotonic() + _ASKED
        self._read[asking] = b""
        self._selector.register(asking, selectors.EVENT_READ, self._hear)

    def _hear(self, one: socket.socket) -> None:
        try:
            data = one.recv(_LINE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        whole = self._read[one] + data
        if not data or len(whole) > _LINE:
            self._drop(one)
            return
        *lines, self._read[one] = whole.split(b"\n")
        for line in lines:
            if one not in self._read:  # dropped by the line before
                return
            try:
                order = json.loads(line)
                self._obey(one, order if isinstance(order, dict) else {})
            except (ValueError, RecursionError):
                self._drop(one)

    def _obey(self, one: socket.socket, order: dict[str, Any]) -> None:
        if one in self._asking:
            key = order.get("key")
            known = isinstance(key, str) and key.isascii() and hmac.compare_digest(key, self._key)
            if not known or self._holder is not None:
                _send(one, {"event": "busy" if known else "unknown"})
                self._drop(one)
                return
            del self._asking[one]
            self._holder = one
            (self.place / "held").touch()
            self._tell({"event": "held", **self._state()})
        elif order.get("do") == "end":
            self._over = True
        elif order.get("do") == "answers":
            self._answers = order.get("pid") == self._child
        elif order.get("do") == "again" and self._child is not None:
            _kill_group(self._child)

    def _tell(self, event: dict[str, Any]) -> None:
        if self._holder is not None and not _send(self._holder, event):
            self._drop(self._holder)

    def _drop(self, one: socket.socket) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(one)
        self._asking.pop(one, None)
        self._read.pop(one, None)
        if one is self._holder:
            self._holder, self._alone = None, time.monotonic()
        one.close()


# -- parts -----------------------------------------------------------------------------------


def _say(text: str) -> None:
    sys.stderr.write(f"keeper: {text}\n")
    sys.stderr.flush()


def _send(one: socket.socket, event: dict[str, Any]) -> bool:
    try:
        one.sendall(json.dumps(event).encode() + b"\n")
    except OSError:  # gone, or it reads nothing
        return False
    return True


def _in_a_fork(look) -> dict[str, Any]:
    """What a function returns in a process that ends with it; {} where it raised or took long."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(int(_PROBE))
            os.write(write, json.dumps(look()).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        said = file.read()
    os.waitpid(child, 0)
    return json.loads(said) if said else {}


def _allocator() -> dict[str, str]:
    """What ComfyUI sets for torch's allocator; from its arguments, as its main.py does."""
    before = dict(os.environ)
    import comfy.options

    comfy.options.enable_args_parsing()
    importlib.import_module("cuda_malloc")
    return {name: value for name, value in os.environ.items() if before.get(name) != value}


def _device() -> dict[str, bool]:
    """Whether a fork may use the GPU, and whether there is any."""
    if (torch := sys.modules.get("torch")) is None:
        return {"forks": True}
    forks = not torch.cuda._is_in_bad_fork()
    xpu, mps = getattr(torch, "xpu", None), getattr(torch.backends, "mps", None)
    others = any(one is not None and one.is_available() for one in (xpu, mps))
    return {"forks": forks, "gpu": torch.cuda.is_available() or others}


def _new_randomness() -> None:
    """Python reseeds itself after a fork; numpy's old generator does not."""
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _ends_with(parent: int) -> None:
    """This process is killed when its parent ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(leader, signal.SIGKILL)


def _forget_shared(pid: int) -> None:
    """LLVM's OpenMP leaves a note of a killed process in shared memory."""
    for note in pathlib.Path("/dev/shm").glob(f"__KMP_REGISTERED_LIB_{pid}_*"):
        with contextlib.suppress(OSError):
            note.unlink()


def _shorten(log: pathlib.Path) -> None:
    """Keep the second half of a log that has grown; it is open for appending elsewhere."""
    if log.stat().st_size <= _LOG:
        return
    with log.open("rb") as file:
        file.seek(-_LOG // 2, os.SEEK_END)
        rest = file.read()
    os.truncate(log, 0)
    with log.open("ab") as file:
        file.write(rest)


def _daemon(place: pathlib.Path) -> None:
    """Go on as a process of its own: nobody's child, with a log instead of a terminal."""
    if os.fork():
        os._exit(0)
    os.setsid()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what ComfyUI starts is waited for here
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number, handle in enumerate((nothing, log, log)):
        os.dup2(handle, number)


def main() -> None:
    orders = json.loads(sys.stdin.buffer.readline())
    keeper = Keeper(orders)
    keeper.open()
    _daemon(keeper.place)
    keeper.prepare()
    try:
        keeper.run()
    finally:
        keeper.close()


if __name__ == "__main__":
    main()
