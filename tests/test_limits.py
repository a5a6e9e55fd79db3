"""That no test takes for ever, whatever it waits for, nor stops the machine for the others."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import filming
import pytest

HERE = pathlib.Path(__file__).parent
CHROMIUM = os.environ.get("LIVEDIFFUSION_CHROMIUM") or shutil.which("chromium")
# tests that wait for what never comes, and one after each that is well
HANGS = """
import asyncio, itertools, os, pathlib, socket, subprocess, sys, threading, time, urllib.request
import pytest

never = threading.Event()

def test_sleeps():
    time.sleep(1000)

def test_a_thread_that_does_not_end():
    threading.Thread(target=never.wait, daemon=True, name="stuck").start()
    next(t for t in threading.enumerate() if t.name == "stuck").join()

def test_a_server_that_does_not_answer():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        urllib.request.urlopen(f"http://127.0.0.1:{silent.getsockname()[1]}")

def test_a_process_that_does_not_end():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        try:
            process.wait()
        finally:
            process.kill()

def test_an_event_loop_whose_threads_do_not_end():
    async def work():
        asyncio.get_running_loop().run_in_executor(None, never.wait, 3)
        await asyncio.Event().wait()
    asyncio.run(work())

def test_what_catches_everything():
    while True:
        try:
            time.sleep(1000)
        except Exception:
            pass

@pytest.fixture
def slow():
    yield
    never.wait()

def test_a_teardown(slow):
    pass

def test_is_well():
    pass
"""
PAGE = """
import pytest
from playwright.sync_api import sync_playwright

# what takes long on a busy machine has no limit here
browser = sync_playwright().start().chromium.launch(
    executable_path=CHROMIUM, args=["--no-sandbox"]
)
pages = [browser.new_context().new_page() for _ in range(3)]

@pytest.mark.parametrize("what", ["new Promise(() => {})", "(() => { for (;;) {} })()"])
def test_a_page_that_does_not_answer(what):
    pages.pop().evaluate(what)

def test_is_well():
    assert pages.pop().evaluate("1 + 1") == 2
"""
# a thread that runs no Python: nothing can fail there
DEAF = """
import itertools

def test_is_well():
    pass

def test_runs_no_python():
    any(itertools.repeat(False))
"""


PRIORITY = """
import os

def test_takes_real_time():
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

def test_is_well():
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
"""

REGISTRY = """
import sys
import types

import pytest

nodes = sys.modules["nodes"] = types.SimpleNamespace(NODE_CLASS_MAPPINGS={})

def node():
    return type("Left", (), {"__module__": "limits"})

@pytest.fixture(scope="module")
def for_the_file():
    nodes.NODE_CLASS_MAPPINGS["Taken away"] = node()
    yield
    del nodes.NODE_CLASS_MAPPINGS["Taken away"]

def test_has_one_for_its_file(for_the_file):
    pass

def test_leaves_a_node(for_the_file):
    nodes.NODE_CLASS_MAPPINGS["Left"] = node()
"""


def outcome(tmp_path, source, seconds):
    """pytest's exit code on a file, what it printed, and what went how."""
    path = tmp_path / "test_hangs.py"
    path.write_text(source, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(HERE), "LIVEDIFFUSION_TEST_SECONDS": str(seconds)}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "limits", "-p", "no:cacheprovider", "-p",
         "no:xdist", "-p", "no:hypothesispytest", "-rA", "--tb=line", "--rootdir", str(tmp_path),
         str(path)],
        capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    said = ran.stdout + ran.stderr
    ends = re.findall(r"^(PASSED|FAILED|ERROR) \S+::(\S+?)(?:\[| |$)", ran.stdout, re.MULTILINE)
    return ran, said, {(how, name) for how, name in ends}


def test_what_waits_for_ever_fails_and_the_next_goes_on(tmp_path):
    _, said, ends = outcome(tmp_path, HANGS, 0.5)
    names = set(re.findall(r"^def (test_\w+)", HANGS, re.MULTILINE))
    well = {"test_a_teardown", "test_is_well"}
    assert ends == (
        {("FAILED", name) for name in names - well}
        | {("PASSED", name) for name in well}
        | {("ERROR", "test_a_teardown")}
    )
    # who waits, and for whom
    assert "its call took longer than 0.5 s" in said and "its teardown took longer" in said
    assert "in test_a_thread_that_does_not_end" in said and said.count("in wait") >= 2


def test_a_page_that_does_not_answer_fails_and_the_next_goes_on(tmp_path):
    pytest.importorskip("playwright", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here (LIVEDIFFUSION_CHROMIUM)")
    source = PAGE.replace("CHROMIUM", repr(CHROMIUM))
    _, said, ends = outcome(tmp_path, source, 3)
    assert ends == {("FAILED", "test_a_page_that_does_not_answer"), ("PASSED", "test_is_well")}
    assert said.count("Current thread") == 2


@pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="no such policies here")
def test_who_changes_the_scheduling_of_its_thread_fails(tmp_path):
    _, said, ends = outcome(tmp_path, PRIORITY, 60)
    assert ends == {
        ("PASSED", "test_takes_real_time"), ("ERROR", "test_takes_real_time"),
        ("PASSED", "test_is_well"),
    }  # fmt: skip
    assert "left its thread with the scheduling policy" in said


def test_who_leaves_a_node_of_its_own_fails(tmp_path):
    _, said, ends = outcome(tmp_path, REGISTRY, 60)
    assert ends == {
        ("PASSED", "test_has_one_for_its_file"), ("PASSED", "test_leaves_a_node"),
        ("ERROR", "test_leaves_a_node"),
    }  # fmt: skip
    assert "its file left nodes of its own in ComfyUI's registry, for all others: ['Left']" in said


def test_a_film_of_any_codec_leaves_its_writer_as_it_was(tmp_path):
    """SVT-AV1 takes real-time priority where it may, as for root."""
    for codec in ("libsvtav1", "libx265", "libx264"):
        filming.film(tmp_path / f"{codec}.mkv", codec, size=(128, 96))
    if hasattr(os, "sched_getscheduler"):
        assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_what_runs_no_python_ends_the_process(tmp_path):
    ran, said, _ = outcome(tmp_path, DEAF, 0.5)
    assert ran.returncode == 1 and "Timeout (" in said and "in test_runs_no_python" in said
