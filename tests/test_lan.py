"""run.py live --lan: a certificate for this computer, and a server that phones may use."""

import os
import pathlib
import signal
import socket
import ssl
import stat
import subprocess
import sys
import urllib.request

import pytest
from serving import launch

pytest.importorskip("trustme", reason="trustme is not installed")
pytest.importorskip("segno", reason="segno is not installed")

ROOT = pathlib.Path(__file__).resolve().parents[1]
PYTHON = pathlib.Path(sys.executable)
# ComfyUI's part of it: an address, a port and TLS
STAND_IN = """
import http.server, pathlib, ssl, sys
named = {name: sys.argv[i + 1] for i, name in enumerate(sys.argv) if name.startswith("--")
         and i + 1 < len(sys.argv)}
pathlib.Path(__file__).with_name("options").write_text(" ".join(sys.argv[1:]))
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
server = http.server.HTTPServer((named["--listen"], int(named["--port"])), Answer)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(named["--tls-certfile"], named["--tls-keyfile"])
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""
STARTED = """
import sys
from unittest import mock
from serving import launch, load_run
run = load_run()
run.setup.environment = lambda comfyui, test: sys.executable
launch("server").has_gpu = lambda python: False
launch("lan").own_address = lambda: "127.0.0.2"
sys.argv = ["run.py", *sys.argv[1:]]
sys.exit(run.main())
"""


@pytest.fixture
def lan(tmp_path, monkeypatch):
    made = launch("lan")
    monkeypatch.setattr(made.setup, "CACHE", tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    return made


def test_the_certificate_is_for_this_computer_and_kept(lan):
    place = lan.made(PYTHON, ["10.0.0.7", "localhost", "studio.local"])
    key = place / "server.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 or os.name == "nt"
    before = key.read_bytes()
    assert lan.made(PYTHON, ["10.0.0.7", "localhost", "studio.local"]) == place
    assert key.read_bytes() == before
    # another address, another certificate; an old one is made anew before it is over
    assert lan.made(PYTHON, ["10.0.0.8", "localhost", "studio.local"]) != place
    old = (place / "server.pem").stat().st_mtime - (lan.RENEWED + 1) * 86400
    os.utime(place / "server.pem", (old, old))
    assert lan.made(PYTHON, ["10.0.0.7", "localhost", "studio.local"]) == place
    assert key.read_bytes() != before


def test_names_that_a_certificate_can_have(lan, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "studio.home")
    assert lan.names("10.0.0.7") == ["10.0.0.7", "127.0.0.1", "localhost", "studio.home",
                                     "studio.local"]  # fmt: skip
    monkeypatch.setattr(socket, "gethostname", lambda: "my_machine")
    assert lan.names("10.0.0.7") == ["10.0.0.7", "127.0.0.1", "localhost"]


def test_without_a_network_it_says_so(lan, monkeypatch):
    monkeypatch.setattr(lan, "own_address", lambda: None)
    with pytest.raises(launch("console").Stop, match="--lan: this computer is in no network"):
        lan.prepared(PYTHON)


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 stands for the network's address")
def test_it_starts_a_server_that_a_phone_trusts_and_says_what_it_asks(tmp_path):
    here = tmp_path / "comfyui"
    here.mkdir()
    (here / "main.py").write_text(STAND_IN, encoding="utf-8")
    (here / "requirements.txt").write_text("torch\n", encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "COMFYUI_PATH": str(here),
           "HOME": str(tmp_path)}  # fmt: skip
    command = [sys.executable, "-c", STARTED, "live", "--lan", "--port", "0", "--no-browser"]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    said = []
    with launch("console").ended(process):
        for line in process.stdout:
            said.append(line.strip())
            if "Ctrl+C here ends it" in line:
                break
        text = " ".join(said)
        mine, theirs = (one.partition("?")[0] for one in said if one.startswith("https://"))
        assert mine.startswith("https://localhost:") and theirs.startswith("https://127.0.0.2:")
        assert "warns once" in text and "source phone" in text and "use this ComfyUI" in text
        (authority,) = tmp_path.rglob("client.pem")
        assert str(authority) in text
        context = ssl.create_default_context(cafile=str(authority))
        for place in (mine, theirs):
            with urllib.request.urlopen(place, timeout=10, context=context) as reply:
                assert reply.status == 200
        # and who was told nothing is warned
        with pytest.raises(OSError, match="certificate verify failed"):
            urllib.request.urlopen(mine, timeout=10, context=ssl.create_default_context())
        options = (here / "options").read_text()
        assert options.rindex("--listen 0.0.0.0") > options.index("--listen 127.0.0.1")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
