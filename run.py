#!/usr/bin/env python3
"""One command from a fresh clone to a running pack.

    python run.py                                           the live demo in a real ComfyUI
    python run.py live --lan                                the same for phones in this network
    python run.py live --headless [--video FILE] ...        the same on a file, without a browser
    python run.py live --unattended WORKFLOW.json [--lan]   a workflow without a page, for weeks
    python run.py clip [--video FILE] [--prompt TEXT] ...   stylise a clip
    python run.py serve WORKFLOW.json [--replicas N] ...    many streams behind one address
    python run.py engines [--install NAME ...]              which engines work here, and how fast
    python run.py train [--minutes N] [--out FOLDER] ...    train the embedded model anew
    python run.py evaluate [--weights FOLDER] ...           judge it on pictures it never saw
    python run.py bench [--quick] [--only PART ...]         the pack beside others, measured here
    python run.py test [pytest options]                     lint, then the whole test suite

Everything is set up on the first run: a virtual environment in the user's cache folder, ComfyUI,
the pack linked into its custom_nodes. Standard library only.
"""

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import webbrowser
from urllib.parse import urlsplit

from launch import house, lan, setup, unattended
from launch.console import Stop, ended, say, watched
from launch.server import PACK, base, port, server
from launch.stages import Stages, compiled_once

ROOT = pathlib.Path(__file__).resolve().parent
PRIMARY, ALSO = "0.33.0", ("0.25.0", "0.8.0")
# what of the suite runs on a version between the oldest and the newest: where ComfyUI is met most
BETWEEN = [
    "tests/host/test_registry.py", "tests/host/test_live.py", "tests/host/test_paths.py",
    "tests/live", "tests/test_frames.py",
]  # fmt: skip
# and on the oldest: where it is met at all. What is ours alone, such as engines' own libraries,
# files and the search for steps, is the same with each; the embedded model runs on each in a server
OLDEST = [
    "tests/host", "tests/nodes", "tests/live", "tests/compiled/test_engines.py",
    "tests/compiled/test_graph.py", "tests/compiled/test_weights_moving.py",
    "tests/compiled/test_compiled_vae.py",
    "tests/test_frames.py", "tests/test_timesteps.py", "tests/test_blend.py",
    "tests/test_words.py", "tests/test_help.py",
]  # fmt: skip
# of these not: protocols, adapters and the search for steps meet ComfyUI nowhere; the tests of what
# it has to do with them (test_ends, test_allowed, test_kept, test_phones, test_sampling) do run
OURS = [
    *(f"tests/live/test_{name}.py"
      for name in ("adapters", "address", "concealed", "device", "forbidden", "kept_memory", "ndi",
                   "srt", "stream", "turned", "webrtc", "whip_sink")),
    *(f"tests/nodes/test_{name}_nodes.py" for name in ("learning", "skipping")),
]  # fmt: skip
# minutes that a stage of the tests may take, and all of them
STAGE, STAGES = 30, 60
FAILED = 1  # what pytest ends with where a test has failed
DEMO = f"/?template=live_webcam&source={PACK}"
PORT = 8188  # ComfyUI's own; a browser remembers for an address that its page may use the camera
# what `engines` can install, by the name of the engine it is for
EXTRAS = {
    "onnxruntime": ["onnx", "onnxruntime"],
    "onnxruntime-gpu": ["onnx", "onnxruntime-gpu"],
    "openvino": ["onnx", "openvino"],
    "tensorrt": ["onnx", "tensorrt"],
    "tensorrt-rtx": ["onnx", "tensorrt_rtx"],
}


def clip(args: argparse.Namespace, rest: list[str]) -> int:
    """Stylise a clip."""
    return client("clip", args, rest)


def client(name: str, args: argparse.Namespace, rest: list[str]) -> int:
    """A server, and a client of it that does the rest inside the environment."""
    comfyui = setup.find_comfyui(args.comfyui)
    python = setup.environment(comfyui, test=False)
    command = [str(python), str(ROOT / "demo" / "packed.py"), name]
    # what cannot be done is said before anything starts
    checked = subprocess.run([*command, "--check", *rest], stdin=subprocess.DEVNULL)
    if checked.returncode or {"--help", "-h"} & set(rest):
        return checked.returncode
    with server(comfyui, python, options=_passed_on(args)) as (url, _, _):
        command += ["--server", url, "--folder", str(base())]
        process = subprocess.Popen([*command, *rest], stdin=subprocess.DEVNULL)
        with ended(process):
            return process.wait()


def live(args: argparse.Namespace, rest: list[str]) -> int:
    """The live demo: a server with the workflow's address, or with a client instead of a page."""
    if "--headless" in rest:
        return client("live", args, rest)
    if any(one.partition("=")[0] == "--unattended" for one in rest):
        return unattended.live(args.comfyui, rest, _passed_on(args))
    parser = argparse.ArgumentParser(
        prog="run.py live", epilog="--headless runs a file without a page and has options of its "
        "own: run.py live --headless --help. So has --unattended WORKFLOW.json.",
    )  # fmt: skip
    parser.add_argument("--port", type=port, default=PORT, help=f"default {PORT}, else a free one")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    parser.add_argument(
        "--lan", action="store_true", help="for the phones of this network, too: https, with a "
        "certificate made for this computer",
    )  # fmt: skip
    own = parser.parse_args(rest)
    comfyui = setup.find_comfyui(args.comfyui)
    python = setup.environment(comfyui, test=False)
    passed = _passed_on(args)
    if own.lan:
        made = lan.prepared(python)
        passed, trusted = (*passed, *made.options), made.authority
    else:
        trusted = None
    with server(comfyui, python, own.port, passed, trusted) as (url, process, log):
        # localhost is a secure context, so the page may use the camera
        url = url.replace("127.0.0.1", "localhost") + DEMO
        if own.lan:
            how = "  Press Live there. With source phone, the Live Camera shows a code to scan.\n"
            say(made.told(urlsplit(url).port, DEMO, how))
        else:
            say(f"\n  {url}\n\n  opens the live demo. Press Live there; Ctrl+C here ends it.\n")
        if not own.no_browser and sys.stdout.isatty() and has_desktop():
            webbrowser.open(url)
        if process.wait() != 0:
            raise Stop(f"ComfyUI ended by itself; its log: {log}")
    return 0


def serve(args: argparse.Namespace, rest: list[str]) -> int:
    """Many streams behind one address, on Ray Serve, which this sets up for itself."""
    return house.serve(args.comfyui, rest)


def _megabytes(text: str) -> int:
    """A size, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no size in megabytes: 1 or more")
    return int(text)


def _passed_on(args: argparse.Namespace) -> tuple[str, ...]:
    """Options that ComfyUI gets."""
    return "--max-upload-size", str(args.max_upload_size)


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
    comfyui = setup.find_comfyui(args.comfyui)
    python = setup.environment(comfyui, test=False)
    packages = [package for name in own.install for package in EXTRAS[name]]
    if packages:
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        with setup.setting_up():
            log = setup.CACHE / "extras.log"
            watched([*pip, *packages], f"installing {', '.join(own.install)}", log)
    command = [str(python), str(ROOT / "benchmarks" / "engines.py"), "--comfyui", str(comfyui)]
    return subprocess.run([*command, *more], stdin=subprocess.DEVNULL).returncode


def bench(args: argparse.Namespace, rest: list[str]) -> int:
    """The pack beside others on this machine's processor: counts, ratios, scaling."""
    comfyui = setup.find_comfyui(args.comfyui)
    # its rivals are not needed for its help
    python = setup.environment(comfyui, test=not {"-h", "--help"} & {*rest})
    command = [str(python), str(ROOT / "benchmarks" / "bench.py"), "--comfyui", str(comfyui)]
    return subprocess.run([*command, *rest], stdin=subprocess.DEVNULL).returncode


def train(args: argparse.Namespace, rest: list[str], name: str = "train") -> int:
    """The embedded model's trainer, or its judge."""
    comfyui = setup.find_comfyui(args.comfyui)
    python = setup.environment(comfyui, test=False)
    command = [str(python), str(ROOT / "demo" / f"{name}.py"), "--comfyui", str(comfyui)]
    return subprocess.run([*command, *rest], stdin=subprocess.DEVNULL).returncode


def evaluate(args: argparse.Namespace, rest: list[str]) -> int:
    """The embedded model on pictures that it never saw."""
    return train(args, rest, "evaluate")


def test(args: argparse.Namespace, rest: list[str]) -> int:
    """Lint, then the suite on one ComfyUI; without --comfyui, on the older ones first, in short.

    Tests that look at the clock run after the others, beside each other or alone, and those that
    failed once more; on the older ones with the others, where the few that are left bear it. A
    stage that does not end in time is ended, and the next begins.
    """
    versions = [args.comfyui]
    if args.comfyui == PRIMARY and not rest and not os.environ.get("COMFYUI_PATH"):
        versions += [v for v in ALSO if (setup.CACHE / "comfyui" / v / "main.py").is_file()]
    python = setup.environment(setup.find_comfyui(args.comfyui), test=True)
    tools = python.parent
    if (code := subprocess.run([str(tools / "ruff"), "check", "."], cwd=ROOT).returncode) != 0:
        return code
    cores = ["-n", str(min(os.cpu_count() or 1, 8)), "--dist", "loadfile"]
    parts = [("not alone and not clocked", cores), ("clocked", cores), ("alone", [])]
    parts = [("", [])] if rest else parts
    # who asks for tests of their own knows how long they take
    minutes = (float("inf"),) * 2 if rest else (STAGE, STAGES)
    stages = Stages(*(60 * limit for limit in minutes))
    with compiled_once() as env:
        for version in reversed(versions):
            path = {"COMFYUI_PATH": str(setup.find_comfyui(version))}
            path |= {} if version == args.comfyui else {"LIVEDIFFUSION_ONCE": "1"}
            short = "comfy and not server and not slow" if version != args.comfyui else ""
            some = [] if not short else OLDEST if version == versions[-1] else BETWEEN
            some = some + [f"--ignore={path}" for path in OURS if some]
            for which, how in [("", cores)] if short else parts:
                what = f"tests on ComfyUI {version}" + (f", {which}" if which else "")
                mark = which or short
                marked = ["-m", mark] if mark else []
                with tempfile.TemporaryDirectory(prefix="livediffusion-failed-") as failed:
                    command = [
                        str(tools / "pytest"), *marked, *how, *some, *rest,
                        "-o", f"cache_dir={failed}",
                    ]  # fmt: skip
                    for more in ("", ", what failed, once more"):
                        say(f"- {what}{more}")
                        last = ["--last-failed"] if more else []
                        result = stages.run(
                            what + more, [*command, *last], cwd=ROOT, env={**env, **path}
                        )
                        # browsers and houses stumble on a machine that others use, too
                        if result != FAILED or which not in ("clocked", "alone"):
                            break
                code = result or code
    return code


COMMANDS = {"live": live, "clip": clip, "serve": serve, "engines": engines, "bench": bench,
            "train": train, "evaluate": evaluate, "test": test}  # fmt: skip


def _interrupted(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="python run.py live --help and python run.py clip --help list their options.",
        add_help=False,
    )  # fmt: skip
    parser.add_argument("command", choices=list(COMMANDS), nargs="?", default="live")
    parser.add_argument("--comfyui", default=PRIMARY, metavar="VERSION", help="ComfyUI's version")
    parser.add_argument(
        "--max-upload-size", type=_megabytes, default=100, metavar="MB", help="passed on to ComfyUI"
    )
    args, rest = parser.parse_known_args()
    if {"--help", "-h"} & set(sys.argv[1:2]):
        parser.print_help()
        return 0
    # as Ctrl+C does, so that what was started ends too; nohup means that a hangup is no reason
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupted)
    try:
        return COMMANDS[args.command](args, rest)
    except Stop as reason:
        print(f"run.py: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
