"""Keepers: ComfyUI is forked, adopted, forked anew, and at the end nothing is left."""

import asyncio
import json
import os
import pathlib
import signal
import stat
import subprocess
import sys
import time

import pytest
from gating import until
from keepers import Small, alive, comfyui, folder, holder, left
from serving import ROOT, served

keeping = served("comfyui.keeping")
plain = served("comfyui.plain")
pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(sys.platform != "linux", reason="keepers are Linux's"),
]


def run(test, place, **more):
    """Run a coroutine function with a started ComfyUI; nothing of it is left."""

    async def whole():
        ours = Small(place, **more)
        try:
            await ours.start()
            await test(ours)
        finally:
            await ours.stop()
        await until(lambda: not left(ours.mark))
        assert list(ours.home.iterdir()) == []

    asyncio.run(whole())


def key_of(ours):
    return (ours.log.parent / "key").read_text()


async def dropped(reader):
    """Whether the keeper closes a connection, and what it said before."""
    return await asyncio.wait_for(reader.read(), 10)


async def reached(ours):
    here = os.open(ours.log.parent, os.O_RDONLY)
    try:
        return await asyncio.open_unix_connection(f"/proc/self/fd/{here}/s")
    finally:
        os.close(here)


def test_comfyui_is_a_fork_of_what_has_imported_for_it(tmp_path):
    async def test(ours):
        seen = await ours.seen()
        keeper = ours._held.first["keeper"]
        assert seen["pid"] == ours.pid != keeper
        # imported once, by the keeper, with the allocator as ComfyUI sets it
        assert seen["heavy"] == [keeper, "backend:cudaMallocAsync", "1"]
        # and in an environment as if nothing had been before
        assert seen["allocator"] == "backend:cudaMallocAsync"
        assert seen["telemetry"] is None
        assert (seen["name"], seen["path"]) == ("__main__", str(ours.folder))
        assert seen["folder"] == str(ours.folder)
        assert seen["argv"][0] == str(ours.folder / "main.py")
        assert {"--cpu", "--cuda-malloc", "127.0.0.1", "sqlite:///:memory:"} <= {*seen["argv"]}
        assert "--disable-all-custom-nodes" not in seen["argv"]
        assert seen["argv"].count("--disable-api-nodes") == 1
        assert ours.memory()["device"] == "cpu" and ours.memory()["used"] > 0
        pack = ours.base / "custom_nodes" / "ComfyUI-LiveDiffusion"
        assert pack.resolve() == ROOT

    run(test, tmp_path, options=("--cpu", "--cuda-malloc"))


def test_a_killed_comfyui_is_there_again_and_what_it_started_is_not(tmp_path):
    async def test(ours):
        changes = []
        ours.changed.append(lambda: changes.append(ours.alive))
        for turn in range(4):
            child = (await ours.seen())["child"]
            os.kill(ours.pid, signal.SIGKILL)
            await until(lambda: not ours.alive)
            await until(lambda: not alive(child))  # noqa: B023
            assert await ours.ready(10)
            assert (ours.restarts, ours.generation) == (turn + 1, turn + 2)
        assert changes.count(True) >= 4 and changes.count(False) >= 4
        ours.again()
        await until(lambda: ours.restarts == 5)
        assert await ours.ready(10)

    run(test, tmp_path)


def test_one_that_hangs_is_killed(tmp_path, monkeypatch):
    for name, seconds in (("_ASKED", 0.1), ("_PATIENCE", 0.2), ("_SILENT", 0.5)):
        monkeypatch.setattr(comfyui, name, seconds)

    async def test(ours):
        os.kill(ours.pid, signal.SIGSTOP)
        await until(lambda: ours.restarts == 1, 10)
        assert await ours.ready(10)

    run(test, tmp_path)


def test_one_that_does_not_start_says_why(tmp_path):
    ours = Small(tmp_path, CRASH="1")

    async def test():
        with pytest.raises(comfyui.NotStarted, match=r"(?s)died 3 times.*this is why it cannot be"):
            await ours.start()
        await until(lambda: not left(ours.mark))

    asyncio.run(test())
    assert list(ours.home.iterdir()) == []


def test_a_keeper_that_does_not_start_says_why(tmp_path):
    ours = Small(tmp_path)
    ours.python = pathlib.Path("/bin/false")
    with pytest.raises(RuntimeError, match="could not be started"):
        asyncio.run(ours.start())
    assert list(ours.home.iterdir()) == []


def test_a_wait_that_is_cancelled_with_its_event_is_cancelled():
    async def test():
        async def loop():
            while True:
                await plain.within(event, 5)

        event = asyncio.Event()
        waits = asyncio.create_task(loop())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        event.set()
        waits.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(waits, 5)
        assert not await plain.within(asyncio.Event(), 0.01)
        assert await plain.within(event, 0.01)

    asyncio.run(test())


def test_later_and_later_but_not_for_ever():
    waits = [keeping.later(quick) for quick in range(100)]
    assert waits[:3] == [0, 0, 0] and waits == sorted(waits) and waits[3] > 0
    assert waits[-1] == max(waits) <= 60


HOLDER = """
import asyncio, os, pathlib, sys, time
sys.path[:0] = [{tests!r}]
from keepers import Small
async def main():
    ours = Small(pathlib.Path({place!r}), mark={mark!r})
    await ours.start()
    print(ours.pid, flush=True)
    await asyncio.sleep(100)
asyncio.run(main())
"""


def begun(place, mark):
    """A process that holds a ComfyUI; its number."""
    script = HOLDER.format(tests=str(ROOT / "tests"), place=str(place), mark=mark)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


def test_a_replica_that_is_killed_leaves_its_comfyui_to_the_next(tmp_path):
    before, pid = begun(tmp_path, "adopted-by-one-other")
    before.kill()
    before.wait()

    async def test(ours):
        assert ours.adopted and ours.pid == pid and ours.restarts == 0
        # one holder at a time: the others begin their own
        others = [Small(tmp_path, mark=ours.mark) for _ in range(2)]
        assert await asyncio.gather(*(
            holder.adopted(ours.home, ours.log.parent.name.partition("-")[0]) for _ in others
        )) == [None, None]  # fmt: skip
        # one with another device does not have it, either
        ours.let_go()
        other = Small(tmp_path, mark=ours.mark, CUDA_VISIBLE_DEVICES="3")
        await other.start()
        assert not other.adopted and other.pid != pid
        await other.stop()

    run(test, tmp_path, mark="adopted-by-one-other")


def test_of_many_that_come_one_has_it(tmp_path):
    before, _ = begun(tmp_path, "adopted-by-many")
    name = next((tmp_path / "home").iterdir()).name.partition("-")[0]
    before.kill()
    before.wait()

    async def test():
        held = await asyncio.gather(
            *(holder.adopted(tmp_path / "home", name) for _ in range(6))
        )
        assert sum(one is not None for one in held) == 1
        await next(one for one in held if one is not None).end()
        await until(lambda: not left("adopted-by-many"))

    asyncio.run(test())
    assert list((tmp_path / "home").iterdir()) == []


def test_nobody_comes(tmp_path):
    before, _ = begun(tmp_path, "nobody-comes")
    assert len(left("nobody-comes")) >= 3
    before.kill()
    before.wait()
    began = time.monotonic()

    async def test():
        await until(lambda: not left("nobody-comes"))
        await until(lambda: not list((tmp_path / "home").iterdir()))

    asyncio.run(test())
    assert time.monotonic() - began > 0.5


def test_a_keeper_that_is_killed_takes_comfyui_with_it_and_is_replaced(tmp_path):
    async def test(ours):
        before, keeper, place = ours.pid, ours._held.first["keeper"], ours.log.parent
        os.kill(keeper, signal.SIGKILL)
        await until(lambda: not alive(before))
        await until(lambda: ours.pid not in (None, before))
        assert await ours.ready(10)
        assert not place.exists() and ours.log.parent != place
        assert ours.restarts == 1

    run(test, tmp_path)


def test_strangers_are_not_let_in(tmp_path):
    async def test(ours):
        place = ours.log.parent
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        assert stat.S_IMODE((place / "key").stat().st_mode) == 0o600
        for said in (
            b"\n", b"{}\n", b"[]\n", b"null\n", b"\xff\n", b'{"do": "end"}\n',
            b'{"key": 5}\n', b'{"key": ""}\n', b'{"key": "\\ud800"}\n',
            b'{"key": "' + b"0" * 64 + b'"}\n', b"[" * 60000 + b"\n", b"x" * 70000,
        ):  # fmt: skip
            reader, writer = await reached(ours)
            writer.write(said)
            assert await dropped(reader) in (b"", b'{"event": "unknown"}\n')
            writer.close()
        # who has the key, too, while another holds it
        reader, writer = await reached(ours)
        writer.write(json.dumps({"key": key_of(ours)}).encode() + b"\n")
        assert json.loads(await dropped(reader)) == {"event": "busy"}
        writer.close()
        # who says nothing does not stand in the way for long
        silent = [await reached(ours) for _ in range(12)]
        await asyncio.gather(*(dropped(reader) for reader, _ in silent))
        for _, writer in silent:
            writer.close()
        assert ours.alive and ours.restarts == 0
        assert alive(ours._held.first["keeper"])

    run(test, tmp_path)


def test_what_asks_for_a_gpu_is_seen_and_comfyui_is_not_forked_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Small, "imports", ("torch", "asking", "heavy", "not_there"))

    async def test(ours):
        assert (await ours.seen())["heavy"] is None
        said = ours.log.read_text()
        assert "_cuda_getDeviceCount by" in said and "asking.py" in said
        assert "not_there" in said
        first = ours.pid
        os.kill(first, signal.SIGKILL)
        await until(lambda: not ours.alive)
        assert await ours.ready(10)

    run(test, tmp_path)


@pytest.mark.parametrize("options", [(), ("--cpu",)])
def test_cpu_where_there_is_no_gpu(tmp_path, options, monkeypatch):
    async def test(ours):
        assert (await ours.seen())["argv"].count("--cpu") == 1

    run(test, tmp_path, options=options)
    monkeypatch.setattr(Small, "imports", ("torch",))

    async def other(ours):
        assert (await ours.seen())["argv"].count("--cpu") == len(options)

    run(other, tmp_path, options=options)


def test_a_log_has_a_bound(tmp_path, monkeypatch):
    async def test(ours):
        with ours.log.open("ab") as log:
            for i in range(300):
                log.write(b"%d" % i + b"x" * 2**15 + b"\n")
        await until(lambda: 2**21 < ours.log.stat().st_size < 5 * 2**20)
        assert ours.log.read_bytes().endswith(b"299" + b"x" * 2**15 + b"\n")

    run(test, tmp_path)


def test_what_a_killed_keeper_left_is_swept_and_what_lives_is_not(tmp_path):
    async def test(ours):
        left_behind = ours.home / "0123456789abcdef-dead"
        (left_behind / "output").mkdir(parents=True)
        (left_behind / "lock").touch()
        begins = ours.home / "0123456789abcdef-new"
        begins.mkdir()
        holder.sweep(ours.home)
        assert {one.name for one in ours.home.iterdir()} == {ours.log.parent.name, begins.name}
        os.utime(begins, (0, 0))
        holder.sweep(ours.home)
        assert {one.name for one in ours.home.iterdir()} == {ours.log.parent.name}

    run(test, tmp_path)


def test_a_name_that_is_too_long_for_a_socket(tmp_path):
    place = tmp_path / ("long" * 40)
    place.mkdir()

    async def test(ours):
        assert len(str(ours.log)) > 108 and ours.alive

    run(test, place)


def test_without_a_keeper(tmp_path, monkeypatch):
    monkeypatch.setattr(comfyui.sys, "platform", "other")

    async def test(ours):
        assert (await ours.seen())["heavy"] is None and not ours.adopted
        for turn in range(2):
            os.kill(ours.pid, signal.SIGKILL)
            await until(lambda: ours.restarts == turn + 1)  # noqa: B023
            assert await ours.ready(10)

    run(test, tmp_path)


def test_without_a_keeper_it_ends_with_who_started_it(tmp_path):
    code = (
        "import json, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n"
        "print(json.dumps([*sys.argv, child.pid]), flush=True); time.sleep(99)"
    )
    main = folder(tmp_path) / "main.py"
    main.write_text(code, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, str(plain.TIED)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    orders = {"comfyui": str(main.parent), "arguments": ["--port", "1"]}
    process.stdin.write(json.dumps(orders).encode() + b"\n")
    process.stdin.flush()
    *argv, child = json.loads(process.stdout.readline())
    assert argv == [str(main), "--port", "1"]
    process.stdin.close()
    process.wait(10)
    asyncio.run(until(lambda: not alive(child)))
