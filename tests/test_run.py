"""run.py: what it finds, what it says, and that it ends what it starts."""

import argparse
import ast
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
from unittest import mock

import pytest
from clock import Limit
from serving import launch, load_run

ROOT = pathlib.Path(__file__).resolve().parents[1]
PRIMARY, ALSO = load_run().PRIMARY, load_run().ALSO
CONSOLE, SERVER = launch("console"), launch("server")
# three of these at once set up one environment; what takes minutes is a moment here
FIRST_RUN = """
import pathlib, sys, time
from serving import launch
setup = launch("setup")
setup.CACHE, comfyui = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])

def create(home, with_pip):
    home.mkdir(parents=True)
    time.sleep(0.2)

def installed(command, what, log, **_):
    assert log.parent.is_dir()
    if "--target" in command:
        place = pathlib.Path(command[command.index("--target") + 1])
        place.mkdir(parents=True)
        (place / "module.py").touch()
    time.sleep(0.05)
    print(what)

setup.venv.create, setup.watched = create, installed
setup.environment(comfyui, test=True)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run.py as a module with an empty cache and no COMFYUI_PATH."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    module = load_run()
    monkeypatch.setattr(module.setup, "CACHE", tmp_path / "cache")
    return module


def comfyui(path: pathlib.Path, requirements: str = "torch\n") -> pathlib.Path:
    """What passes for a ComfyUI folder."""
    path.mkdir(parents=True)
    (path / "main.py").touch()
    (path / "requirements.txt").write_text(requirements, encoding="utf-8")
    return path


def command(*args: str, **env: str) -> subprocess.CompletedProcess:
    """run.py as a user starts it, with `env` laid over the environment."""
    kept = {k: v for k, v in os.environ.items() if k != "COMFYUI_PATH"}
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *args], env=kept | env, capture_output=True,
        text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_needs_the_standard_library_only():
    paths = [ROOT / "run.py", *(ROOT / "launch").glob("*.py")]
    assert len(paths) > 3
    names = set()
    for node in (n for p in paths for n in ast.walk(ast.parse(p.read_text(encoding="utf-8")))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    assert names - {"_winapi", "launch"} <= set(sys.stdlib_module_names)


def test_it_explains_itself():
    done = command("--help")
    assert done.returncode == 0
    assert "python run.py live --headless" in done.stdout
    assert "python run.py clip" in done.stdout
    assert "python run.py test" in done.stdout


@pytest.mark.parametrize("what", [(), ("live", "--headless"), ("clip",), ("test",)])
def test_no_comfyui_and_no_way_to_get_it_is_one_sentence(tmp_path, what):
    # no git on an empty PATH stands for no network: both fail the clone
    env = {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "PATH": str(tmp_path)}
    done = command(*what, **env)
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"run.py: ComfyUI {PRIMARY} is not here and could not be cloned")
    assert "COMFYUI_PATH" in lines[0]
    assert not list(tmp_path.rglob("*.part*"))


def test_a_wrong_comfyui_path_is_said(tmp_path):
    done = command("clip", COMFYUI_PATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"run.py: COMFYUI_PATH is set to {tmp_path}")


def test_comfyui_path_goes_before_the_cache(run, tmp_path, monkeypatch):
    cached = comfyui(run.setup.CACHE / "comfyui" / PRIMARY)
    assert run.setup.find_comfyui(PRIMARY) == cached
    named = comfyui(tmp_path / "mine")
    monkeypatch.setenv("COMFYUI_PATH", str(named))
    assert run.setup.find_comfyui(PRIMARY) == named


def test_a_folder_without_comfyui_in_the_cache_is_said(run):
    (run.setup.CACHE / "comfyui" / PRIMARY).mkdir(parents=True)
    with pytest.raises(CONSOLE.Stop, match=r"no ComfyUI \(main\.py\) in .*remove that folder"):
        run.setup.find_comfyui(PRIMARY)


def test_a_clone_appears_whole_or_not_at_all(run, monkeypatch):
    asked = []

    def clone(args, **_):
        asked.append(args)
        comfyui(pathlib.Path(args[-1]))
        if len(asked) == 1:
            raise subprocess.CalledProcessError(128, args)

    monkeypatch.setattr(run.subprocess, "run", clone)
    with pytest.raises(CONSOLE.Stop):
        run.setup.find_comfyui(ALSO[0])
    assert list((run.setup.CACHE / "comfyui").iterdir()) == []
    path = run.setup.find_comfyui(ALSO[0])
    assert path == run.setup.CACHE / "comfyui" / ALSO[0]
    assert [p.name for p in path.parent.iterdir()] == [ALSO[0]]
    assert f"v{ALSO[0]}" in asked[1]


def test_the_environment_is_made_once_for_each_set_of_requirements(run, tmp_path, monkeypatch):
    made, installed = [], []

    def create(home, with_pip):
        made.append(home)
        home.mkdir(parents=True)

    monkeypatch.setattr(run.setup.venv, "create", create)
    monkeypatch.setattr(run.setup, "watched", lambda args, *_: installed.append(" ".join(args)))
    here = comfyui(tmp_path / "a")
    python = run.setup.environment(here, test=False)
    assert run.setup.environment(here, test=False) == python
    assert (len(made), len(installed)) == (1, 1)
    assert str(here / "requirements.txt") in installed[0]
    assert "pytest>=" not in installed[0]
    # the tests' tools are added to the same environment, once
    assert [run.setup.environment(here, test=True) for _ in range(2)] == [python, python]
    assert len(made) == 1
    assert sum("pytest>=" in line for line in installed) == 1
    linux = (sys.platform, platform.machine()) == ("linux", "x86_64")
    assert sum("tensorrt_rtx==" in line for line in installed) == linux
    other = run.setup.environment(comfyui(tmp_path / "b", "torch\naiohttp\n"), test=False)
    assert other != python
    # one that was not finished is made anew
    (made[0] / ".complete").unlink()
    (made[0] / "left").touch()
    run.setup.environment(here, test=False)
    assert made[-1] == made[0]
    assert not (made[0] / "left").exists()
    run.setup.environment(here, test=True)
    monkeypatch.setattr(run.setup, "TEST_OPTIONAL", ["nowhere"])
    monkeypatch.setattr(run.setup, "watched", mock.Mock(side_effect=CONSOLE.Stop("not here")))
    assert run.setup.environment(here, test=True) == python


def test_first_runs_at_the_same_time_wait_for_each_other(run, tmp_path):
    here = comfyui(tmp_path / "comfyui")
    starts = [sys.executable, "-c", FIRST_RUN, str(run.setup.CACHE), str(here)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    with run.setup.setting_up():
        runs = [
            subprocess.Popen(
                starts, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for _ in range(3)
        ]
        assert all("waiting for it" in process.stdout.readline() for process in runs)
    said = [process.communicate(timeout=60) for process in runs]
    assert [process.returncode for process in runs] == [0, 0, 0], said
    steps = [line for out, _ in said for line in out.splitlines() if line.startswith("inst")]
    assert len(steps) == len(set(steps)) == 3, said
    if sys.platform == "linux":
        fetched = list((run.setup.CACHE / "tensorrt_bindings").iterdir())
        assert {place.name for place in fetched} == set(run.setup.BINDINGS)
        assert all((place / "module.py").is_file() for place in fetched)


def test_a_lock_ends_with_its_holder(run):
    script = (
        "import os, pathlib, sys; from serving import launch; setup = launch('setup');"
        "setup.CACHE = pathlib.Path(sys.argv[1]); lock = setup.setting_up(); lock.__enter__();"
        "os._exit(9)"
    )
    command = [sys.executable, "-c", script, str(run.setup.CACHE)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    assert subprocess.run(command, env=env, timeout=60).returncode == 9
    assert (run.setup.CACHE / ".lock").is_file()
    limit = Limit(5)
    with run.setup.setting_up():
        assert not limit.over


def test_of_two_that_make_the_same_folder_the_faster_ones_stays(run, tmp_path):
    place = tmp_path / "there" / "1.0"
    with run.setup.whole(place) as part:
        part.mkdir()
        (part / "mine").touch()
        place.mkdir()
        (place / "theirs").touch()
    assert [p.name for p in place.parent.iterdir()] == ["1.0"]
    assert [p.name for p in place.iterdir()] == ["theirs"]
    # what is no folder at all is no folder of another process
    other = tmp_path / "there" / "2.0"
    other.touch()
    with pytest.raises(OSError), run.setup.whole(other) as part:
        part.mkdir()
    assert sorted(p.name for p in place.parent.iterdir()) == ["1.0", "2.0"]


def test_no_venv_module_is_one_sentence(run, tmp_path, monkeypatch):
    def create(home, with_pip):
        raise subprocess.CalledProcessError(1, ["python", "-m", "ensurepip"])

    monkeypatch.setattr(run.setup.venv, "create", create)
    with pytest.raises(CONSOLE.Stop, match="apt install python3-venv"):
        run.setup.environment(comfyui(tmp_path / "a"), test=False)


class TestVersions:
    """Which ComfyUI the suite runs on, and how much of it."""

    PARTS = ("not alone and not clocked", "clocked", "alone")

    @pytest.fixture
    def told(self, run, tmp_path, monkeypatch):
        """(ComfyUI's folder, marks) of each pytest that `run.py test` starts; the first fails."""
        started = []

        def start(self, what, command, cwd, env):
            marks = command[command.index("-m") + 1] if "-m" in command else ""
            for name in ("OLDEST", "BETWEEN"):
                marks += f" of {name}" * (set(getattr(run, name)) <= set(command))
            started.append((pathlib.Path(env["COMFYUI_PATH"]), marks))
            return int(len(started) == 1)

        python = tmp_path / "bin" / "python"
        monkeypatch.setattr(run.setup, "environment", lambda comfyui, test: python)
        linted = subprocess.CompletedProcess([], 0)
        monkeypatch.setattr(run.subprocess, "run", lambda command, cwd: linted)
        monkeypatch.setattr(run.Stages, "run", start)
        return started

    def test_all_of_it_on_the_primary_and_the_short_part_on_those_that_are_here(self, run, told):
        where = {v: comfyui(run.setup.CACHE / "comfyui" / v) for v in (PRIMARY, *ALSO)}
        assert len(ALSO) > 1
        # a failure on the oldest is not forgotten on the way to the newest
        assert run.test(argparse.Namespace(comfyui=PRIMARY), []) == 1
        part = {**dict.fromkeys(ALSO, "BETWEEN"), ALSO[-1]: "OLDEST"}
        short = "comfy and not server and not slow of "
        assert told == [
            *((where[v], short + part[v]) for v in reversed(ALSO)),
            *((where[PRIMARY], part) for part in self.PARTS),
        ]
        assert all((ROOT / path).exists() for path in run.OLDEST + run.BETWEEN + run.OURS)
        # an older one that is not here is not fetched
        told.clear()
        for file in where[ALSO[0]].iterdir():
            file.unlink()
        run.test(argparse.Namespace(comfyui=PRIMARY), [])
        assert {path for path, _ in told} == {where[v] for v in (PRIMARY, *ALSO[1:])}

    def test_one_version_or_some_tests_are_all_that_is_run(self, run, told, tmp_path, monkeypatch):
        where = {v: comfyui(run.setup.CACHE / "comfyui" / v) for v in (PRIMARY, *ALSO)}
        run.test(argparse.Namespace(comfyui=ALSO[0]), [])
        assert told == [(where[ALSO[0]], part) for part in self.PARTS]
        told.clear()
        run.test(argparse.Namespace(comfyui=PRIMARY), ["tests/test_run.py"])
        assert told == [(where[PRIMARY], "")]
        told.clear()
        named = comfyui(tmp_path / "mine")
        monkeypatch.setenv("COMFYUI_PATH", str(named))
        run.test(argparse.Namespace(comfyui=PRIMARY), [])
        assert told == [(named, part) for part in self.PARTS]

    @pytest.mark.parametrize("part", PARTS)
    @pytest.mark.parametrize("times", [1, 2])
    def test_what_looks_at_the_clock_and_failed_runs_once_more(
        self, run, told, monkeypatch, part, times
    ):
        comfyui(run.setup.CACHE / "comfyui" / ALSO[0])
        ran = []

        def start(self, what, command, cwd, env):
            ran.append((command[command.index("-m") + 1], "--last-failed" in command))
            return int([one for one, _ in ran].count(part) <= times and ran[-1][0] == part)

        monkeypatch.setattr(run.Stages, "run", start)
        again = part in self.PARTS[1:]
        assert run.test(argparse.Namespace(comfyui=ALSO[0]), []) == int(times == 2 or not again)
        wanted = [(one, False) for one in self.PARTS]
        if again:
            wanted.insert(wanted.index((part, False)) + 1, (part, True))
        assert ran == wanted

    def test_they_are_said_alike_everywhere(self):
        readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
        assert f"ComfyUI {PRIMARY} and also tested on {' and '.join(ALSO)}" in readme
        suite = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
        assert re.findall(r'^PRIMARY = "(.*)"$', suite, re.MULTILINE) == [PRIMARY]
        published = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert f'requires-comfyui = ">={ALSO[-1]}"' in published


def test_a_failed_step_shows_the_end_of_its_log(run, tmp_path):
    script = "print('one'); print('the reason'); raise SystemExit(3)"
    with pytest.raises(CONSOLE.Stop, match=r"(?s)a step failed.*the reason"):
        CONSOLE.watched([sys.executable, "-c", script], "a step", tmp_path / "log" / "step.log")


def test_the_pack_is_linked_and_a_stale_link_is_renewed(run, tmp_path):
    link = tmp_path / "custom_nodes" / "ComfyUI-LiveDiffusion"
    SERVER.link_pack(tmp_path)
    assert link.resolve() == ROOT
    SERVER.link_pack(tmp_path)
    if os.name != "nt":
        link.unlink()
        link.symlink_to(tmp_path / "gone")
        SERVER.link_pack(tmp_path)
    assert link.resolve() == ROOT


@pytest.mark.parametrize("how", [KeyboardInterrupt, RuntimeError, None])
def test_what_it_starts_is_ended(run, how):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    limit = Limit(10)
    try:
        with CONSOLE.ended(process):
            if how:
                raise how
    except (KeyboardInterrupt, RuntimeError):
        pass
    assert process.poll() is not None
    assert not limit.over


# run.py with a stand-in for ComfyUI, and without the minutes before it
STARTED = """
import sys
from unittest import mock
from serving import load_run
run = load_run()
run.setup.environment = lambda comfyui, test: sys.executable
sys.modules["launch.server"].has_gpu = lambda python: False
sys.argv = ["run.py", *sys.argv[1:]]
sys.exit(run.main())
"""
STAND_IN = """
import http.server, os, pathlib, sys
pathlib.Path(__file__).with_name("pid").write_text(str(os.getpid()))
pathlib.Path(__file__).with_name("options").write_text(" ".join(sys.argv[1:]))
port = int(sys.argv[sys.argv.index("--port") + 1])
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without a word")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "nohup"])
def test_a_signal_ends_what_it_started_too(tmp_path, name):
    def as_by_hand():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if name == "nohup":
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    here = comfyui(tmp_path / "comfyui")
    (here / "main.py").write_text(STAND_IN, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "COMFYUI_PATH": str(here)}
    command = [sys.executable, "-c", STARTED, "--max-upload-size", "7", "live", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--no-browser"], env=env | {"HOME": str(tmp_path)}, stdout=subprocess.PIPE,
        text=True, preexec_fn=as_by_hand,
    )  # fmt: skip
    with CONSOLE.ended(process):
        for line in process.stdout:
            if "opens the live demo" in line:
                break
        server = int((here / "pid").read_text())
        if name == "nohup":
            process.send_signal(signal.SIGHUP)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
        process.send_signal(getattr(signal, "SIGTERM" if name == "nohup" else name))
        assert process.wait(60) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)
    assert "--max-upload-size 7" in (here / "options").read_text()


@pytest.mark.parametrize(
    "args",
    [("live", "--port", "70000"), ("live", "--port", "-1"), ("live", "--port", "x"),
     *(("live", "--unattended", "w.json", "--port", port) for port in ("70000", "-1", "x")),
     ("--max-upload-size", "0"), ("--max-upload-size", "much"), ("fly",)],
)  # fmt: skip
def test_what_cannot_be_done_is_said_before_anything_starts(args):
    done = command(*args)
    assert done.returncode == 2 and done.stdout == ""
    assert "error: argument" in done.stderr.splitlines()[-1]


@pytest.mark.comfy
@pytest.mark.parametrize(
    "args", [("clip", "--size", "255"), ("live", "--headless", "--frames", "0"),
             ("clip", "--video", "nothing.mp4"), ("clip", "--help")],
)  # fmt: skip
def test_a_client_is_asked_before_its_server_starts(run, monkeypatch, tmp_path, capfd, args):
    here = comfyui(tmp_path / "comfyui")
    monkeypatch.setenv("COMFYUI_PATH", str(here))
    monkeypatch.setattr(run.setup, "environment", lambda comfyui, test: sys.executable)
    monkeypatch.setattr(run, "server", None)
    monkeypatch.setattr(sys, "argv", ["run.py", *args, "--out", str(tmp_path / "out")])
    assert run.main() == (0 if "--help" in args else 1 if "--video" in args else 2)
    said = capfd.readouterr()
    assert "--help" in args or len(said.err.splitlines()) == 1, said.err


def test_a_server_that_dies_is_said_with_its_log(run, tmp_path):
    log = tmp_path / "server.log"
    log.write_text("booting\nno module named torch\n", encoding="utf-8")
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    url = f"http://127.0.0.1:{SERVER.free_port()}"
    with pytest.raises(CONSOLE.Stop, match="no module named torch"):
        SERVER.wait_for(url, process, log, CONSOLE.Spinner("x"))


def test_the_port_is_the_same_each_time_if_it_is_free(run):
    port = SERVER.free_port()
    assert SERVER.free_port(port) == port
    with SERVER.socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        assert SERVER.free_port(port) != port


def test_ci_runs_the_readmes_test_command():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    said = [line for line in lines if line and not line.startswith(("#", "set "))]
    assert said == ["python3 run.py test"]
    assert said[0].replace("python3", "python") in (ROOT / "README.md").read_text(encoding="utf-8")
