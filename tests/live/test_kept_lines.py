"""What is said of a kept run that fails again and again, and when it is tried again."""

import asyncio
import errno
import json
import types

import pytest
from clock import Limit
from livediffusion.live import keeper, kept

pytestmark = pytest.mark.comfy


class TestLines:
    @pytest.fixture
    def lines(self):
        self.now = 1000.0
        return kept.Lines(lambda: self.now)

    def test_the_same_failure_is_one_line_and_its_count(self, lines):
        said = [lines.of(f"the model at 0x{i:x} is missing, try {i}") for i in range(1, 1001)]
        told = [line for line in said if line is not None]
        assert len(told) == 4
        assert told[0].endswith("try 1") and told[-1].endswith("(1000 times now)")

    def test_others_are_so_many_an_hour(self, lines):
        def words(i):
            return "".join(chr(97 + int(d)) for d in str(i))

        assert sum(lines.of(words(i)) is not None for i in range(500)) == 20
        self.now += 3601
        assert lines.of("something else") is not None

    def test_nothing_in_a_line_is_obeyed_by_a_terminal(self, lines):
        line = lines.of("a\nb\x1b[31m" + "c" * 1000)
        assert "\n" not in line and "\x1b" not in line and len(line) < 420


def test_it_is_well_again_after_ten_minutes_only():
    one = kept.Kept("r", "n", {}, None, 0.0, "s")
    pauses = []
    for now in range(9):
        one.failed("no model 7", "4", float(now))
        pauses.append(one.due - now)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60] and (one.same, one.failures) == (9, 9)
    one.alive(100.0)
    one.alive(699.0)
    assert one.failures == 9
    one.alive(700.0)
    assert (one.failures, one.reason) == (0, None)
    one.failed("another", None, 800.0)
    assert one.due == 801.0 and one.same == 1


class Sessions:
    """Runs that cannot be started."""

    def __init__(self, reason):
        self.reason, self.tries = reason, 0

    async def start(self, *what):
        self.tries += 1
        raise RuntimeError(self.reason)


def wrong(kind):
    return {
        "disk": OSError(errno.ENOSPC, "No space left on device"), "other": KeyError("a bug"),
        "text": UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
        "threads": RuntimeError("can't start new thread"),
    }[kind]  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    for name, value in {"_LOOK": 0.001, "_BEAT": 0.0, "_SAVE": 0.0}.items():
        monkeypatch.setattr(keeper, name, value)
    monkeypatch.setattr(kept._Growing, "FIRST", 0.001)
    monkeypatch.setattr(kept._Growing, "MOST", 0.002)


async def looked_after(one, done):
    """A run of a keeper, until something is done; the keeper's task lives."""
    one._add(kept.Kept("r", "n", {}, None, 0.0, "s"))
    limit = Limit(20)
    while not done():
        assert not one._task.done() and not limit.over, one._task
        await asyncio.sleep(0.001)
    one._runs.clear()
    await one._task


@pytest.mark.parametrize("kind", ["disk", "text", "threads", "other"])
def test_whatever_a_beat_raises_runs_are_looked_after(quick, caplog, kind):
    class Files:
        beats = 0

        def beat(self, told):
            self.beats += 1
            raise wrong(kind)

    sessions, files = Sessions("no model"), Files()
    one = keeper.Keeper(sessions, None, files)
    asyncio.run(looked_after(one, lambda: sessions.tries > 5 and files.beats > 5))
    assert caplog.text.count("heartbeat file cannot be written") == 1


def test_a_reason_with_a_name_that_is_no_unicode_is_written(quick, tmp_path):
    """As Python has names of files, and a heart that stands still has ComfyUI begun anew."""
    sessions = Sessions("there is no a\udcff.gif")
    one = keeper.Keeper(sessions, None, kept.Files(lambda: str(tmp_path)))
    path, seen = tmp_path / "livediffusion" / "heartbeat.json", []

    def told():
        if path.exists() and (runs := json.loads(path.read_text("utf-8"))["runs"]):
            seen.append(runs[0]["reason"])
        return seen and seen[-1]

    asyncio.run(looked_after(one, told))
    assert seen[-1] == "there is no a\\udcff.gif"


@pytest.mark.parametrize("kind", ["disk", "text", "threads"])
@pytest.mark.parametrize("again", [False, True], ids=["same session", "begun again"])
def test_an_edit_that_could_not_be_written_is_once_it_can_be(quick, caplog, kind, again):
    class Files:
        tries, has = 0, None

        def write(self, runs):
            self.tries += 1
            if self.tries < 30:
                raise wrong(kind)
            self.has = runs

    def session(version, text):
        graph = {"1": {"class_type": "A", "inputs": {"text": text}}}
        split = types.SimpleNamespace(graph=graph, workflow=None)
        shared = types.SimpleNamespace(graphs=(split,))
        return types.SimpleNamespace(version=version, split=split, shared=shared)

    async def work():
        one = kept.Kept("r", "n", {}, None, 0.0, "s")
        looking._runs["r"] = one
        for i in range(40):
            at = session(1, "edited") if again and i > 3 else session(2, "edited")
            if again and i == 4:
                one.version = 1  # as the keeper has it once another session has begun
            await looking._follow(one, at, float(i))

    files = Files()
    looking = keeper.Keeper(None, None, files)
    asyncio.run(work())
    assert files.has[0]["graph"]["1"]["inputs"]["text"] == "edited"
    assert files.tries == 30  # and then no more
    assert caplog.text.count("could not be written down") == 2  # the first and the tenth
