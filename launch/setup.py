"""ComfyUI's source and an environment that runs it, in the user's cache. Standard library only."""

import contextlib
import hashlib
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import time
import venv

from .console import Spinner, Stop, say, watched

CACHE = pathlib.Path.home() / ".cache" / "livediffusion"
REPOSITORY = "https://github.com/comfyanonymous/ComfyUI"

# one release of the three that belongs together: the newest of each may not; ComfyUI 0.8.0 uses
# requests without naming it, and 0.38 and later have no torchaudio
ALWAYS = ["torch==2.14.1", "torchvision==0.29.1", "torchaudio==2.11.0", "requests"]
# where pip looks: the PyTorch of another index is another environment. Which PyTorch an index has
# for a GPU is not ours to say
INDEXES = ["PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"]
# glfw is for ComfyUI 0.25.0, which the tests start in this environment too
TEST = [
    "pytest>=8", "pytest-xdist>=3", "hypothesis>=6.100", "ruff>=0.6", "playwright>=1.45", "onnx",
    "onnxruntime", "openvino", "glfw", "pyvirtualcam", "segno", "trustme",
    "aiortc>=1.16; python_version >= '3.11'",
]  # fmt: skip
# the baseline some tests compare with; it pins an old diffusers, so its needs are named here
TEST_NO_DEPS = ["streamdiffusion==0.1.1", "diffusers", "importlib_metadata", "zipp"]
# what some tests run where it can be had
TEST_OPTIONAL = ["tensorrt_rtx==1.7.1.116", "ndi-python"]
# NVIDIA's bindings without the libraries, which the tests compare with what is used of them
BINDINGS = {
    "10.0.1": "tensorrt_cu12_bindings",
    "10.13.3.9": "tensorrt_cu13_bindings",
    "10.16.1.11": "tensorrt_cu13_bindings",
    "11.4.0.106": "tensorrt_cu13_bindings",
}


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


def environment(comfyui: pathlib.Path, test: bool) -> pathlib.Path:
    """The python of a virtual environment that holds what this ComfyUI (and the tests) need."""
    requirements = comfyui / "requirements.txt"
    text = requirements.read_text(encoding="utf-8")
    always = beside(text)
    home = CACHE / "venv" / key(
        platform.python_version(), platform.machine(), sys.platform, *always, text, *indexes()
    )  # fmt: skip
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    with setting_up():
        if not (home / ".complete").is_file():
            if home.exists():
                shutil.rmtree(home)
            say(f"- first run: setting up {home}")
            create(home)
            needs = ["-r", str(requirements), *always]
            watched([*pip, *needs], "installing ComfyUI's requirements (minutes)", home / "pip.log")
            (home / ".complete").touch()
        tested = home / f".tests-{key(*TEST, *TEST_NO_DEPS)}"
        if test and not tested.is_file():
            watched([*pip, *TEST], "installing the test tools", home / "test.log")
            baseline = [*pip, "--no-deps", *TEST_NO_DEPS]
            watched(baseline, "installing the baseline", home / "base.log")
            tested.touch()
        if test:
            optional(pip, home)
            for version, package in BINDINGS.items():
                bindings(pip, version, package, home)
    return python


def indexes() -> list[str]:
    """Where pip is told to look, by name and value; nothing for what is not set."""
    return [f"{name}={value}" for name in INDEXES if (value := os.environ.get(name, "").strip())]


def beside(requirements: str) -> list[str]:
    """What is installed beside a ComfyUI's requirements, from the text of its file."""
    audio = re.search(r"^\s*torchaudio\b", requirements, re.M)
    return [need for need in ALWAYS if audio or not need.startswith("torchaudio==")]


def create(home: pathlib.Path) -> None:
    """A virtual environment with pip."""
    try:
        venv.create(home, with_pip=True)
    except subprocess.CalledProcessError:  # Debian has ensurepip in a package of its own
        raise Stop(
            f"{sys.executable} cannot make a virtual environment with pip: install its venv module "
            "(Debian and Ubuntu: apt install python3-venv) and try again."
        ) from None


def optional(pip: list[str], home: pathlib.Path) -> None:
    """What tests are skipped without."""
    there = home / f".optional-{key(*TEST_OPTIONAL)}"
    if there.is_file() or sys.platform != "linux" or platform.machine() != "x86_64":
        return
    try:
        named = ", ".join(TEST_OPTIONAL)
        watched([*pip, *TEST_OPTIONAL], f"fetching {named} (105 MB)", home / "optional.log")
        there.touch()
    except Stop as reason:  # not for this Python, or no network: their tests are skipped
        say(f"  {str(reason).splitlines()[0]}")


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
