"""What the live loop costs per frame, and what one queued prompt per frame costs, same graph.

The standard live graph, seven nodes (camera, encode, guider, noise levels, sampler, decode, view),
around a UNet and an autoencoder that compute nothing: what is timed is the executor, the nodes and
the loop. Both ways run interleaved on ComfyUI's own executor in one process. Part of bench.py.
"""

import asyncio
import time

SIZE = 256
STEPS = 2


def graph(camera: dict, view: dict) -> dict:
    """Seven nodes and the three loaders before the frontier."""
    stream = {
        "guider": ["guider", 0], "sigmas": ["sigmas", 0], "latent": ["encode", 0],
        "noise_seed": 0, "step_rule": "lcm", "frames_per_slot": 1, "mode": "live",
        "conditioning": "per frame", "add_noise": True,
    }  # fmt: skip
    guider = {"model": ["null", 0], "positive": ["prompt", 0], "cfg": 1.2, "delta": 1.0,
              "mode": "self-negative"}  # fmt: skip
    sigmas = {"model": ["null", 0], "steps": STEPS, "strength": 0.6, "spacing": "uniform t"}
    nodes = {
        "null": ("NullModel", {}),
        "prompt": ("NullPrompt", {}),
        "camera": ("LiveCamera", camera),
        "encode": ("LiveEncode", {"pixels": ["camera", 0], "vae": ["null", 1]}),
        "guider": ("LiveRCFGGuider", guider),
        "sigmas": ("LiveStrength", sigmas),
        "stream": ("LiveStreamSampler", stream),
        "decode": ("LiveDecode", {"samples": ["stream", 0], "vae": ["null", 1]}),
        "view": ("LiveView", {"image": ["decode", 0]} | view),
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def null_nodes(classes: dict) -> None:
    """A model that returns its input, and an autoencoder that only changes the shape."""
    import tiny
    import torch

    model = tiny.model()
    # as a class of its own: a forward put on a module would be noticed, and sampled frame by frame
    network = model.model.diffusion_model
    network.__class__ = type("Null", (type(network),), {"forward": lambda self, x, *a, **k: x})

    class Vae:
        device = output_device = torch.device("cpu")
        latent, image = torch.zeros(1, 4, SIZE // 8, SIZE // 8), torch.zeros(1, SIZE, SIZE, 3)

        def encode(self, pixels):
            return self.latent

        def decode(self, latents):
            # a tensor of its own: the same one again would count as skipped
            return self.image.view_as(self.image)

    def add(name, returns, function):
        members = {
            "INPUT_TYPES": classmethod(lambda cls: {"required": {}}), "RETURN_TYPES": returns,
            "FUNCTION": "go", "CATEGORY": "benchmark", "go": lambda self: function(),
        }  # fmt: skip
        classes[name] = type(name, (), members)

    add("NullModel", ("MODEL", "VAE"), lambda: (model, Vae()))
    add("NullPrompt", ("CONDITIONING",), lambda: (tiny.conditioning(1),))


async def live(inprocess, comfy, work: dict, frames: int) -> list[float]:
    """Milliseconds of each frame from the moment it is taken to the end of its graph."""
    import aiohttp

    async with aiohttp.ClientSession() as http:
        client = await inprocess.Client.start(http, comfy.url, work)
        session = comfy.sessions.get(client.begun["session"])
        picture = inprocess.jpeg(inprocess.flat(90, SIZE))
        for i in range(frames):
            await client.send(picture)
            await client.wait(lambda n=i: session.shared.counts["frames"] > n)
        times = [1000 * t for t in session.shared.compute._values]
        await client.stop()
    return times[-frames + 20 :]


def queued(comfy, work: dict, frames: int) -> list[float]:
    """Milliseconds of each prompt from queueing to its history entry."""
    times = []
    for _ in range(frames):
        prompt = {name: {**node, "inputs": {**node["inputs"]}} for name, node in work.items()}
        began = time.perf_counter()
        name = comfy.put(prompt, ["view"], {"extra_pnginfo": {"workflow": {"id": "benchmark"}}})
        while name not in comfy.prompt_queue.history:
            time.sleep(0.0001)
        times.append(1000 * (time.perf_counter() - began))
    return times[20:]


def measure(frames: int) -> dict[str, list[float]]:
    """Milliseconds of live frames and of queued prompts, in three turns."""
    import inprocess
    from livediffusion.live.still import stills

    camera = inprocess.camera(width=SIZE, height=SIZE, fps=120)["inputs"]
    view = {"quality": 85, "record": False, "filename_prefix": "live/benchmark"}
    times: dict[str, list[float]] = {"live": [], "queued": []}
    with inprocess.comfy() as (comfy, _):
        null_nodes(inprocess.CLASSES)
        # the queue's prompt ends where the live loop ends: without writing a picture to disk
        inprocess.CLASSES["NullView"] = type(
            "NullView", (),
            {"INPUT_TYPES": classmethod(lambda cls: {"required": {"image": ("IMAGE", {})}}),
             "RETURN_TYPES": (), "FUNCTION": "go", "CATEGORY": "benchmark", "OUTPUT_NODE": True,
             "go": lambda self, image: {}},
        )  # fmt: skip
        stills.put(("page", "camera"), inprocess.jpeg(inprocess.flat(90, SIZE)))
        comfy.client_id = "page"
        work = graph(camera, view)
        ordinary = {**work, "view": {"class_type": "NullView", "inputs": {"image": ["decode", 0]}}}
        ordinary["camera"] = {"class_type": "LiveCamera", "inputs": camera}
        for _ in range(3):
            times["live"] += asyncio.run(live(inprocess, comfy, work, frames))
            stills.put(("", "camera"), inprocess.jpeg(inprocess.flat(90, SIZE)))
            times["queued"] += queued(comfy, ordinary, frames)
    return times
