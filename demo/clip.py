"""The client of `python run.py clip`: a clip through a running ComfyUI, by its HTTP API.

Runs inside ComfyUI's environment (av, Pillow, aiohttp are ComfyUI's own). Not part of the pack.
"""

import argparse
import asyncio
import importlib.util
import json
import pathlib
import sys
import time
import uuid

import aiohttp
import av
import numpy as np
from PIL import Image, ImageDraw

SIZE = 256  # native size of the demo model
GRAPH = pathlib.Path(__file__).with_name("clip_graph.json")
# animated previews of ComfyUI's template packages with a clear subject that moves
FAVOURITES = ("ltxv_image_to_video-1", "video_wan_vace_inpainting-2", "video_ltx2_t2v-1")
PACKAGES = ("media_video", "media_image", "media_api", "media_other")
STAGES = {"LiveEncode": "encode", "LiveStreamSampler": "denoise", "LiveDecode": "decode"}


class Failed(Exception):
    """Ends the client with one plain sentence."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.py clip", description="Stylise a clip.")
    parser.add_argument("--server", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--video", type=pathlib.Path, help="your clip (default: ComfyUI's own)")
    parser.add_argument("--prompt", default="neon night", help="what it shall look like")
    parser.add_argument("--negative", default="", help="for onetime-negative and full")
    parser.add_argument("--steps", type=int, default=2, help="denoising steps n (default 2)")
    parser.add_argument("--strength", type=float, default=0.5, help="0..1, how far from the input")
    parser.add_argument("--cfg", type=float, default=1.2, help="guidance scale (default 1.2)")
    parser.add_argument("--delta", type=float, default=0.6, help="residual noise (default 0.6)")
    parser.add_argument(
        "--mode", default="self-negative",
        choices=["self-negative", "onetime-negative", "full", "off"], help="guidance mode",
    )  # fmt: skip
    parser.add_argument("--step-rule", default="lcm", help="lcm, euler, dpmpp_2m, unipc, ...")
    parser.add_argument("--frames-per-slot", type=int, default=1)
    parser.add_argument(
        "--engine", default="eager",
        choices=["eager", "auto", "cudagraph", "inductor", "onnxruntime"],
        help="what runs the UNet (docs/engines.md)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="noise seed")
    parser.add_argument("--frames", type=int, default=48, help="most frames taken (default 48)")
    parser.add_argument("--size", type=int, default=SIZE, help=f"side in pixels (default {SIZE})")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("output"))
    args = parser.parse_args()
    if args.size < 64 or args.size % 2:
        parser.error("--size: an even number of pixels, 64 or more")
    if args.frames < 1:
        parser.error("--frames: 1 or more")
    return args


def bundled_clip() -> pathlib.Path:
    """An animated preview that ComfyUI's template packages install."""
    folders = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(f"comfyui_workflow_templates_{package}")
        if spec is not None:
            folders += [pathlib.Path(p) / "templates" for p in spec.submodule_search_locations]
    for name in FAVOURITES:
        for folder in folders:
            if (folder / f"{name}.webp").is_file():
                return folder / f"{name}.webp"
    for folder in folders:
        for path in sorted(folder.glob("*.webp")):
            with Image.open(path) as picture:
                if getattr(picture, "n_frames", 1) >= 24:
                    return path
    raise Failed("ComfyUI's template packages hold no animated preview; pass --video FILE.")


def read(path: pathlib.Path, most: int, size: int) -> tuple[list[Image.Image], float]:
    """The first frames, cropped to a square and resized, and their rate."""
    if not path.is_file():
        raise Failed(f"--video: there is no file {path}.")
    if path.suffix.lower() in (".webp", ".gif", ".png", ".apng"):
        with Image.open(path) as picture:
            frames, lasting = [], 0
            for i in range(min(most, getattr(picture, "n_frames", 1))):
                picture.seek(i)
                frames.append(square(picture.convert("RGB"), size))
                # known only once the frame is decoded
                lasting += picture.info.get("duration") or 40
        return frames, 1000 * len(frames) / lasting
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 25)
            frames = []
            for frame in container.decode(stream):
                frames.append(square(frame.to_image(), size))
                if len(frames) == most:
                    break
    except (av.FFmpegError, IndexError) as error:
        raise Failed(f"--video: {path} is no video that can be read ({error}).") from None
    if not frames:
        raise Failed(f"--video: {path} holds no frame.")
    return frames, rate


def square(picture: Image.Image, size: int) -> Image.Image:
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    box = (left, top, left + side, top + side)
    return picture.resize((size, size), Image.Resampling.LANCZOS, box=box)


def write_video(frames: list[Image.Image], rate: float, path: pathlib.Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=max(1, round(rate)))
        stream.width, stream.height = frames[0].size
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "10"}
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


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
        "video": {"fps": float(max(1, round(rate)))},
    }  # fmt: skip
    for node, inputs in values.items():
        nodes[node]["inputs"].update(inputs)
    return nodes


async def run(args: argparse.Namespace, frames, rate: float, out: pathlib.Path) -> dict:
    """Upload, queue, follow, download. Returns what the table shows."""
    name = f"live-clip-{uuid.uuid4().hex[:8]}.mp4"
    upload = out / name
    write_video(frames, rate, upload)
    client = uuid.uuid4().hex
    try:
        async with aiohttp.ClientSession(args.server) as http:
            with upload.open("rb") as file:
                form = aiohttp.FormData({"overwrite": "true"})
                form.add_field("image", file, filename=name)
                async with http.post("/upload/image", data=form) as reply:
                    reply.raise_for_status()
            nodes = graph(args, name, rate)
            async with http.ws_connect(f"/ws?clientId={client}", max_msg_size=0) as socket:
                body = {"prompt": nodes, "client_id": client}
                async with http.post("/prompt", json=body) as reply:
                    answer = await reply.json()
                    if reply.status != 200:
                        raise Failed(complaint(answer))
                seconds, live, files = await follow(socket, nodes, answer["prompt_id"])
            saved = next(v for v in files.values() if isinstance(v, list))[0]
            query = {k: saved[k] for k in ("filename", "subfolder", "type")}
            async with http.get("/view", params=query) as reply:
                reply.raise_for_status()
                (out / "clip.mp4").write_bytes(await reply.read())
    finally:
        upload.unlink(missing_ok=True)
    return {"seconds": seconds, **live}


def complaint(answer: dict) -> str:
    lines = [answer.get("error", {}).get("message", "ComfyUI refused the graph")]
    for node in answer.get("node_errors", {}).values():
        lines += [f"{node['class_type']}: {e['message']} {e['details']}" for e in node["errors"]]
    return "; ".join(lines)


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
        path = args.video or bundled_clip()
        frames, rate = read(path, args.frames, args.size)
        args.out.mkdir(parents=True, exist_ok=True)
        print(f"- {len(frames)} frames of {path.name}, prompt {args.prompt!r}", flush=True)
        result = asyncio.run(run(args, frames, rate, args.out))
        after, _ = read(args.out / "clip.mp4", args.frames, args.size)
        if len(after) != len(frames):
            raise Failed(f"{len(frames)} frames went in, {len(after)} came out.")
        contact_sheet(frames, after, args.out / "contact_sheet.png")
    except (Failed, aiohttp.ClientError) as reason:
        print(f"run.py clip: {reason}", file=sys.stderr)
        return 1
    change = np.mean([np.abs(np.subtract(a, b, dtype=float)).mean() for a, b in zip(frames, after)])
    print(table(result, len(frames)))
    print(f"  {'change':<12}{change:.1f} of 255 mean difference between input and output")
    print(f"- {args.out / 'clip.mp4'}\n- {args.out / 'contact_sheet.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
