#!/usr/bin/env python3
"""One command from a fresh clone to a running pack.

    python run.py                                           the live demo in a real ComfyUI
    python run.py live --headless [--video FILE] ...        the same on a file, without a browser
    python run.py clip [--video FILE] [--prompt TEXT] ...   stylise a clip
    python run.py engines [--install NAME ...]              which engines work here, and how fast
    python run.py train [--minutes N] [--out FOLDER] ...    train the embedded model anew
    python run.py evaluate [--weights FOLDER] ...           judge it on pictures it never saw
    python run.py test [pytest options]                     lint, then the whole test suite

Everything is set up on the first run: a virtual environment in the user's cache folder, ComfyUI,
the pack linked into its custom_nodes. Standard library only.
"""

import argparse
import contextlib
import hashlib
import os
import pathlib
import platform
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import venv
import webbrowser

ROOT = pathlib.Path(__file__).resolve().parent
CACHE = pathlib.Path.home() / ".cache" / "livediffusion"
PRIMARY, ALSO = "0.33.0", ("0.25.0", "0.8.0")
REPOSITORY = "https://github.com/comfyanonymous/ComfyUI"
PACK = "ComfyUI-LiveDiffusion"
DEMO = f"/?template=live_webcam&source={PACK}"
PORT = 8188  # ComfyUI's own; a browser remembers for an address that its page may use the camera

# one release of the three that belongs together: the newest of each may not; and ComfyUI 0.8.0
# uses requests without naming it
ALWAYS = ["torch==2.14.1", "torchvision==0.29.1", "torchaudio==2.11.0", "requests"]
# glfw is for ComfyUI 0.25.0, which the tests start in this environment too
TEST = [
    "pytest>=8", "pytest-xdist>=3", "hypothesis>=6.100", "ruff>=0.6", "playwright>=1.45", "onnx",
    "onnxruntime", "glfw",
]  # fmt: skip
# the baseline some tests compare with; it pins an old diffusers, so its needs are named here
TEST_NO_DEPS = ["streamdiffusion==0.1.1", "diffusers", "importlib_metadata", "zipp"]
# what `engines` can install, by the name of the engine it is for
EXTRAS = {
    "onnxruntime": ["onnx", "onnxruntime"],
    "onnxruntime-gpu": ["onnx", "onnxruntime-gpu"],
    "tensorrt": ["onnx", "tensorrt"],
}
# NVIDIA's bindings without the libraries, which the tests compare with what is used of them
BINDINGS = {
    "10.0.1": "tensorrt_cu12_bindings",
    "10.13.3.9": "tensorrt_cu13_bindings",
    "10.16.1.11": "tensorrt_cu13_bindings",
    "11.4.0.106": "tensorrt_cu13_bindings",
}


class Stop(Exception):
    """Ends the command with one plain sentence."""


def say(text: str) -> None:
    print(text, flush=True)


def find_comfyui(version: str) -> pathlib.Path:
    """ComfyUI's folder: COMFYUI_PATH, else the cache, else a clone of the release tag."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        path = pathlib.Path(named)
        if not (path / "main.py").is_file():
            raise Stop(f"COMFYUI_PATH is set to {named}, but there is no ComfyUI (main.py) there.")
        return path
    path = CACHE / "comfyui" / version
    with setting_up():
        if not path.is_dir():
            clone(version, path)
    if not (path / "main.py").is_file():
        raise Stop(f"There is no ComfyUI (main.py) in {path}: remove that folder and try again.")
    return path


def clone(version: str, path: pathlib.Path) -> None:
    """A release of ComfyUI from GitHub."""
    command = ["git", "clone", "--quiet", "--depth", "1", "--branch", f"v{version}", REPOSITORY]
    try:
        with Spinner(f"cloning ComfyUI {version} from GitHub"), whole(path) as part:
            subprocess.run(
                [*command, str(part)],
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                stdin=subprocess.DEVNULL,
                timeout=900,
                env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
            )
    except (OSError, subprocess.SubprocessError):
        raise Stop(
            f"ComfyUI {version} is not here and could not be cloned from GitHub: set COMFYUI_PATH "
            "to a ComfyUI folder, or connect to the network (git is needed) and try again."
        ) from None


@contextlib.contextmanager
def setting_up():
    """One process at a time changes what is in the cache; the others wait until it is done.

    The lock is the operating system's, which ends with its holder. Not to be nested.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / ".lock").open("a") as file:
        if not locked(file):
            with Spinner("another run.py is setting something up: waiting for it") as spinner:
                while not locked(file):
                    spinner.update("waiting")
                    time.sleep(0.2)
        yield


def locked(file) -> bool:
    """Whether this process has the lock on an open file now; so too where there are no locks."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def whole(place: pathlib.Path):
    """A folder's name to fill, which becomes `place` at the end: all of it is there, or nothing.

    Where another process was faster, its folder stays: a file system may have no locks.
    """
    part = place.with_name(f"{place.name}.part{os.getpid()}")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        if part.is_dir():
            try:
                part.rename(place)
            except OSError:
                if not place.is_dir():
                    raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


class Spinner:
    """A line that says what takes long, and for how long already."""

    def __init__(self, what: str):
        self.what = what
        self.began = time.monotonic()
        self.live = sys.stdout.isatty()
        self._shown = 0.0

    def __enter__(self):
        say(f"- {self.what} ...")
        return self

    def update(self, detail: str) -> None:
        now = time.monotonic()
        if now - self._shown < (0.2 if self.live else 15):
            return
        self._shown = now
        line = f"  {now - self.began:4.0f} s  {detail}"[:100]
        print(f"\r{line:<100}" if self.live else line, end="" if self.live else "\n", flush=True)

    def __exit__(self, kind, error, trace):
        if self.live:
            print("\r" + " " * 100 + "\r", end="")
        if kind is None:
            say(f"  done in {time.monotonic() - self.began:.1f} s")


def watched(command: list[str], what: str, log: pathlib.Path, **kwargs) -> None:
    """Run a long command, its last line shown, its whole output in `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with Spinner(what) as spinner, log.open("w", encoding="utf-8", errors="replace") as out:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            text=True, encoding="utf-8", errors="replace", **kwargs,
        )  # fmt: skip
        with ended(process):
            for line in process.stdout:
                out.write(line)
                if line.strip():
                    spinner.update(line.strip())
            if process.wait() != 0:
                out.flush()
                tail = "".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-15:])
                raise Stop(f"{what} failed. The end of {log}:\n{tail}")


def environment(comfyui: pathlib.Path, test: bool) -> pathlib.Path:
    """The python of a virtual environment that holds what this ComfyUI (and the tests) need."""
    requirements = comfyui / "requirements.txt"
    wanted = [platform.python_version(), platform.machine(), sys.platform, *ALWAYS]
    home = CACHE / "venv" / key(*wanted, requirements.read_text(encoding="utf-8"))
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    with setting_up():
        if not (home / ".complete").is_file():
            if home.exists():
                shutil.rmtree(home)
            say(f"- first run: setting up {home}")
            create(home)
            needs = ["-r", str(requirements), *ALWAYS]
            watched([*pip, *needs], "installing ComfyUI's requirements (minutes)", home / "pip.log")
            (home / ".complete").touch()
        tested = home / f".tests-{key(*TEST, *TEST_NO_DEPS)}"
        if test and not tested.is_file():
            watched([*pip, *TEST], "installing the test tools", home / "test.log")
            baseline = [*pip, "--no-deps", *TEST_NO_DEPS]
            watched(baseline, "installing the baseline", home / "base.log")
            tested.touch()
        if test:
            for version, package in BINDINGS.items():
                bindings(pip, version, package, home)
    return python


def create(home: pathlib.Path) -> None:
    """A virtual environment with pip."""
    try:
        venv.create(home, with_pip=True)
    except subprocess.CalledProcessError:  # Debian has ensurepip in a package of its own
        raise Stop(
            f"{sys.executable} cannot make a virtual environment with pip: install its venv module "
            "(Debian and Ubuntu: apt install python3-venv) and try again."
        ) from None


def bindings(pip: list[str], version: str, package: str, home: pathlib.Path) -> None:
    """A folder of its own for one version of NVIDIA's bindings, where there are any."""
    place = CACHE / "tensorrt_bindings" / version
    if place.is_dir() or sys.platform != "linux" or platform.machine() != "x86_64":
        return
    try:
        with whole(place) as part:
            wanted = [*pip, "--no-deps", "--target", str(part), f"{package}=={version}"]
            watched(wanted, f"fetching TensorRT's bindings {version}", home / "bindings.log")
    except Stop as reason:  # not for this Python: their tests are skipped
        say(f"  {str(reason).splitlines()[0]}")


def key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def has_gpu(python: pathlib.Path) -> bool:
    probe = (
        "import sys, torch; m = getattr(torch.backends, 'mps', None);"
        "x = getattr(torch, 'xpu', None);"
        "sys.exit(not (torch.cuda.is_available() or (m and m.is_available())"
        " or (x and x.is_available())))"
    )
    return subprocess.run([str(python), "-c", probe], stderr=subprocess.DEVNULL).returncode == 0


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


def free_port(wanted: int = 0) -> int:
    """This port, or any other one when it is taken."""
    with socket.socket() as s:
        try:
            s.bind(("127.0.0.1", wanted))
        except OSError:
            s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def ended(process: subprocess.Popen):
    """The process does not outlive the block, whatever happens in it."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def server(comfyui: pathlib.Path, python: pathlib.Path, wanted: int = 0):
    """A running ComfyUI with the pack; yields its URL and its process."""
    base = CACHE / "server" / key(str(ROOT))
    with setting_up():
        link_pack(base)
    port, log = free_port(wanted), base / "server.log"
    gpu = has_gpu(python)
    command = [
        str(python), str(comfyui / "main.py"), "--base-directory", str(base), "--port", str(port),
        "--listen", "127.0.0.1", "--disable-auto-launch", "--database-url", "sqlite:///:memory:",
        *([] if gpu else ["--cpu"]),
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=comfyui
        )
        with ended(process):
            with Spinner(f"starting ComfyUI on the {'GPU' if gpu else 'CPU'}") as spinner:
                wait_for(url, process, log, spinner)
            yield url, process


def wait_for(url: str, process: subprocess.Popen, log: pathlib.Path, spinner: Spinner) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/system_stats", timeout=5):
            return
        spinner.update("waiting for the server")
        time.sleep(0.2)
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
    raise Stop(f"ComfyUI did not start. The end of {log}:\n{tail}")


def clip(args: argparse.Namespace, rest: list[str]) -> int:
    """Stylise a clip."""
    return client("clip", args, rest)


def client(name: str, args: argparse.Namespace, rest: list[str]) -> int:
    """A server, and a client of it that does the rest inside the environment."""
    comfyui = find_comfyui(args.comfyui)
    python = environment(comfyui, test=False)
    with server(comfyui, python) as (url, _):
        command = [str(python), str(ROOT / "demo" / "packed.py"), name, "--server", url]
        command += ["--folder", str(CACHE / "server" / key(str(ROOT))), *rest]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        with ended(process):
            return process.wait()


def live(args: argparse.Namespace, rest: list[str]) -> int:
    """The live demo: a server with the workflow's address, or with a client instead of a page."""
    if {"--headless", "--help", "-h"} & set(rest):
        return client("live", args, rest)
    parser = argparse.ArgumentParser(prog="run.py live")
    parser.add_argument("--port", type=int, default=PORT, help=f"default {PORT}, else a free one")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    own = parser.parse_args(rest)
    comfyui = find_comfyui(args.comfyui)
    python = environment(comfyui, test=False)
    with server(comfyui, python, own.port) as (url, process):
        # localhost is a secure context, so the page may use the camera
        url = url.replace("127.0.0.1", "localhost") + DEMO
        say(f"\n  {url}\n\n  opens the live demo. Press Live there; Ctrl+C here ends it.\n")
        if not own.no_browser and sys.stdout.isatty() and has_desktop():
            webbrowser.open(url)
        if process.wait() != 0:
            raise Stop(f"ComfyUI ended by itself; its log: {CACHE / 'server' / key(str(ROOT))}")
    return 0


def has_desktop() -> bool:
    """Whether a browser can be opened where the user sees it."""
    shown = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return sys.platform in ("win32", "darwin") or bool(shown)


def engines(args: argparse.Namespace, rest: list[str]) -> int:
    """A self-check: every engine that works here against eager."""
    parser = argparse.ArgumentParser(prog="run.py engines")
    parser.add_argument(
        "--install", nargs="+", default=[], choices=EXTRAS, help="into this command's environment"
    )
    own, more = parser.parse_known_args(rest)
    comfyui = find_comfyui(args.comfyui)
    python = environment(comfyui, test=False)
    packages = [package for name in own.install for package in EXTRAS[name]]
    if packages:
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        with setting_up():
            watched([*pip, *packages], f"installing {', '.join(own.install)}", CACHE / "extras.log")
    command = [str(python), str(ROOT / "benchmarks" / "engines.py"), "--comfyui", str(comfyui)]
    return subprocess.run([*command, *more], stdin=subprocess.DEVNULL).returncode


def bench(args: argparse.Namespace, rest: list[str]) -> int:
    """The pack beside others on this machine's processor: counts, ratios, scaling."""
    comfyui = find_comfyui(args.comfyui)
    python = environment(comfyui, test=True)
    command = [str(python), str(ROOT / "benchmarks" / "bench.py"), "--comfyui", str(comfyui)]
    return subprocess.run([*command, *rest], stdin=subprocess.DEVNULL).returncode


def train(args: argparse.Namespace, rest: list[str], name: str = "train") -> int:
    """The embedded model's trainer, or its judge."""
    comfyui = find_comfyui(args.comfyui)
    python = environment(comfyui, test=False)
    command = [str(python), str(ROOT / "demo" / f"{name}.py"), "--comfyui", str(comfyui)]
    return subprocess.run([*command, *rest], stdin=subprocess.DEVNULL).returncode


def evaluate(args: argparse.Namespace, rest: list[str]) -> int:
    """The embedded model on pictures that it never saw."""
    return train(args, rest, "evaluate")


def test(args: argparse.Namespace, rest: list[str]) -> int:
    """Lint, then the suite on one ComfyUI; without --comfyui, on the older ones first, in short.

    Tests that look at the clock run alone, after the others have run on every core.
    """
    versions = [args.comfyui]
    if args.comfyui == PRIMARY and not rest and not os.environ.get("COMFYUI_PATH"):
        versions += [v for v in ALSO if (CACHE / "comfyui" / v / "main.py").is_file()]
    python = environment(find_comfyui(args.comfyui), test=True)
    tools = python.parent
    if (code := subprocess.run([str(tools / "ruff"), "check", "."], cwd=ROOT).returncode) != 0:
        return code
    cores = ["-n", str(min(os.cpu_count() or 1, 8)), "--dist", "loadfile"]
    parts = [("", [])] if rest else [("not alone", cores), ("alone", [])]
    for version in reversed(versions):
        path = {"COMFYUI_PATH": str(find_comfyui(version))}
        for which, how in parts:
            say(f"- tests on ComfyUI {version}" + (f", {which}" if which else ""))
            short = "comfy and not server and not slow" if version != args.comfyui else ""
            mark = " and ".join(part for part in (which, short) if part)
            code = subprocess.run(
                [str(tools / "pytest"), *(["-m", mark] if mark else []), *how, *rest],
                cwd=ROOT, env={**os.environ, **path},
            ).returncode or code  # fmt: skip
    return code


COMMANDS = {"live": live, "clip": clip, "engines": engines, "bench": bench, "train": train,
            "evaluate": evaluate, "test": test}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="python run.py live --help and python run.py clip --help list their options.",
        add_help=False,
    )  # fmt: skip
    parser.add_argument("command", choices=list(COMMANDS), nargs="?", default="live")
    parser.add_argument("--comfyui", default=PRIMARY, metavar="VERSION", help="ComfyUI's version")
    args, rest = parser.parse_known_args()
    if {"--help", "-h"} & set(sys.argv[1:2]):
        parser.print_help()
        return 0
    try:
        return COMMANDS[args.command](args, rest)
    except Stop as reason:
        print(f"run.py: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
