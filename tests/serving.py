"""A real ComfyUI with the pack linked in, as a process of its own."""

import contextlib
import importlib
import importlib.util
import os
import pathlib
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
# the folder "static" of another comfyui-frontend-package than the installed one
FRONTEND = os.environ.get("LIVEDIFFUSION_FRONTEND")


def load_run():
    """run.py as a module."""
    spec = importlib.util.spec_from_file_location("livediffusion_run", ROOT / "run.py")
    module = importlib.util.module_from_spec(spec)
    # where a script's own folder is, for as long as it imports
    sys.path.insert(0, str(ROOT))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT))
    return module


def launch(name: str):
    """A module of launch/, as run.py sees it."""
    load_run()
    return sys.modules[f"launch.{name}"]


@contextlib.contextmanager
def serving(comfyui: pathlib.Path, base: pathlib.Path):
    """Start it with `base` as its base directory; yields port, process and log file."""
    console, server = launch("console"), launch("server")
    server.link_pack(base)
    (base / "input").mkdir(exist_ok=True)
    port, log = server.free_port(), base / "server.log"
    command = [
        sys.executable, str(comfyui / "main.py"), "--cpu", "--base-directory", str(base),
        "--port", str(port), "--disable-auto-launch", "--database-url", "sqlite:///:memory:",
        *(["--front-end-root", FRONTEND] if FRONTEND else []),
    ]  # fmt: skip
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=comfyui,
            # one thread: on a busy machine two mostly wait for each other
            env={**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
            # a shell starts what runs in the background with Ctrl+C ignored, and it is inherited
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        with console.ended(process):
            spinner = console.Spinner("starting ComfyUI")
            server.wait_for(f"http://127.0.0.1:{port}", process, log, spinner)
            yield port, process, log


def served(name: str):
    """A module of serve/, as Ray's processes import it: from the root of the repository."""
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module(f"serve.{name}")
    finally:
        sys.path.remove(str(ROOT))
