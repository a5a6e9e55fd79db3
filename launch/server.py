"""A running ComfyUI with the pack in it, and a port for it. Standard library only."""

import argparse
import contextlib
import os
import pathlib
import re
import socket
import ssl
import subprocess
import time
import urllib.request

from . import setup
from .console import Spinner, Stop, ended, say

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACK = "ComfyUI-LiveDiffusion"
# by maker: what lists its GPUs, and what a line of one is
TOOLS = {
    "NVIDIA": (["nvidia-smi", "-L"], r"^GPU \d+:"),
    "AMD": (["rocminfo"], r"Device Type:\s+GPU"),
}
# empty or -1, they hide GPUs from PyTorch
HIDING = ["CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"]


def has_gpu(python: pathlib.Path) -> bool:
    """Whether this environment's PyTorch can use a GPU; where it cannot and one is there, it is
    said what to do.
    """
    probe = (
        "import sys, torch; m = getattr(torch.backends, 'mps', None);"
        "x = getattr(torch, 'xpu', None); print(torch.__version__);"
        "sys.exit(not (torch.cuda.is_available() or (m and m.is_available())"
        " or (x and x.is_available())))"
    )
    done = subprocess.run(
        [str(python), "-c", probe], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    if done.returncode == 0:
        return True
    if maker := gpu_of_the_system():
        version = done.stdout.decode(errors="replace").strip()
        say(
            f"- this computer has an {maker} GPU, but PyTorch {version} as it is installed cannot "
            "use it: the CPU is\n  used. Set PIP_EXTRA_INDEX_URL, for good, to the index that "
            "pytorch.org/get-started names for\n  this GPU and its driver, and start again: that "
            "sets up an environment with that PyTorch."
        )
    return False


def gpu_of_the_system() -> str | None:
    """Who made the GPU that the tools of its driver list; None where there is none, or where it is
    hidden on purpose.
    """
    if any(os.environ.get(name) in ("", "-1") for name in HIDING):
        return None
    for maker, (command, listed) in TOOLS.items():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                stdin=subprocess.DEVNULL, timeout=20,
            )  # fmt: skip
            if re.search(listed, done.stdout.decode(errors="replace"), re.MULTILINE):
                return maker
    return None


def link_pack(base: pathlib.Path) -> None:
    """The pack in the base folder's custom_nodes: a link, or a junction on Windows."""
    link = base / "custom_nodes" / PACK
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.exists() and link.resolve() == ROOT:
        return
    if link.is_symlink():
        link.unlink()
    if os.name == "nt":
        import _winapi

        if link.exists():
            os.rmdir(link)
        _winapi.CreateJunction(str(ROOT), str(link))
    else:
        link.symlink_to(ROOT, target_is_directory=True)


def port(text: str) -> int:
    """A port's number, for argparse."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port: 1 to 65535, or 0 for a free one")
    return int(text)


def free_port(wanted: int = 0) -> int:
    """This port, or any other one when it is taken."""
    with socket.socket() as s:
        # one that a server has left a moment ago is free; on Windows it means another thing
        if os.name != "nt":
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", wanted))
        except OSError:
            s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def base() -> pathlib.Path:
    """The folder that is ComfyUI's base directory for this clone."""
    return setup.CACHE / "server" / setup.key(str(ROOT))


def fresh_log(port: int) -> pathlib.Path:
    """Where a server writes to: none that runs beside it. Of those before, eight are kept."""
    for old in sorted(base().glob("server-*.log"), key=os.path.getmtime)[:-8]:
        with contextlib.suppress(OSError):
            old.unlink()
    return base() / f"server-{port}.log"


@contextlib.contextmanager
def server(
    comfyui: pathlib.Path, python: pathlib.Path, wanted: int = 0, options: tuple[str, ...] = (),
    trusted: pathlib.Path | None = None, **how,
):  # fmt: skip
    """A running ComfyUI with the pack; yields its URL, its process and its log.

    Args:
        wanted: its port, if that is free.
        options: more of ComfyUI's own; of one that is there twice the last counts.
        trusted: the authority behind its certificate, where it has one.
        how: more for subprocess.Popen.
    """
    with setup.setting_up():
        link_pack(base())
    port = free_port(wanted)
    log = fresh_log(port)
    gpu = has_gpu(python)
    command = [
        str(python), str(comfyui / "main.py"), "--base-directory", str(base()), "--port", str(port),
        "--listen", "127.0.0.1", "--disable-auto-launch", "--database-url", "sqlite:///:memory:",
        *([] if gpu else ["--cpu"]), *options,
    ]  # fmt: skip
    url = f"{'https' if trusted else 'http'}://127.0.0.1:{port}"
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=comfyui,
            **how,
        )  # fmt: skip
        with ended(process):
            with Spinner(f"starting ComfyUI on the {'GPU' if gpu else 'CPU'}") as spinner:
                wait_for(url, process, log, spinner, trusted)
            yield url, process, log


def wait_for(
    url: str, process: subprocess.Popen, log: pathlib.Path, spinner: Spinner,
    trusted: pathlib.Path | None = None,
) -> None:  # fmt: skip
    context = ssl.create_default_context(cafile=str(trusted)) if trusted else None
    place, deadline = f"{url}/system_stats", time.monotonic() + 300
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError):
            urllib.request.urlopen(place, timeout=5, context=context).close()
            return
        spinner.update("waiting for the server")
        time.sleep(0.2)
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
    raise Stop(f"ComfyUI did not start. The end of {log}:\n{tail}")
