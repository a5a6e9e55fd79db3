"""Stages of run.py's tests: they end in time, and so does what they started."""

import os
import re
import subprocess
import sys
import time

import pytest
from clock import Limit
from serving import launch, load_run

STAGES = launch("stages")
# starts a process that no group and no parent would end with it, and says its number
PARENT = """
import pathlib, subprocess, sys, time
left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"],
                        start_new_session=True, stdout=subprocess.DEVNULL)
print("LEFT", left.pid, flush=True)
for path in sys.argv[1:]:
    pathlib.Path(path).touch()
"""
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="there is no /proc here")


@pytest.fixture
def left(monkeypatch):
    monkeypatch.setattr(STAGES, "_GRACE", 0.5)

    def numbers(said):
        return [int(pid) for pid in re.findall(r"LEFT (\d+)", said)]

    return numbers


def runs(pid):
    """Whether a process is there and no zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("deaf", ["", DEAF], ids=["", "deaf"])
def test_a_stage_that_hangs_is_ended_with_all_it_started(left, capfd, tmp_path, monkeypatch, deaf):
    begun, wait = tmp_path / "begun", subprocess.Popen.wait

    def wait_from_then(self, timeout=None):
        """Its time counts once it has begun: a busy machine takes seconds to start a Python."""
        limit = Limit(30)
        while not begun.exists() and not limit.over:
            time.sleep(0.02)
        return wait(self, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_from_then)
    stages = STAGES.Stages(each=0.5, all=200)
    hangs = [sys.executable, "-c", deaf + PARENT + "time.sleep(300)", str(begun)]
    assert stages.run("the first", hangs) == STAGES.OVERDUE
    said = capfd.readouterr().out
    assert "the first: ended, it took longer" in said
    (pid,) = left(said)
    # it was told to end, and does so as soon as the machine lets it
    limit = Limit(10)
    while runs(pid) and not limit.over:
        time.sleep(0.02)
    assert not runs(pid)
    # and the next one begins
    stages = STAGES.Stages(each=100, all=100)
    assert stages.run("the second", [sys.executable, "-c", "raise SystemExit(3)"]) == 3


def test_what_a_stage_leaves_running_is_ended_and_named(left, capfd):
    assert STAGES.Stages(100, 100).run("it", [sys.executable, "-c", PARENT]) == 0
    said = capfd.readouterr().out
    (pid,) = left(said)
    assert not runs(pid) and re.search(rf"it: ended what it left running: \S+ \({pid}\)", said)


def test_all_together_end_in_time(left, capfd):
    stages = STAGES.Stages(each=100, all=1)
    assert stages.run("one", [sys.executable, "-c", "import time; time.sleep(300)"]) == 124
    assert stages.run("two", [sys.executable, "-c", "print('never')"]) == 124
    said = capfd.readouterr().out
    assert "two: left out" in said and "never" not in said


def test_ctrl_c_ends_a_stage_too(left, capfd, monkeypatch):
    def interrupted(self, timeout=None):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        STAGES.Stages(100, 100).run("it", [sys.executable, "-c", PARENT + "time.sleep(300)"])
    assert not any(map(runs, left(capfd.readouterr().out)))


@pytest.mark.parametrize("told", ["", "1"], ids=["", "told to keep nothing"])
def test_what_is_compiled_is_kept_until_the_end(tmp_path, monkeypatch, told):
    (tmp_path / "part.py").write_text("", encoding="utf-8")
    look = "import os, part; print(os.path.exists(part.__cached__), part.__cached__)"
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", told)
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    with STAGES.compiled_once() as env:
        said = subprocess.run(
            [sys.executable, "-c", look], cwd=tmp_path, env=env, text=True, capture_output=True
        ).stdout.split()
        assert said[0] == "True"
    # beside the source where Python may, else nowhere once it is over
    assert os.path.exists(said[1]) == (not told)
    assert (tmp_path / "__pycache__").exists() == (not told)


def test_the_suite_ends_before_an_hour_and_a_half():
    run = load_run()
    assert run.STAGE < run.STAGES <= 70
