"""`run.py serve` before and after there is a house: its options, its environment, its end."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
from serving import ROOT, launch, served

options, haproxy, settings = served("options"), served("haproxy"), served("settings")
main, KEYS = served("main"), served("tickets").Tickets(b"k" * 32)
WORKFLOW = str(ROOT / "workflows" / "live_webcam.json")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc, or runs HAProxy")


@pytest.mark.parametrize("given,says", [
    (["{tmp}/none.json"], "cannot be read"), (["{tmp}/bad.json"], "JSON"),
    (["{tmp}/list.json"], "workflow is expected"), ([WORKFLOW, "--port", "70000"], "65535"),
    ([WORKFLOW, "--replicas", "many"], "auto, N or MIN:MAX"),
    ([WORKFLOW, "--replicas", "3:1"], "the smaller one first"),
    ([WORKFLOW, "--replicas", "0"], "1 to 10000"), ([WORKFLOW, "--fps", "0"], "1 to 60"),
    ([WORKFLOW, "--limit", "-1"], "1 to 1e"), ([WORKFLOW, "--gpus-each", "2"], "part of a GPU"),
    ([WORKFLOW, "--ports", "a:b"], "FIRST:LAST"), ([WORKFLOW, "--drain", "0"], "1 to 3600"),
    ([], "required"), ([WORKFLOW, "--other"], "--other"),
    (["{tmp}/blind.json"], "no Live View"), ([WORKFLOW, "--ports", "9:1"], "FIRST:LAST"),
    ([WORKFLOW, "--input", "foo"], "NODE.NAME"), ([WORKFLOW, "--input", "999.text"], "NODE.NAME"),
    ([WORKFLOW, "--base", "{tmp}/none"], "no folder"), ([WORKFLOW, "--log", "{tmp}"], "--log"),
    ([WORKFLOW, "--log", "{tmp}/no/x.log"], "--log"), ([WORKFLOW, "--key", "x"], "16 bytes"),
    ([WORKFLOW, "--address", "foo"], "HOST:PORT"),
])  # fmt: skip
def test_what_cannot_be_is_said_before_anything_is_set_up(given, says, tmp_path, capsys):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "blind.json").write_text('{"1": {"class_type": "LiveCamera", "inputs": {}}}')
    with pytest.raises(SystemExit):
        options.options([one.replace("{tmp}", str(tmp_path)) for one in given])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in said and "Traceback" not in said


def test_nodes_have_the_numbers_that_inputs_are_named_by():
    inner = {"id": "a", "nodes": [{"id": 3, "type": "Text"}, {"id": 4, "type": "b"}]}
    deeper = {"id": "b", "nodes": [{"id": 5, "type": "LiveView"}, {"id": 6, "type": "b"}]}
    whole = {"nodes": [{"id": 12, "type": "a"}, {"id": 1, "type": "LiveCamera"}],
             "definitions": {"subgraphs": [inner, deeper]}}  # fmt: skip
    found = options.nodes(whole)
    assert found["12:3"] == "Text" and found["12:4:5"] == "LiveView" and found["1"] == "LiveCamera"
    assert options.nodes({"7": {"class_type": "LiveView", "inputs": {}}}) == {"7": "LiveView"}


def test_every_option_reaches_the_settings_of_the_house():
    found = options.options([
        WORKFLOW, "--replicas", "0:4", "--fps", "12", "--limit", "90", "--input", "3.text",
        "--title", "T", "--cpu", "--spare", "1", "--idle", "7", "--drain", "9", "--waiting", "5",
        "--ingresses", "2", "--no-direct", "--ports", "9000:9009", "--secure", "--log-prompts",
        "--comfyui-option=--fast", "--gpus-each", "0.5", "--host", "0.0.0.0", "--key", "a" * 40,
    ])  # fmt: skip
    house = settings.Settings(**options.settings(found))
    assert house.bounds(0) == (0, 4) and house.fps == 12 and house.limit_s == 90
    assert house.inputs == ["3.text"] and house.title == "T" and house.cpu and house.spare == 1
    assert house.idle_s == 7 and house.drain_s == 9 and house.most_waiting == 5
    assert house.ingresses == 2 and not house.direct and house.ports == (9000, 9009)
    assert house.secure and house.log_prompts and house.options == ["--fast"]
    assert house.gpus_each == 0.5 and not house.local() and house.key == "a" * 40
    # as a config file has it
    assert settings.Settings(workflow=WORKFLOW).workflow == house.workflow


@pytest.mark.parametrize("replicas,gpus,each,cpu,expected", [
    ("auto", 2, 1.0, False, (1, 2)), ("auto", 2, 0.25, False, (1, 8)),
    ("auto", 0, 1.0, False, (1, 1)), ("auto", 2, 0.6, False, (1, 2)),
    ("auto", 2, 1.0, True, (1, 1)), ("3", 2, 1.0, False, (3, 3)), ("1:5", 0, 1.0, True, (1, 5)),
    (2, 0, 0.0, False, (2, 2)),
])  # fmt: skip
def test_how_many_replicas_auto_is(replicas, gpus, each, cpu, expected):
    house = settings.Settings(workflow=WORKFLOW, replicas=replicas, gpus_each=each, cpu=cpu)
    assert house.bounds(gpus) == expected


@pytest.mark.parametrize("replicas,gpus,each,cpu,expected", [
    ("auto", 2, 1.0, False, "2"), ("auto", 1, 1.0, False, "1"), ("auto", 0, 0.0, False, "1"),
    ("auto", 2, 0.25, False, "2:8"), ("auto", 2, 1.0, True, "1"), ("auto", 0, 1.0, True, "1"),
    ("auto", 2, 0.6, False, "2"), ("1:2", 2, 1.0, False, "1:2"), ("3", 2, 1.0, False, "3"),
    ("0:2", 2, 0.5, False, "0:2"),
])  # fmt: skip
def test_on_a_machine_of_one_s_own_each_gpu_has_its_comfyui_from_the_start(
    replicas, gpus, each, cpu, expected
):
    house = settings.Settings(workflow=WORKFLOW, replicas=replicas, gpus_each=each, cpu=cpu)
    assert house.here(gpus) == expected


def test_what_only_the_machine_knows_comes_from_its_environment(monkeypatch):
    monkeypatch.setenv("LIVEDIFFUSION_COMFYUI", "/comfyui")
    monkeypatch.setenv("LIVEDIFFUSION_KEY", "b" * 40)
    house = settings.Settings(workflow=WORKFLOW, comfyui="/mine")
    assert house.comfyui == "/mine" and house.key == "b" * 40
    for wrong in ({"key": "short"}, {"ports": (9, 3)}, {"other": 1}, {"replicas": "x"}):
        with pytest.raises(ValueError):
            settings.Settings(workflow=WORKFLOW, **wrong)


@pytest.mark.parametrize("asked,gpus,joins,expected", [
    (None, 0, False, 0.0), (0.5, 0, False, 0.0), (1.0, 0, False, 0.0),
    (None, 2, False, "measured"), (0.5, 2, False, 0.5), (0.5, 0, True, 0.5),
    (None, 0, True, "measured"), (None, 2, True, "measured"),
])  # fmt: skip
def test_no_gpu_is_measured_that_ray_does_not_count(asked, gpus, joins, expected, monkeypatch):
    """A task for one would wait for ever; a cluster that grows may get one."""
    monkeypatch.setattr(main, "measured", lambda house, stop: "measured")
    assert main.part(asked, gpus, joins, None, threading.Event()) == expected


def test_what_is_measured_is_not_waited_for_when_the_house_is_to_end(monkeypatch):
    ray, asked = types.ModuleType("ray"), []
    ray.remote = lambda **how: lambda function: types.SimpleNamespace(remote=asked.append)
    ray.wait = lambda tasks, timeout: ([], tasks)  # no machine ever has a GPU for it
    ray.cancel = lambda task, force: asked.append("cancelled")
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "serve.measuring", types.SimpleNamespace(measure=None))
    stop = threading.Event()
    stop.set()
    with pytest.raises(KeyboardInterrupt):
        main.measured("house", stop)
    assert asked == ["house", "cancelled"]


def test_a_ray_that_does_not_start_is_said_and_not_started_again(tmp_path, monkeypatch):
    """On a machine that is too busy its start is over after half a minute."""
    asked = []

    def init(*_, **__):
        raise Exception("The current node timed out during startup.")

    ray, serve = types.ModuleType("ray"), types.ModuleType("ray.serve")
    ray.init, ray.is_initialized, ray.serve = init, lambda: False, serve
    ray.shutdown, serve.shutdown = (lambda: asked.append("Ray")), (lambda: asked.append("Serve"))
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.serve", serve)
    monkeypatch.setattr(main, "ended", lambda: asked.append("ended"))
    with pytest.raises(Exception, match="timed out during startup"):
        main.run(options.options([WORKFLOW]), str(tmp_path), threading.Event())
    assert asked == ["Ray"]


@pytest.mark.parametrize("host,own,expected", [
    ("127.0.0.1", "10.0.0.7", ("http://localhost:80", "", "http://127.0.0.1:80")),
    ("localhost", "10.0.0.7", ("http://localhost:80", "", "http://127.0.0.1:80")),
    ("::1", "10.0.0.7", ("http://localhost:80", "", "http://[::1]:80")),
    ("0.0.0.0", "10.0.0.7", ("http://localhost:80", "http://10.0.0.7:80", "http://127.0.0.1:80")),
    ("0.0.0.0", None, ("http://localhost:80", "", "http://127.0.0.1:80")),
    ("::", "10.0.0.7", ("http://localhost:80", "http://10.0.0.7:80", "http://127.0.0.1:80")),
    ("10.0.0.7", "10.0.0.7", ("http://10.0.0.7:80", "", "http://10.0.0.7:80")),
    ("fd00::7", None, ("http://[fd00::7]:80", "", "http://[fd00::7]:80")),
    ("art.example", None, ("http://art.example:80", "", "http://art.example:80")),
])  # fmt: skip
def test_each_address_that_is_printed_can_be_opened(host, own, expected, monkeypatch):
    monkeypatch.setattr(main, "own_address", lambda: own)
    here, there, looked = expected
    assert main.addresses(host, 80) == (here, there) and main.reached(host, 80) == looked
    said = main.told(host, 80, False, KEYS)
    assert f"\n  {here}/operator?ticket=" in said and (there in said)
    assert "0.0.0.0" not in said and "//:" not in said
    assert ("HTTPS" in said) == (host not in options.LOCAL), "elsewhere there is no camera"
    # behind a proxy that has HTTPS its address is the one to open
    said = main.told(host, 80, True, KEYS)
    assert "https://PROXY/operator?ticket=" in said and "proxy" in said
    assert f"\n  {here}\n" in said and "http://" not in said.partition("operator")[2]


@LINUX
def test_haproxy_s_own_pages_are_for_this_machine_and_it_says_who_a_visitor_is(tmp_path):
    real = tmp_path / "real"
    real.write_text('#!/bin/sh\nfor one in "$@"; do echo "$one"; done\n')
    real.chmod(0o700)
    config = tmp_path / "haproxy.cfg"
    served_ = (
        "frontend prometheus\n    bind :9101\nfrontend http_frontend\n    bind 0.0.0.0:8000\n"
        "listen stats\n  bind *:8404\n"
    )
    for forward in (True, False):
        config.write_text(served_)
        made = haproxy.environment(tmp_path, str(real), forward)
        command = [made["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(config), "-sf", "7"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == command[1:]
        lines = [line.strip() for line in config.read_text().splitlines()]
        assert "bind 127.0.0.1:9101" in lines and "bind 127.0.0.1:8404" in lines
        assert "bind 0.0.0.0:8000" in lines, "where visitors come is as it was asked for"
        assert any("/-/routes" in line and "status 404" in line for line in lines)
        assert any("x-forwarded-for" in line for line in lines) is forward
    ports = [value for name, value in made.items() if name.endswith("_PORT")]
    assert len(set(ports)) == 2 and all(int(port) < 32768 for port in ports)
    ends = ("_LOC", "_PATH", "_BASE", "_FILE", "_TARGET")
    paths = [value for name, value in made.items() if name.endswith(ends)]
    assert len(paths) == 7 and all(v.startswith(str(tmp_path)) for v in paths)


def test_without_ray_it_says_how_to_get_it(tmp_path, monkeypatch):
    house, console = launch("house"), launch("console")
    monkeypatch.setattr(house.setup, "CACHE", tmp_path)
    monkeypatch.delenv("LIVEDIFFUSION_RAY", raising=False)
    monkeypatch.setattr(house.setup, "create", lambda home: home.mkdir(parents=True))

    def fails(command, what, log, env):
        raise console.Stop(f"{what} failed. The end of {log}:\nno network")

    monkeypatch.setattr(house, "watched", fails)
    with pytest.raises(console.Stop) as told:
        house.environment()
    said = str(told.value)
    assert 'pip install "ray[serve]==2.60.0"' in said and "LIVEDIFFUSION_RAY" in said
    assert "\n" not in said
    assert not list(tmp_path.glob("ray/*/")), "half an environment is none"
    monkeypatch.setenv("LIVEDIFFUSION_RAY", str(tmp_path / "python"))
    with pytest.raises(console.Stop, match="no Python there"):
        house.environment()
    (tmp_path / "python").touch()
    assert house.environment() == tmp_path / "python"


@LINUX
@pytest.mark.alone
def test_what_is_left_of_a_house_is_ended_and_of_no_other():
    house = launch("house")
    command = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"]
    marks = [f"test{os.getpid()}", f"test{os.getpid()}0"]
    started = []
    for mark in marks:
        process = subprocess.Popen(
            command, env={**os.environ, house.MARK: mark}, stdout=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        process.stdout.readline()
        started.append(process)
    try:
        assert house.left(marks[0]) == 1
        assert started[0].wait(5) == -signal.SIGKILL and started[1].poll() is None
    finally:
        for process in started:
            process.kill()
            process.wait()
            process.stdout.close()


def test_folders_of_houses_that_were_killed_are_removed(tmp_path, monkeypatch):
    house = launch("house")
    monkeypatch.setattr(house.tempfile, "gettempdir", lambda: str(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = [f"lds{gone.pid}-a", f"lds{os.getpid()}-a", "ldsx-a", "other"]
    for name in names:
        (tmp_path / name).mkdir()
    house.sweep()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names[1:])


@pytest.mark.alone
def test_the_house_ends_when_run_py_is_gone(tmp_path):
    """Standard input of the house's process is a line to run.py that no kill leaves open."""
    main = (
        "import sys, threading; sys.path.insert(0, sys.argv[1]); import serve.main as m;"
        "stop = threading.Event(); m.heard(stop, ''); print('up', flush=True); stop.wait(30);"
        "print(json.dumps(stop.is_set()) if (json := __import__('json')) else '', flush=True)"
    )
    env = {**os.environ, launch("house").MARK: "x"}
    process = subprocess.Popen(
        [sys.executable, "-c", main, str(ROOT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env=env,
    )  # fmt: skip
    with contextlib.closing(process.stdout):
        assert process.stdout.readline() == "up\n"
        began = time.monotonic()
        process.stdin.close()
        assert json.loads(process.stdout.readline()) is True
        assert time.monotonic() - began < 5 and process.wait(5) == 0


@LINUX
@pytest.mark.alone
def test_a_house_that_waits_for_what_does_not_come_ends_all_the_same(tmp_path):
    """Ray's own calls have no end of theirs."""
    home = tmp_path / "home"
    home.mkdir()
    main = (
        "import sys, threading, time; sys.path.insert(0, sys.argv[1]); import serve.main as m;"
        "m._LAST_S = 0.5; m.heard(threading.Event(), sys.argv[2]); print('up', flush=True);"
        "time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", main, str(ROOT), str(home)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
        env={**os.environ, launch("house").MARK: f"t{os.getpid()}"},
    )  # fmt: skip
    with contextlib.closing(process.stdout):
        assert process.stdout.readline() == "up\n"
        process.stdin.close()
        assert process.wait(30) == 1 and not home.exists()


@LINUX
@pytest.mark.alone
def test_a_second_ctrl_c_leaves_nothing_of_a_house_running(monkeypatch):
    house = launch("house")
    monkeypatch.setattr(house, "PATIENCE", 0.2)
    mark = f"test{os.getpid()}s"
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"],
        env={**os.environ, house.MARK: mark}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    process.stdout.readline()
    real, interrupted = house.left, []

    def left(mark):
        os.kill(os.getpid(), signal.SIGINT)
        interrupted.append(mark)
        return real(mark)

    monkeypatch.setattr(house, "left", left)
    before = signal.getsignal(signal.SIGINT)
    with contextlib.closing(process.stdout):
        house._end(process, mark)
    assert process.poll() == -signal.SIGKILL and interrupted == [mark]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_log_that_nobody_named_is_there_is_found_and_does_not_grow(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main, "CACHE", tmp_path / "cache")
    path = pathlib.Path(main.own_log(8000))
    assert path.is_file() and path.is_relative_to(tmp_path)
    bounded, logs = served("bounded"), served("logs")

    def lobby():
        def write(line):
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

        return logs.Log(bounded.Bounded(str(path), 1000, write))

    log = lobby()
    for number in range(100):
        if number == 50:
            log = lobby()  # another lobby goes on where the last one was
        log.event("start", number=number)
    both = [path.with_name(path.name + ".1"), path]
    assert sorted(path.parent.iterdir()) == sorted(both)
    assert all(one.stat().st_size <= 1100 for one in both)
    kept = [json.loads(line)["number"] for one in both for line in one.read_text().splitlines()]
    assert kept == list(range(kept[0], 100)) and len(kept) >= 15, "the latest, none left out"
    # the next house begins with an empty one
    assert main.own_log(8000) == str(path) and path.read_bytes() == b""
    assert [one.name for one in path.parent.iterdir()] == ["8000.jsonl"]
    (tmp_path / "file").touch()
    monkeypatch.setattr(main, "CACHE", tmp_path / "file")
    assert main.own_log(8000) == "" and "--log FILE" in capsys.readouterr().out


def test_a_log_that_cannot_begin_anew_goes_on_and_says_its_troubles(tmp_path):
    lines = []

    class Write:
        problem = "The disk is full."

        def __call__(self, line):
            lines.append(line)

    made = served("bounded").Bounded(str(tmp_path / "none" / "x"), 10, Write())
    for _ in range(5):
        made("x" * 9)
    assert len(lines) == 5 and made.problem == "The disk is full."


def test_paths_are_meant_where_the_command_was_typed(tmp_path, monkeypatch):
    house = launch("house")
    (tmp_path / "w.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    given = ["w.json", "--base", "b", "--log=l.jsonl", "--title", "w", "--port", "1"]
    assert house._absolute(given) == [
        str(tmp_path / "w.json"), "--base", str(tmp_path / "b"), f"--log={tmp_path / 'l.jsonl'}",
        "--title", "w", "--port", "1",
    ]  # fmt: skip
    assert pathlib.Path(given[0]).is_file()
