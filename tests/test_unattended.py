"""`run.py live --unattended`: what it refuses, and what it does when ComfyUI dies."""

import itertools
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from unittest import mock

import pytest
from clock import Limit
from serving import ROOT, launch

UNATTENDED, CONSOLE = launch("unattended"), launch("console")
GRAPH = {
    "1": {"class_type": "LiveCamera", "inputs": {"source": "file", "file": "film.gif"}},
    "2": {"class_type": "LiveView", "inputs": {"image": ["1", 0]}},
}

# run.py with a stand-in for ComfyUI, and without the minutes before it and the pauses in it
STARTED = """
import sys
from serving import load_run
run = load_run()
unattended = sys.modules["launch.unattended"]
unattended.setup.environment = lambda comfyui, test: sys.executable
unattended._FIRST = unattended._LOOK = 0.1
unattended._LAST, unattended._FINISH = 3.0, 0.5
unattended._WRITTEN = 2.0
addresses = iter(["127.0.0.2", "127.0.0.3"])
unattended.lan.own_address = lambda: next(addresses)
sys.modules["launch.server"].has_gpu = lambda python: False
sys.argv = ["run.py", *sys.argv[1:]]
sys.exit(run.main())
"""
# it notes what it is asked, and has a run for as long as the file `run` is there. Where there is a
# file `slow`, a run that was ended is told of no more at once, written down and answered late.
STAND_IN = """
import http.server, json, os, pathlib, ssl, sys, time
here = pathlib.Path(__file__).parent
port = int(sys.argv[sys.argv.index("--port") + 1])

def note(*what):
    with (here / "notes").open("a") as file:
        file.write(json.dumps(what) + "\\n")

host = sys.argv[len(sys.argv) - sys.argv[::-1].index("--listen")]
note("up", os.getpid(), port, os.environ.get("LIVEDIFFUSION_UNATTENDED"))

def keep(*runs):
    folder = pathlib.Path(sys.argv[sys.argv.index("--base-directory") + 1]) / "user"
    path = folder / "livediffusion" / "runs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps({"livediffusion": 1, "runs": runs}))
    path.with_suffix(".part").replace(path)

class Answer(http.server.BaseHTTPRequestHandler):
    def tell(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        there = [{"run": "r"}] if (here / "run").exists() else []
        self.tell({"runs": there} if self.path.endswith("runs") else {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        route = self.path.rpartition("/")[2]
        note(route, body)
        if (here / "refuse").exists():
            errors = [{"message": "file: there is none.", "details": ""}]
            node = {"class_type": "LiveCamera", "errors": errors}
            error = {"message": "file: there is none."}
            return self.tell({"error": error, "node_errors": {"1": node}}, 400)
        if route == "start":
            (here / "run").touch()
            keep({"run": "r"})
        elif route == "end":
            (here / "run").unlink()
            if (here / "slow").exists():
                time.sleep(1)
            keep()
            note("written")
            if (here / "slow").exists():
                time.sleep(0.2)
        self.tell({"run": "r"})
        note("answered", route)

    def log_message(self, *args):
        pass

server = http.server.ThreadingHTTPServer((host, port), Answer)
if "--tls-keyfile" in sys.argv:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*(sys.argv[sys.argv.index(name) + 1]
                              for name in ("--tls-certfile", "--tls-keyfile")))
    server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""


class Started:
    """The command with a stand-in for ComfyUI in `here`."""

    def __init__(self, tmp_path, graph=GRAPH):
        self.here = tmp_path / "comfyui"
        self.here.mkdir()
        (self.here / "main.py").write_text(STAND_IN, encoding="utf-8")
        (self.here / "requirements.txt").touch()
        self.file = tmp_path / "display.json"
        self.file.write_text(json.dumps(graph), encoding="utf-8")
        self.env = {
            **os.environ, "PYTHONPATH": str(ROOT / "tests"), "COMFYUI_PATH": str(self.here),
            "HOME": str(tmp_path),
        }  # fmt: skip

    @property
    def runs(self):
        """The file of kept runs, which the stand-in writes."""
        (path,) = self.here.parent.glob("**/livediffusion/runs.json")
        return path

    def begin(self, *more):
        command = [sys.executable, "-c", STARTED, "live", "--unattended", str(self.file), *more]
        return subprocess.Popen(
            [*command, "--port", "0"], env=self.env, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def notes(self, kind):
        try:
            lines = (self.here / "notes").read_text().splitlines()
        except OSError:
            return []
        return [note[1:] for note in map(json.loads, lines) if note[0] == kind]

    def wait(self, process, condition):
        limit = Limit(30)
        while not (found := condition()):
            assert not limit.over and process.poll() is None, process.communicate()
            time.sleep(0.02)
        return found


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def started(tmp_path):
    if os.name == "nt":
        pytest.skip("Windows ends a process without a word")
    return Started(tmp_path)


def test_a_comfyui_that_dies_is_started_again_with_the_same_run(started):
    process = started.begin()
    with CONSOLE.ended(process):
        (begun,) = started.wait(process, lambda: started.notes("start"))
        assert begun[0] == {
            "prompt": GRAPH, "workflow": None, "client_id": "", "unattended": True,
            "name": "display",
        }  # fmt: skip
        for death in range(1, 4):
            ups = started.wait(process, lambda n=death: len(started.notes("up")) == n
                               and started.notes("up"))  # fmt: skip
            time.sleep(0.5)  # until it is looked after
            os.kill(ups[-1][0], signal.SIGKILL)
        started.wait(process, lambda: len(started.notes("up")) == 4)
        ups = started.notes("up")
        # where pages and players know it, and told to go on with what was kept
        assert len({port for _, port, _ in ups}) == 1
        assert [kept for *_, kept in ups] == ["none", "r", "r", "r"]
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=30)
        assert process.returncode == 130
    assert len(started.notes("start")) == 1
    assert started.notes("end") == [[{"run": "r"}]]
    assert not any(alive(pid) for pid, *_ in ups)
    assert "(3 times now)" in said and "heartbeat.json" in said
    assert len(said.splitlines()) < 60


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 stands for the network's address")
def test_other_machines_of_the_network_reach_it_and_it_is_looked_after_as_ever(started):
    """Also where this computer has another address when ComfyUI is started again."""
    for package in ("trustme", "segno"):
        pytest.importorskip(package)
    process = started.begin("--lan")
    with CONSOLE.ended(process):
        for i, host in enumerate(["127.0.0.2", "127.0.0.3"], 1):
            ups = started.wait(process, lambda n=i: len(started.notes("up")) == n
                               and started.notes("up"))  # fmt: skip
            started.wait(process, lambda: started.notes("answered"))
            time.sleep(0.7)  # until it is looked after
            made = max(started.here.parent.rglob("client.pem"), key=os.path.getmtime)
            context = ssl.create_default_context(cafile=str(made))
            url = f"https://{host}:{ups[-1][1]}/livediffusion/runs"
            with urllib.request.urlopen(url, timeout=10, context=context) as reply:
                assert json.load(reply) == {"runs": [{"run": "r"}]}
            os.kill(ups[-1][0], signal.SIGKILL if i == 1 else 0)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=30)
        assert process.returncode == 130
    assert len(started.notes("start")) == 1 and started.notes("end") == [[{"run": "r"}]]
    words = " ".join(said.split())
    assert "display.json runs at https://localhost:" in words and "https://127.0.0.3:" in words
    assert "warns once" in words and "use this ComfyUI now" in words
    assert "heartbeat.json" in words and "code to scan" in words and "Press Live" not in words


def test_a_restart_does_not_wait_for_a_network(monkeypatch, tmp_path):
    away = mock.Mock(side_effect=CONSOLE.Stop("no network"))
    monkeypatch.setattr(UNATTENDED.lan, "prepared", away)
    before = UNATTENDED.lan.Lan("10.0.0.7", *[tmp_path] * 3)
    assert UNATTENDED._prepared(tmp_path, before) is before


def test_without_a_network_it_is_said_before_comfyui_starts(monkeypatch, tmp_path):
    for name in ("find_comfyui", "environment"):
        monkeypatch.setattr(UNATTENDED.setup, name, lambda *_, **__: tmp_path)
    monkeypatch.setattr(UNATTENDED.lan, "own_address", lambda: None)
    monkeypatch.setattr(UNATTENDED, "_workflow", lambda *_: b"")
    monkeypatch.setattr(UNATTENDED, "server", None)
    with pytest.raises(CONSOLE.Stop, match="--lan: this computer is in no network"):
        UNATTENDED.live("none", ["--unattended", "w.json", "--lan"], ())


def test_it_ends_when_the_run_has_ended(started):
    process = started.begin()
    with CONSOLE.ended(process):
        started.wait(process, lambda: started.notes("answered"))
        started.runs.unlink()
        (started.here / "run").unlink()
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "the live run has ended" in said
    assert not alive(started.notes("up")[0][0])


def test_a_stop_is_on_disk_and_answered_before_comfyui_is_ended(started):
    (started.here / "slow").touch()
    process = started.begin()
    with CONSOLE.ended(process):
        started.wait(process, lambda: started.notes("answered"))
        (_, port, _) = started.notes("up")[0]
        time.sleep(0.5)  # until it is looked after
        url = f"http://127.0.0.1:{port}/livediffusion/end"
        asked = urllib.request.Request(url, b'{"run": "r"}')
        with urllib.request.urlopen(asked, timeout=20) as reply:
            assert json.load(reply) == {"run": "r"}
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "the live run has ended" in said
    assert started.notes("written") == [[]] and started.notes("answered")[-1] == ["end"]
    assert not alive(started.notes("up")[0][0])


def test_what_cannot_be_written_down_is_not_waited_for_without_end(started):
    process = started.begin()
    with CONSOLE.ended(process):
        started.wait(process, lambda: started.notes("answered"))
        # the run is over, and the file goes on to have it
        (started.here / "run").unlink()
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "still has the run" in said


@pytest.mark.parametrize("answer", ["HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", "none\r\n"])
def test_a_comfyui_that_ends_in_the_middle_of_its_answer_is_one_that_does_not_answer(answer):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def half():
            with listening.accept()[0] as asked:
                asked.recv(4096)
                asked.sendall(answer.encode())

        thread = threading.Thread(target=half)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(OSError):
            UNATTENDED._ComfyUI.at(url, None).runs()
        thread.join()


class Clock:
    """In place of `time`: it goes on when somebody waits. Each look takes one of `seconds`."""

    def __init__(self, seconds):
        self.now, self.seconds = 0.0, iter(seconds)

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def looked(self):
        self.now += next(self.seconds)
        raise TimeoutError("timed out")


@pytest.mark.parametrize("each", [0.0, 0.5, 10.0])
def test_a_comfyui_that_hangs_is_given_up_after_so_many_seconds_however_a_look_fails(
    monkeypatch, each
):
    """Refused at once, or taken by a process that answers nothing more until the look is over."""
    clock, alive_ = Clock(itertools.repeat(each)), mock.Mock(poll=lambda: None)
    monkeypatch.setattr(UNATTENDED, "time", clock)
    assert UNATTENDED._watched(mock.Mock(runs=clock.looked), alive_, "r") is False
    assert 300 <= clock.now <= 300 + each + 1
    # as docs/live.md says
    assert UNATTENDED._UNANSWERED == 5 * 60


def test_a_machine_that_slept_is_no_comfyui_that_hangs(monkeypatch):
    clock, looks = Clock([8 * 3600.0, 8 * 3600.0]), []

    def looked():
        looks.append(1)
        return {"r"} if len(looks) > 2 else clock.looked()

    states = iter([None] * 4 + [0])
    monkeypatch.setattr(UNATTENDED, "time", clock)
    UNATTENDED._watched(mock.Mock(runs=looked), mock.Mock(poll=lambda: next(states)), "r")
    assert len(looks) == 4


def test_what_comfyui_refuses_is_said_in_its_words(started):
    (started.here / "refuse").touch()
    process = started.begin()
    with CONSOLE.ended(process):
        _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert said.splitlines() == [
        "run.py: display.json: file: there is none.",
        "node 1 (LiveCamera): file: there is none.",
    ]


def test_what_is_no_workflow_is_refused_before_anything_starts(tmp_path):
    other = tmp_path / "other.json"
    for text in ("[]", "{", '{"1": 5}', '{"nodes": 3}'):
        other.write_text(text, encoding="utf-8")
        with pytest.raises(CONSOLE.Stop, match=r"other\.json"):
            UNATTENDED.live("none", ["--unattended", str(other)], ())
    with pytest.raises(CONSOLE.Stop, match="cannot be read"):
        UNATTENDED.live("none", ["--unattended", str(tmp_path / "nothing.json")], ())
    with pytest.raises(CONSOLE.Stop, match="name the workflow"):
        UNATTENDED.live("none", ["--unattended"], ())


def test_a_saved_workflow_is_made_into_its_prompt(tmp_path):
    """As the page saves it; what its nodes are comes from ComfyUI."""
    saved = {
        "id": "w", "version": 0.4, "last_node_id": 2, "last_link_id": 1, "links": [],
        "nodes": [{"id": 7, "type": "Some", "pos": [0, 0], "size": [9, 9], "mode": 0, "flags": {},
                   "order": 0, "inputs": [], "outputs": [], "properties": {},
                   "widgets_values": ["hello"]}],
    }  # fmt: skip
    info = {"Some": {"input": {"required": {"text": ["STRING", {}]}}, "output": [],
                     "output_node": True, "display_name": "Some"}}  # fmt: skip
    path = tmp_path / "saved.json"
    path.write_text(json.dumps(saved), encoding="utf-8")
    made = json.loads(UNATTENDED._workflow(path, info=json.dumps(info).encode()))
    assert made["workflow"]["id"] == "w"
    assert made["prompt"]["7"]["inputs"] == {"text": "hello"}
