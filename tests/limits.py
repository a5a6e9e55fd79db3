"""A plugin for pytest: no test takes for ever, and none leaves a process that stops the machine.

What a test does before, in and after its body has a limit each. When that is over, the stacks of
all threads are printed and the test fails; where its thread runs no Python that could fail, the
process ends a while later, after the stacks once more.

A test that leaves its thread with another scheduling policy than it found fails as well: what has
real-time priority, and all that it starts from then on, goes before everything else. So does the
last test of a file that leaves nodes of its own in ComfyUI's registry, which others walk.

LIVEDIFFUSION_TEST_SECONDS is the limit in seconds; 0 for none.
"""

import faulthandler
import os
import pathlib
import signal
import sys
import threading
import time

import pytest

_HERE = pathlib.Path(__file__).parent
SECONDS = float(os.environ.get("LIVEDIFFUSION_TEST_SECONDS", "300"))
_AGAIN = 0.25  # of the limit: how often a test is told that what it waits for is over
# what is still not over then ends the process: of the limit, and seconds at the least
_LEFT, _LEAST = 2.0, 5.0

count = 0  # tests that took too long so far
_told = None  # where what is printed is seen, whatever pytest catches


def pytest_configure(config):
    global _told
    if _told is None:
        _told = os.fdopen(os.dup(sys.__stderr__.fileno()), "w", encoding="utf-8")


def _limited(item, part):
    """Run a part of a test, for so long and no longer."""
    alarm = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not SECONDS or not alarm:
        return (yield)
    began, over = time.monotonic(), []

    def fail(number, frame):
        global count
        words = f"{item.nodeid}: its {part} took longer than {SECONDS:g} s"
        if not over:
            over.append(True)
            count += 1
            print(f"\n{words}; now at {time.monotonic() - began:.0f} s in:", file=_told, flush=True)
            faulthandler.dump_traceback(_told, all_threads=True)
        pytest.fail(words, pytrace=True)

    before = signal.signal(signal.SIGALRM, fail)
    faulthandler.dump_traceback_later(max(_LEFT * SECONDS, _LEAST), exit=True, file=_told)
    # again, if the first was caught or what cleans up after it waits, too
    signal.setitimer(signal.ITIMER_REAL, SECONDS, _AGAIN * SECONDS)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    return (yield from _limited(item, "setup"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from _limited(item, "call"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    ended = yield from _limited(item, "teardown")
    if (policy := _scheduling()) != _ordinary:
        os.sched_setscheduler(0, _ordinary[0], os.sched_param(_ordinary[1]))
        pytest.fail(f"left its thread with the scheduling policy and priority {policy}")
    # a fixture of the whole file may have some there until its end
    if (nextitem is None or nextitem.path != item.path) and (left := _registered()):
        for name in left:
            del sys.modules["nodes"].NODE_CLASS_MAPPINGS[name]
        pytest.fail(f"its file left nodes of its own in ComfyUI's registry, for all others: {left}")
    return ended


def _registered():
    """Ids of nodes that a test or a benchmark has made, and that are in ComfyUI's registry."""
    known = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})
    files = {
        name: getattr(sys.modules.get(node.__module__), "__file__", None)
        for name, node in known.items()
    }
    ours = _HERE, _HERE.parent / "benchmarks"
    return [
        name for name, file in files.items()
        if file and any(folder in pathlib.Path(file).parents for folder in ours)
    ]  # fmt: skip


def _scheduling():
    """Policy and priority of this thread, where there are such."""
    if not hasattr(os, "sched_getscheduler"):
        return None
    return os.sched_getscheduler(0), os.sched_getparam(0).sched_priority


_ordinary = _scheduling()
