"""The client of `python run.py live --headless`: a file through the live loop, without a browser.

It owns the live run as a page would: it starts it, takes every picture, says when it has it, and
stops it. Runs inside ComfyUI's environment. Not part of the pack.
"""

import argparse
import io
import json
import pathlib
import struct
import sys
import time
import uuid

import aiohttp
from PIL import Image

from .client import (
    Failed,
    Stoppable,
    complaint,
    lent,
    looked_at,
    parser,
    within,
)

GRAPH = pathlib.Path(__file__).with_name("live_graph.json")
HEADER = struct.Struct("<BBHIdII")  # docs/live.md, "On the wire"


def options() -> argparse.Namespace:
    add = parser("live --headless", "Run the live loop on a file.")
    add.add_argument("--headless", action="store_true", help="without a browser")
    add.add_argument(
        "--frames", type=within(int, 1, 10_000_000), default=200, help="frames to run (default 200)"
    )
    add.add_argument(
        "--fps", type=within(int, 1, 1000), default=60, help="the most frames a second"
    )
    return add.parse_args()


def graph(args: argparse.Namespace, file: str) -> dict:
    """The live workflow in API format, with the user's values in it."""
    nodes = json.loads(GRAPH.read_text(encoding="utf-8"))
    values = {
        "camera": {"file": file, "width": args.size, "height": args.size, "fps": args.fps},
        "positive": {"text": args.prompt},
        "guider": {"cfg": args.cfg, "delta": args.delta},
        "sigmas": {"steps": args.steps, "strength": args.strength},
    }
    for node, inputs in values.items():
        nodes[node]["inputs"].update(inputs)
    return nodes


async def run(args: argparse.Namespace, name: str) -> tuple[dict, list[Image.Image]]:
    """Start, watch, stop. Returns the last statistics and some of the pictures."""
    async with aiohttp.ClientSession(args.server) as http:
        body = {"client_id": uuid.uuid4().hex, "prompt": graph(args, name), "workflow": None}
        async with http.post("/livediffusion/start", json=body) as reply:
            answer = await reply.json()
            if reply.status != 200:
                raise Failed(complaint(answer))
        keys = {key: answer[key] for key in ("session", "token")}
        async with http.ws_connect("/livediffusion/frames", params={**keys, "role": "owner"}) as ws:
            return await watch(args, http, ws, keys)


async def watch(args, http, ws, keys: dict) -> tuple[dict, list[Image.Image]]:
    stats: dict = {}
    pictures: list[Image.Image] = []
    stopped, shown = False, 0.0
    async for message in ws:
        if message.type is aiohttp.WSMsgType.BINARY:
            _, _, view, sequence, captured, _, _ = HEADER.unpack_from(message.data)
            if len(pictures) < args.frames:
                pictures.append(Image.open(io.BytesIO(message.data[HEADER.size :])).convert("RGB"))
            latency = time.time() * 1000 - captured
            text = {"type": "shown", "view": view, "seq": sequence, "latency_ms": latency}
            await ws.send_str(json.dumps(text))
            continue
        data = json.loads(message.data)
        if data["type"] == "state" and data["state"] == "failed":
            raise Failed(f"node {data['node']}: {data['reason']}")
        if data["type"] == "stats":
            stats = data
            now = time.monotonic()
            if now - shown > (0.5 if sys.stdout.isatty() else 15):
                shown = now
                line = f"  {stats['frames']} frames, {stats['fps']:.1f} fps"
                print(f"\r{line}   " if sys.stdout.isatty() else line,
                      end="" if sys.stdout.isatty() else "\n", flush=True)  # fmt: skip
            if stats["frames"] >= args.frames and not stopped:
                stopped = True
                async with http.post("/livediffusion/stop", json=keys) as reply:
                    reply.raise_for_status()
    if sys.stdout.isatty():
        print()
    if stats.get("frames", 0) < args.frames:
        raise Failed(f"the live run ended after {stats.get('frames', 0)} frames.")
    return stats, pictures


def sheet(pictures: list[Image.Image], path: pathlib.Path, columns: int = 8) -> None:
    """Eight of the pictures, from the first to the last."""
    if not pictures:
        raise Failed("no picture came back.")
    picked = pictures[:: max(1, len(pictures) // columns)][:columns]
    width, height = picked[0].size
    whole = Image.new("RGB", (width * len(picked), height))
    for i, picture in enumerate(picked):
        whole.paste(picture, (i * width, 0))
    whole.save(path)


def table(stats: dict, seconds: float) -> str:
    def spread(name: str) -> str:
        values = stats[name]
        return "-" if values is None else f"p50 {values['p50']:.1f} ms, p95 {values['p95']:.1f} ms"

    rows = [
        ("frames", f"{stats['frames']}  in {seconds:.1f} s"),
        ("fps", f"{stats['fps']:.2f}"),
        ("latency", f"{spread('latency_ms')}  (from capture to here)"),
        ("compute", f"{spread('compute_ms')}  (one frame through the graph)"),
        ("dropped", f"{stats['dropped']}  (newer ones came first)"),
        ("skipped", f"{stats['skipped']}  (similarity filter)"),
        ("UNet calls", f"{stats['calls']}  ({stats['rows']} rows)"),
        *(("road", f"{r['road']}{': ' * bool(r['why'])}{r['why']}") for r in stats["roads"] if r),
    ]
    return "\n".join(f"  {name:<12}{value}" for name, value in rows)


def main() -> int:
    args = options()
    began = time.monotonic()
    try:
        with Stoppable() as stoppable:
            path = looked_at(args)
            if args.check:
                return 0
            print(f"- {args.frames} frames of {path.name}, prompt {args.prompt!r}", flush=True)
            with lent(args.folder, path.suffix, path) as copy:
                stats, pictures = stoppable.run(run, args, copy.name)
            sheet(pictures, args.out / "live_sheet.png")
    except (Failed, aiohttp.ClientError, OSError) as reason:
        print(f"run.py live: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(table(stats, time.monotonic() - began))
    print(f"- {args.out / 'live_sheet.png'}")
    return 0
