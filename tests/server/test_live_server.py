"""Live in a real ComfyUI, every version: the headless command, the log, the end of the server."""

import asyncio
import json
import pathlib
import signal
import struct
import subprocess
import sys

import inprocess
import pytest
from films import write_gif, write_video
from serving import serving

pytestmark = [pytest.mark.comfy, pytest.mark.server]

ROOT = pathlib.Path(__file__).resolve().parents[2]


def headless(server, out, *options):
    """demo/live.py, as run.py calls it."""
    return subprocess.run(
        [sys.executable, str(ROOT / "demo" / "packed.py"), "live", "--server", server.url,
         "--folder", str(server.base), "--headless", "--out", str(out), *options],
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_the_headless_demo(server, tmp_path):
    video = write_video(tmp_path / "film.mp4", 8, 25)
    with video.open("ab") as file:
        # more than an upload may have: a box of nothing
        file.write(struct.pack(">I4s", 120 * 2**20, b"free"))
        file.truncate(file.tell() + 120 * 2**20 - 8)
    before = len(server.log.splitlines())
    done = headless(server, tmp_path, "--video", str(video), "--frames", "60", "--size", "64")
    assert done.returncode == 0, done.stderr
    table = dict(line.strip().split(maxsplit=1) for line in done.stdout.splitlines()
                 if line.startswith("  "))  # fmt: skip
    frames = int(table["frames"].split()[0])
    assert frames >= 60
    assert {"fps", "latency", "compute", "dropped", "skipped"} <= set(table)
    calls, rows = done.stdout.split("UNet calls")[1].split("rows")[0].replace("(", "").split()
    assert (int(calls), int(rows)) == (frames, 2 * frames - 1)
    assert (tmp_path / "live_sheet.png").stat().st_size > 1000
    assert [p for p in (server.base / "input").iterdir() if p.name.startswith("live")] == []
    # a line for the prompt and a few for loading; none per frame
    assert len(server.log.splitlines()) - before < 25, server.log
    assert next(iter(server.json("/history?max_items=1").values()))["status"]["completed"]


def test_a_bad_file_is_one_sentence(server, tmp_path):
    (tmp_path / "text.mp4").write_text("no video " * 30, encoding="utf-8")
    done = headless(server, tmp_path, "--video", str(tmp_path / "text.mp4"), "--frames", "5")
    assert done.returncode == 1
    said = done.stderr.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("run.py live: ")
    assert "cannot be read" in said[0]


def test_a_run_ends_with_its_server(comfyui, tmp_path):
    """Stopped as from a terminal, in the middle of a run: nothing keeps the process alive."""
    (tmp_path / "input").mkdir()
    write_gif(tmp_path / "input" / "film.gif", 8, 40)
    with serving(comfyui, tmp_path) as (port, process, log):
        url = f"http://127.0.0.1:{port}"

        async def live(http):
            graph = {
                "1": inprocess.camera(source="file", file="film.gif"),
                "2": inprocess.view(["1", 0]),
            }
            client = await inprocess.Client.start(http, url, graph)
            await client.wait(lambda: len(client.views) >= 5)
            process.send_signal(signal.SIGINT)
            # raises if it is alive then: whatever kept it would keep it for good
            await asyncio.to_thread(process.wait, 30)
            await client.wait(lambda: client.closed)

        inprocess.live(live)
    assert json.dumps(log.read_text(encoding="utf-8")).count("Traceback") == 0
