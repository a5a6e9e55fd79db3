"""gpu.py's live part: a film through the live loop of ComfyUI's own server, without a browser.

The server is a process of its own, set up as ComfyUI does it: on CUDA with cudaMallocAsync and
dynamic VRAM. The demo model, four steps, its graph with a LiveCompile node in it.
"""

import argparse
import asyncio
import contextlib
import importlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from typing import Any

import measure
import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
ENGINES = ("eager", "auto")
STARTS = 120.0  # seconds that the server has


def live(bench, comfyui: str) -> None:
    """Frames a second, latency and the road of each engine."""
    rows = []
    size, frames = (64, 8) if bench.rehearse else (512, 1000)
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        film = _film(place, size)
        with server(pathlib.Path(comfyui), place, bench.rehearse) as url:
            for engine in ENGINES:
                seconds = min(bench.left, 600.0 if bench.rehearse else 60.0)
                try:
                    told = asyncio.run(asyncio.wait_for(
                        _through(url, place, film, engine, size, frames), seconds
                    ))  # fmt: skip
                except Exception as error:
                    told = {"failed": measure.short(error)}
                rows.append({"engine": engine, **told})
        log = (place / "server.log").read_text(encoding="utf-8", errors="replace")
    words = "Device:", "DynamicVRAM", "cudaMallocAsync", "LiveDiffusion:"
    for line in log.splitlines():
        if any(word in line for word in words):
            print(line)
    bench.report.add(f"live, {size} x {size}, n = 4", rows, "milliseconds")


@contextlib.contextmanager
def server(comfyui: pathlib.Path, place: pathlib.Path, cpu: bool):
    """ComfyUI with this pack and nothing else, in a folder of its own; yields its address."""
    (place / "custom_nodes").mkdir()
    (place / "custom_nodes" / "LiveDiffusion").symlink_to(ROOT)
    (place / "page").mkdir()
    (place / "page" / "index.html").write_text("<html></html>", encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, str(comfyui / "main.py"), "--port", str(port), "--disable-api-nodes",
        "--base-directory", str(place), "--front-end-root", str(place / "page"),
        "--database-url", "sqlite:///:memory:", *(["--cpu"] if cpu else []),
    ]  # fmt: skip
    # as a user starts it: it chooses the allocator itself
    env = {k: v for k, v in os.environ.items() if k != "PYTORCH_CUDA_ALLOC_CONF"}
    with (place / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
    url = f"http://127.0.0.1:{port}"
    try:
        _answers(url, process, place / "server.log")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str, process: subprocess.Popen, log: pathlib.Path) -> None:
    until = time.monotonic() + STARTS
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/system_stats", timeout=5).close()
            return
        time.sleep(0.5)
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    raise RuntimeError(f"ComfyUI did not start: {' '.join(last)}")


def _defaults(url: str, node: str) -> dict[str, Any]:
    """What a node's inputs are where nobody changes them."""
    with urllib.request.urlopen(f"{url}/object_info/{node}", timeout=30) as reply:
        inputs = json.load(reply)[node]["input"].get("required", {})
    return {
        name: known["default"]
        for name, (_, known) in ((n, (*told, {})[:2]) for n, told in inputs.items())
        if "default" in known
    }


async def _through(
    url: str, place: pathlib.Path, film: pathlib.Path, engine: str, size: int, frames: int
) -> dict[str, Any]:
    client = importlib.import_module("livediffusion.demo.live")
    graph = json.loads((ROOT / "demo" / "live_graph.json").read_text(encoding="utf-8"))
    inputs = {**_defaults(url, "LiveCompile"), "model": ["model", 0], "engine": engine}
    graph["compiled"] = {"class_type": "LiveCompile", "inputs": inputs}
    graph["guider"]["inputs"]["model"] = ["compiled", 0]
    client.GRAPH = place / "graph.json"
    client.GRAPH.write_text(json.dumps(graph), encoding="utf-8")
    args = argparse.Namespace(
        server=url, frames=frames, fps=120, size=size, steps=4, prompt="neon night", cfg=1.2,
        delta=0.6, strength=0.5,
    )  # fmt: skip
    with client.lent(place, film.suffix, film) as copy:
        stats, pictures = await client.run(args, copy.name)
    told: dict[str, Any] = {"frames": stats["frames"], "fps": round(stats["fps"], 2)}
    for name in ("latency_ms", "compute_ms"):
        spread = stats[name] or {}
        told |= {f"{name[:-3]} {p}": spread.get(p) for p in ("p50", "p95")}
    told |= {"dropped": stats["dropped"], "calls": stats["calls"]}
    told["road"] = "; ".join(
        f"{road['road']}{': ' * bool(road['why'])}{road['why']}" for road in stats["roads"] if road
    )
    told["pictures"] = len(pictures)
    return told


def _film(place: pathlib.Path, size: int) -> pathlib.Path:
    """Stripes that move: an animated WebP, which Pillow reads where PyAV is not."""
    stripes = np.indices((size, size)).sum(0) % 256
    frames = [Image.fromarray(np.roll(stripes, 9 * i).astype(np.uint8)).convert("RGB")
              for i in range(24)]  # fmt: skip
    path = place / "film.webp"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=20, loop=0,
                   lossless=True)  # fmt: skip
    return path
