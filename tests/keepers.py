"""A folder that a keeper takes for ComfyUI, and what is left of the processes it has started."""

import pathlib
import sys
import textwrap
import uuid

from serving import served

holder = served("comfyui.holder")
comfyui = served("comfyui.process")

MAIN = """
import argparse, http.server, json, os, subprocess, sys
import cuda_malloc
parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
parser.add_argument("--output-directory")
parser.add_argument("--temp-directory")
args, _ = parser.parse_known_args()
if os.environ.get("CRASH"):
    print("this is why it cannot be")
    sys.exit(3)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
open(os.path.join(args.output_directory, "picture"), "w").write("x")
heavy = sys.modules.get("heavy")
seen = {
    "pid": os.getpid(), "child": child.pid, "argv": sys.argv, "name": __name__, "path": sys.path[0],
    "folder": os.getcwd(), "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
    "telemetry": os.environ.get("HF_HUB_DISABLE_TELEMETRY"),
    "heavy": heavy and [heavy.PID, heavy.ALLOCATOR, heavy.TELEMETRY],
}

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        data = json.dumps({"system": {"ram_total": 8}, "devices": [{"name": "cpu", "type": "cpu",
                           "vram_total": 8, "vram_free": 4}], "seen": seen}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def log_message(self, *args):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", args.port), Answer).serve_forever()
"""
HEAVY = """
import os
PID = os.getpid()
ALLOCATOR = os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
TELEMETRY = os.environ.get("HF_HUB_DISABLE_TELEMETRY")
"""
OPTIONS = """
parsing = False
def enable_args_parsing(enable=True):
    global parsing
    parsing = enable
"""
MALLOC = """
import os, sys
from comfy import options
known = options.parsing or "cuda_malloc" in sys.modules
if "--cuda-malloc" in sys.argv and known:
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "backend:cudaMallocAsync"
"""
# what is asked as torch is when it counts devices
TORCH = """
class _C:
    @staticmethod
    def _cuda_getDeviceCount():
        return 1
class cuda:
    @staticmethod
    def _is_in_bad_fork():
        return False
    @staticmethod
    def is_available():
        return True
class backends:
    pass
"""


def folder(place: pathlib.Path) -> pathlib.Path:
    """ComfyUI's folder, as far as a keeper knows it."""
    for name, text in {
        "main.py": MAIN, "heavy.py": HEAVY, "comfy/options.py": OPTIONS, "cuda_malloc.py": MALLOC,
        "comfy/__init__.py": "", "torch.py": TORCH,
        "asking.py": "import torch\ntorch._C._cuda_getDeviceCount()\n",
    }.items():  # fmt: skip
        path = place / "comfyui" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
    (place / "base" / "custom_nodes").mkdir(parents=True, exist_ok=True)
    return place / "comfyui"


class Small(comfyui.ComfyUI):
    """Of that folder; `mark` tells its processes from others.

    Args:
        place: of everything.
        options, env: more of them.
    """

    imports = ("heavy",)
    linger_s = 1.0

    def __init__(self, place, options=("--cpu",), mark=None, **env):
        self.mark = mark or uuid.uuid4().hex
        super().__init__(
            folder(place), pathlib.Path(sys.executable), place / "base", options,
            {"KEEPERS_MARK": self.mark, **env}, place / "home",
        )  # fmt: skip

    async def seen(self):
        """What main.py has seen of its surroundings."""
        async with self._http.get(f"{self.url}/system_stats") as reply:
            return (await reply.json())["seen"]


def left(mark: str) -> list[int]:
    """The processes that were started with a mark and live."""
    found = []
    for one in pathlib.Path("/proc").iterdir():
        try:
            if one.name.isdigit() and mark.encode() in (one / "environ").read_bytes():
                found.append(int(one.name))
        except OSError:
            continue
    return found


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return "\nState:\tZ" not in pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
