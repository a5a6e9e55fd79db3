"""The client of `python run.py clip`: a clip through a running ComfyUI, by its HTTP API.

Runs inside ComfyUI's environment (av, Pillow, aiohttp are ComfyUI's own). Not part of the pack.
"""

import argparse
import contextlib
import itertools
import json
import pathlib
import sys
import time
import uuid
from typing import NamedTuple

import aiohttp
import av
import numpy as np
from PIL import Image, ImageDraw

from . import timed
from .client import (
    Failed,
    Parser,
    Stoppable,
    complaint,
    lent,
    looked_at,
    parser,
    told,
    within,
)
from .packed import pack_module

GRAPH = pathlib.Path(__file__).with_name("clip_graph.json")
STAGES = {"LiveEncode": "encode", "LiveStreamSampler": "denoise", "LiveDecode": "decode"}


class Clip(NamedTuple):
    """The part of a film that is worked on.

    Attributes:
        frames: square pictures.
        times: when each begins, and when the last ends; seconds from 0.
    """

    frames: list[Image.Image]
    times: list[float]

    @property
    def rate(self) -> float:
        """Frames per second in the mean."""
        return len(self.frames) / self.times[-1]


def options() -> argparse.Namespace:
    add = parser("clip", "Stylise a clip.")
    _arguments(add)
    return add.parse_args()


def _arguments(add: Parser) -> None:
    add.add_argument("--negative", default="", help="for onetime-negative and full")
    add.add_argument(
        "--mode", default="self-negative",
        choices=["self-negative", "onetime-negative", "full", "off"], help="guidance mode",
    )  # fmt: skip
    add.add_argument("--step-rule", default="lcm", help="lcm, euler, dpmpp_2m, unipc, ...")
    add.add_argument("--frames-per-slot", type=within(int, 1, 64), default=1)
    add.add_argument(
        "--engine", default="eager",
        choices=["eager", "auto", "cudagraph", "inductor", "onnxruntime", "openvino"],
        help="what runs the UNet (docs/engines.md)",
    )  # fmt: skip
    add.add_argument("--seed", type=within(int, 0, 2**64 - 1), default=0, help="noise seed")
    add.add_argument(
        "--frames", type=within(int, 1, 100_000), default=48, help="most frames taken (default 48)"
    )


def read(path: pathlib.Path, most: int, size: int) -> Clip:
    """The first frames, cropped to a square and resized, and their times. Raises Failed."""
    reader, still = pack_module("live.media.reader"), pack_module("live.media.still")
    frames, times, end = [], [], 0.0
    with told("--video"), contextlib.closing(reader.stills(path)) as film:
        for shown in itertools.islice(film, most):
            end = shown.time + shown.lasts
            # a frame that cannot be shown is left out, and the one before it stays
            with contextlib.suppress(still.Unreadable):
                frames.append(square(Image.fromarray(shown.picture()), size))
                times.append(shown.time)
    if not frames:
        raise Failed(f"--video: {path} holds no frame that can be shown.")
    return Clip(frames, [0.0, *times[1:], end])


def square(picture: Image.Image, size: int) -> Image.Image:
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    box = (left, top, left + side, top + side)
    return picture.resize((size, size), Image.Resampling.LANCZOS, box=box)


def write_video(frames: list[Image.Image], rate: float, path: pathlib.Path) -> None:
    """All frames, as long as each other."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=_constant(rate))
        stream.width, stream.height = frames[0].size
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "10"}
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def _constant(rate: float) -> int:
    """A rate that ComfyUI's nodes take."""
    return min(max(1, round(rate)), 120)


def contact_sheet(before, after, path: pathlib.Path, columns: int = 8) -> None:
    """Input above output, every k-th frame."""
    count = min(len(before), len(after))
    step = max(1, count // columns)
    picked = list(range(0, count, step))[:columns]
    w, h = before[0].size
    sheet = Image.new("RGB", (w * len(picked), 2 * h + 16), "white")
    draw = ImageDraw.Draw(sheet)
    for column, i in enumerate(picked):
        sheet.paste(before[i], (column * w, 16))
        sheet.paste(after[i], (column * w, 16 + h))
        draw.text((column * w + 4, 2), f"frame {i}", fill="black")
    sheet.save(path)


def graph(args: argparse.Namespace, video: str, rate: float) -> dict:
    """The clip workflow in API format, with the user's values in it."""
    nodes = json.loads(GRAPH.read_text(encoding="utf-8"))
    values = {
        "load": {"file": video},
        "positive": {"text": args.prompt},
        "negative": {"text": args.negative},
        "engine": {"engine": args.engine},
        "guider": {"cfg": args.cfg, "delta": args.delta, "mode": args.mode},
        "sigmas": {"steps": args.steps, "strength": args.strength},
        "stream": {
            "noise_seed": args.seed, "step_rule": args.step_rule,
            "frames_per_slot": args.frames_per_slot,
        },
        # the output gets the input's own times
        "video": {"fps": float(_constant(rate))},
    }  # fmt: skip
    for node, inputs in values.items():
        nodes[node]["inputs"].update(inputs)
    return nodes


async def run(args: argparse.Namespace, clip: Clip, source: pathlib.Path) -> dict:
    """Queue, follow, put the result together. Returns what the table shows."""
    client = uuid.uuid4().hex
    with lent(args.folder, ".mp4") as video:
        write_video(clip.frames, clip.rate, video)
        nodes = graph(args, video.name, clip.rate)
        async with (
            aiohttp.ClientSession(args.server) as http,
            http.ws_connect(f"/ws?clientId={client}", max_msg_size=0) as socket,
        ):
            body = {"prompt": nodes, "client_id": client}
            async with http.post("/prompt", json=body) as reply:
                answer = await reply.json()
                if reply.status != 200:
                    raise Failed(complaint(answer))
            seconds, live, files = await follow(socket, nodes, answer["prompt_id"])
    saved = next(v for v in files.values() if isinstance(v, list))[0]
    made = args.folder / saved["type"] / saved["subfolder"] / saved["filename"]
    try:
        timed.write(made, source, clip.times, args.out / "clip.mp4")
    finally:
        made.unlink(missing_ok=True)
    return {"seconds": seconds, **live}


async def follow(socket, nodes: dict, prompt_id: str) -> tuple[dict[str, float], dict, dict]:
    """Seconds per node class, the sampler's counters and the saved files, as ComfyUI tells them."""
    seconds: dict[str, float] = {}
    live: dict = {}
    files: dict = {}
    current, since = None, time.monotonic()
    async for message in socket:
        if message.type is not aiohttp.WSMsgType.TEXT:
            continue
        event = json.loads(message.data)
        kind, data = event["type"], event["data"]
        if data.get("prompt_id") not in (None, prompt_id):
            continue
        if kind == "executing":
            now = time.monotonic()
            if current is not None:
                seconds[current] = seconds.get(current, 0.0) + now - since
            since = now
            node = data.get("node")
            current = nodes[node]["class_type"] if node in nodes else None
            if current:
                show(current, 0, 1)
        elif kind == "progress" and current:
            show(current, data["value"], data["max"])
        elif kind == "executed":
            output = data.get("output") or {}
            live |= output.get("live", [{}])[0]
            if data["node"] == "save":
                files = output
        elif kind == "execution_error":
            name = data.get("node_type")
            raise Failed(f"{name}: {data['exception_type']}: {data['exception_message']}")
        elif kind == "execution_interrupted":
            raise Failed("interrupted")
        elif kind == "execution_success":
            if current is not None:
                seconds[current] = seconds.get(current, 0.0) + time.monotonic() - since
            break
    if sys.stdout.isatty():
        print()
    return seconds, live, files


def show(what: str, value: int, most: int) -> None:
    if sys.stdout.isatty():
        bar = "#" * (30 * value // max(most, 1))
        print(f"\r  {what:<22}[{bar:<30}] {value}/{most}   ", end="", flush=True)
    elif value == most:
        print(f"  {what}: {most} ticks", flush=True)


def table(result: dict, count: int) -> str:
    seconds = result["seconds"]
    stages = {label: seconds.get(node, 0.0) for node, label in STAGES.items()}
    busy = sum(stages.values())
    rows = [
        ("frames", f"{count}"),
        ("UNet calls", f"{result['calls']}  ({result['rows']} rows)"),
        *[(k, f"{s:.2f} s  ({1000 * s / count:.1f} ms per frame)") for k, s in stages.items()],
        ("fps", f"{count / busy:.2f}  (encode + denoise + decode)"),
        ("all nodes", f"{sum(seconds.values()):.2f} s"),
    ]  # fmt: skip
    return "\n".join(f"  {name:<12}{value}" for name, value in rows)


def main() -> int:
    args = options()
    try:
        with Stoppable() as stoppable:
            path = looked_at(args)
            if args.check:
                return 0
            clip = read(path, args.frames, args.size)
            print(f"- {len(clip.frames)} frames of {path.name}, prompt {args.prompt!r}", flush=True)
            result = stoppable.run(run, args, clip, path)
            after = read(args.out / "clip.mp4", args.frames, args.size).frames
            if len(after) != len(clip.frames):
                raise Failed(f"{len(clip.frames)} frames went in, {len(after)} came out.")
            contact_sheet(clip.frames, after, args.out / "contact_sheet.png")
    except (Failed, aiohttp.ClientError, OSError) as reason:
        print(f"run.py clip: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    pairs = zip(clip.frames, after)
    change = np.mean([np.abs(np.subtract(a, b, dtype=float)).mean() for a, b in pairs])
    print(table(result, len(clip.frames)))
    print(f"  {'change':<12}{change:.1f} of 255 mean difference between input and output")
    print(f"- {args.out / 'clip.mp4'}\n- {args.out / 'contact_sheet.png'}")
    return 0
