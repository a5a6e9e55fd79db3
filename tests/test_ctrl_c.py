"""Ctrl+C is for run.py, which ends in order what it started and what goes on until then."""

import os
import signal
import subprocess
import sys
from unittest import mock

import pytest
from serving import launch

CONSOLE, UNATTENDED, HOUSE = launch("console"), launch("unattended"), launch("house")


@pytest.fixture(params=["nt", "posix"])
def apart(monkeypatch, request):
    """What keeps Ctrl+C from a process on this system: a group, or a session, of its own."""
    monkeypatch.setattr(CONSOLE, "os", mock.Mock(spec=["name"]))
    CONSOLE.os.name = request.param
    monkeypatch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 512, raising=False)
    windows = {"creationflags": 512}
    return windows if request.param == "nt" else {"start_new_session": True}


@pytest.fixture
def told(monkeypatch, tmp_path):
    """What is told of the process that a command keeps; none is started."""
    told = {}

    def started(*_, **how):
        told.update(how)
        raise CONSOLE.Stop("started")

    for module in (UNATTENDED, HOUSE):
        for name in ("find_comfyui", "environment"):
            monkeypatch.setattr(module.setup, name, lambda *_, **__: tmp_path)
    monkeypatch.setattr(UNATTENDED, "_workflow", lambda *_: b"")
    monkeypatch.setattr(UNATTENDED, "server", started)
    for name in ("environment", "has_gpu", "link_pack", "sweep"):
        monkeypatch.setattr(HOUSE, name, lambda *_: tmp_path)
    monkeypatch.setattr(HOUSE.setup, "CACHE", tmp_path)
    checked = mock.Mock(return_value=mock.Mock(returncode=0))
    monkeypatch.setattr(HOUSE, "subprocess", mock.Mock(run=checked, Popen=started))
    return told


def test_what_a_command_keeps_running_does_not_hear_it(apart, told):
    for begin in (
        lambda: UNATTENDED.live("none", ["--unattended", "w.json"], ()),
        lambda: HOUSE.serve("none", ["w.json"]),
    ):
        told.clear()
        with pytest.raises(CONSOLE.Stop, match="started"):
            begin()
        assert apart.items() <= told.items()
        assert len({"creationflags", "start_new_session"} & {*told}) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no groups that a signal is for")
def test_a_whole_terminal_that_hears_it_leaves_it_running(tmp_path):
    """As a terminal does it: the signal goes to the group of the command."""
    script = (
        "import subprocess, sys; from serving import launch; console = launch('console');"
        "its = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
        " **console.apart()); print(its.pid, flush=True); its.wait()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env={**os.environ, "PYTHONPATH": os.path.dirname(__file__)},
        preexec_fn=lambda: (os.setpgid(0, 0), signal.signal(signal.SIGINT, signal.SIG_DFL)),
    )  # fmt: skip
    pid = int(process.stdout.readline())
    try:
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(20) != 0
        os.kill(pid, 0)
    finally:
        os.kill(pid, signal.SIGKILL)
        process.stdout.close()
