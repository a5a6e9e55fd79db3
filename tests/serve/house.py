"""A house as `run.py serve` starts it: a process, its addresses, what belongs to it, its end."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

from serving import launch

ROOT = pathlib.Path(__file__).resolve().parents[2]
MARK = "LIVEDIFFUSION_HOUSE"
PREFIX = "lds"  # of a house's folder
UP_S = 240.0  # seconds in which a house has to be up, on a busy machine
# a plain graph: what the camera shows, and a setting of it that can be seen
GRAPH = {
    "1": {"class_type": "LiveCamera", "inputs": {
        "source": "browser", "file": "", "width": 64, "height": 64, "fit": "stretch", "fps": 30,
        "mirror": False, "loop": True}},
    "2": {"class_type": "LiveView", "inputs": {
        "image": ["1", 0], "quality": 85, "record": False, "filename_prefix": "live/recording"}},
}  # fmt: skip
SETTING = "1.mirror"  # an input of GRAPH


class House:
    """A house of a workflow, from its start to its end.

    Args:
        folder: for its workflow and its log.
        options: more of run.py serve's.
        graph: of the workflow, in API format.
        inputs: that visitors may change.
    """

    def __init__(self, folder, *options, graph=None, inputs=(SETTING,)):
        workflow = pathlib.Path(folder) / "workflow.json"
        workflow.write_text(json.dumps(graph or GRAPH), encoding="utf-8")
        self.log = pathlib.Path(folder) / "house.jsonl"
        self.said: list[str] = []
        named = [part for name in inputs for part in ("--input", name)]
        command = [sys.executable, str(ROOT / "run.py"), "serve", str(workflow), "--cpu",
                   "--port", "0", "--log", str(self.log), *named, *options]  # fmt: skip
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True,
            # a shell starts what runs in the background with Ctrl+C ignored, and it is inherited
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        self.mark = f"{PREFIX}{self.process.pid}"
        self._marks = {self.mark}
        self._heard = threading.Event()
        self.url = self.operator = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.said.append(line.rstrip())
            found = re.search(r"(http://\S+)/operator\?ticket=(\S+)", line)
            if found:
                self.url, self.operator = found.groups()
                self.url = self.url.replace("localhost", "127.0.0.1")
                self._heard.set()
        self._heard.set()

    def wait(self, replicas: int = 1) -> None:
        """Until so many replicas are ready. Raises RuntimeError with what the house said."""
        until = time.monotonic() + UP_S
        while not self._heard.wait(0.5) and time.monotonic() < until:
            pass
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(OSError, ValueError, KeyError):
                if len(self.ready()) >= replicas:
                    return
            time.sleep(0.2)
        raise RuntimeError("the house is not up:\n" + "\n".join(self.said[-30:]))

    # what its operator may

    def state(self) -> dict:
        """What the lobby knows."""
        request = urllib.request.Request(f"{self.url}/operator/state?ticket={self.operator}")
        with urllib.request.urlopen(request, timeout=5) as reply:
            return json.load(reply)

    def ready(self) -> list[str]:
        """The replicas that take streams."""
        said = self.state()["replica"]
        return [name for name, one in said.items() if one["ready"] and not one["draining"]]

    def order(self, **order) -> None:
        """`replicas=3`, `drain="x3f9"` or `end=visitor`; said again until the lobby is there."""
        data = json.dumps(order).encode()
        address = f"{self.url}/operator/order?ticket={self.operator}"
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
        for left in range(20, -1, -1):
            try:
                with urllib.request.urlopen(request, timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                if not left:
                    raise
                time.sleep(0.5)

    # what belongs to it

    def processes(self) -> dict[int, str]:
        """Number and command line of all that carries the house's mark, run.py itself left out."""
        found = marked(self.mark, self.process.pid)
        # its folder has the number of the process that made it
        self._marks |= {f"{PREFIX}{p}" for p, command in found.items() if "serve.main" in command}
        return found

    def named(self, what: str) -> list[int]:
        """Numbers of the processes whose command line has this in it, or that are ComfyUIs."""
        found = self.processes()
        if what != "comfyui":
            return [pid for pid, command in found.items() if what in command]
        keepers = {pid for pid, command in found.items() if "keeper" in command}
        return [pid for pid in found if parent(pid) in keepers]

    def left(self, seconds: float = 10.0) -> dict[str, object]:
        """What is still there of it after its end: processes, folders, shared memory."""
        until = time.monotonic() + seconds
        while (there := self._there()) and time.monotonic() < until:
            time.sleep(0.2)
        return there

    def _there(self) -> dict[str, object]:
        folders = {tempfile.gettempdir(), "/tmp", "/dev/shm"}
        found = {
            "processes": self.processes(),
            "folders": [str(p) for f in folders for p in pathlib.Path(f).glob(f"{PREFIX}*")
                        if p.name.partition("-")[0] in self._marks],
            "ports": [port for port in self.ports if listens(port)],
        }
        return {name: value for name, value in found.items() if value}

    @property
    def ports(self) -> set[int]:
        """Its own address's."""
        return {int(self.url.rpartition(":")[2])} if self.url else set()

    def end(self) -> int:
        """In order, as Ctrl+C does; by force later than run.py's own last resort."""
        self.processes()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(timeout=2 * launch("house").PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            for pid in self.processes():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            raise

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.end()


def marked(mark: str, but: int = 0) -> dict[int, str]:
    """Processes with a house's mark in their environment: number and command line."""
    found, needle = {}, f"{MARK}={mark}".encode()
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if needle in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(folder.name)] = command.decode(errors="replace").strip()
    found.pop(but, None)
    return found


def parent(pid: int) -> int:
    """A process's parent, 0 where it is gone."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        text = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        return int(text.rpartition(")")[2].split()[1])
    return 0


def listens(port: int) -> bool:
    """Whether anything takes connections there."""
    import socket

    with socket.socket() as s:
        s.settimeout(0.5)
        return s.connect_ex(("127.0.0.1", port)) == 0
