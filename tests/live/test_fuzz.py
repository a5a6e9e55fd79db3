"""Hostile requests, messages, pictures and files: refused in words, soon, and nothing else happens.

LIVEDIFFUSION_FUZZ says how many of each; a few hundred by default. LIVEDIFFUSION_FUZZ_SEED: which.
"""

import asyncio
import io
import json
import os
import pathlib
import re
import sys
import tempfile
import time
import urllib.parse

import fuzz
import inprocess
import numpy as np
import pytest
from inprocess import Client, camera, flat, graph, jpeg, view
from PIL import Image

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

COUNT = int(os.environ.get("LIVEDIFFUSION_FUZZ", "300"))
SEED = int(os.environ.get("LIVEDIFFUSION_FUZZ_SEED", "0"))
SECONDS = 1.0  # of this process's own time, for one input
ROOT = pathlib.Path(__file__).resolve().parents[2]

STRANGER = """import pathlib
pathlib.Path(__file__).with_name("ran").touch()
def call(*a): raise OSError
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder with what nobody may touch: a module to import and files to read."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "stranger_module.py").write_text(STRANGER)
    (folder / "secret.json").write_text("{}")
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def running(outside, tmp_path, monkeypatch):
    import folder_paths

    for kind in ("input", "output", "user"):
        folder = tmp_path / kind
        folder.mkdir()
        get = f"get_{kind}_directory"
        monkeypatch.setattr(folder_paths, get, lambda folder=folder: str(folder))
    with inprocess.comfy() as both:
        yield both


def told(*words):
    """For whoever runs this with -s."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")


def held(watch, outside, allowed):
    """What the watch saw is within bounds."""
    assert watch.tracebacks == []
    assert watch.slowest[0] < SECONDS, watch.slowest
    assert not (outside / "ran").exists() and "stranger_module" not in sys.modules
    assert watch.started == []
    roots = [*map(str, allowed), sys.prefix, sys.base_prefix, str(ROOT), "/dev/", "/proc/", "/sys/",
             str(pathlib.Path(sys.modules["folder_paths"].__file__).parent),
             # ours: what an earlier test left goes when it is collected, run.py's compiled modules
             os.path.join(os.path.realpath(tempfile.gettempdir()), "livediffusion-")]  # fmt: skip
    strange = [path for path in watch.opened if os.path.isabs(path)
               and not any(os.path.realpath(path).startswith(root) for root in roots)]  # fmt: skip
    assert strange == []
    assert not any(path.startswith(str(outside)) and not path.endswith(("/outside", ".pyc", ".py"))
                   for path in watch.opened)  # fmt: skip
    files = [getattr(sys.modules.get(name), "__file__", None) for name in watch.imported]
    assert not [f for f in files if f and not any(f.startswith(root) for root in roots)]


def whole_graph():
    out = graph("keep", source="file", file="a.gif")
    out["6"] = {"class_type": "LiveStrength", "inputs": {"model": ["1", 0], "steps": 4}}
    out["7"] = view(["8", 0])
    out["8"] = {"class_type": "TestWork", "inputs": {"image": ["9", 0], "cond": ["2", 0]}}
    out["9"] = camera(width=64, _meta={"title": "t"})
    return {**out, "9": {**out["9"], "_meta": {"title": "Camera"}}}


def request(mutate, url, client, routes):
    """(head, body) of a hostile request to one of our routes, as bytes."""
    rng = mutate.rng
    keys = {name: client.begun[name] for name in ("session", "token")}
    workflow = {"id": "w", "nodes": [{"id": 1, "pos": [0, 1.5]}], "extra": {"ds": {"scale": 1}}}
    prompt = rng.choice([graph(), whole_graph()])
    begin = {"client_id": "c", "secret": "x" * 32, "prompt": prompt, "workflow": workflow}
    good = {
        ("POST", "start"): begin, ("POST", "update"): {**begin, **keys}, ("POST", "stop"): keys,
        ("GET", "stats"): keys, ("GET", "frames"): {**keys, "role": "watch"},
        ("POST", "snapshot"): {"node": "1", "client_id": "c"}, ("GET", "mjpeg/{key}"): {},
        ("POST", "picture"): {**keys, "node": "5"},
        ("POST", "allow"): {"kind": "address", "what": "rtsp://u:p@10.0.0.5:554/a"},
        ("GET", "sources"): {**keys, "kind": "address"}, ("GET", "runs"): {},
        ("POST", "keep"): {**keys, "name": "n"}, ("POST", "attach"): {"run": "r" * 16},
        ("POST", "end"): {"run": "r" * 16}, ("POST", "phone"): {**keys, "node": "3"},
    }  # fmt: skip
    good |= {(method, path): {} for method, path in routes if "{" in path or path == "whip"}
    assert good.keys() == routes
    method, route = rng.choice(sorted(good))
    data = good[method, route]
    if route in ("stop", "keep"):
        # only its own page may, so none of these must
        data = {**data, "token": "x"}
    body, query = b"", ""
    if method == "POST" and data and route != "snapshot":
        changed = mutate.value(data)
        body = fuzz.encoded(changed)
        if route in ("stop", "keep") and isinstance(changed, dict):
            body = fuzz.encoded({**changed, "token": rng.choice(["x", "\u00e4", "\ud800", 5, []])})
        body = mutate.bytes(body) if rng.random() < 0.2 else body
    else:
        pairs = mutate.value(data)
        pairs = pairs if isinstance(pairs, dict) else {"session": pairs}
        query = (
            "?"
            + urllib.parse.urlencode(
                {str(k): str(v) for k, v in pairs.items()}, errors="surrogatepass"
            )[:7000]
        )
        body = rng.randbytes(rng.randrange(2000)) if method in ("POST", "PATCH") else b""
    place = route.encode()
    odd = [b"\xff\xfe", b"%ff", b"%00", b"..%2f..", b"x" * 3000, b"\xc3\xa4", b"k" * 24]
    while (hole := re.search(rb"\{\w+\}", place)) is not None:
        place = place[: hole.start()] + rng.choice(odd) + place[hole.end() :]
    place += query.encode()
    host = url.split("//")[1].encode()
    headers = {
        b"Host": host, b"Content-Length": str(len(body)).encode(),
        b"Content-Type": b"application/json", b"Connection": b"close",
    }  # fmt: skip
    odd = {
        b"Origin": [b"http://" + host, b"http://[::1", b"null", b"http://x:99999", b"\xff", b"://",
                    b"http://" + b"a" * 5000, b"http://\xc3\xa4"],
        b"Host": [b"", b"[::1", b"x:y", b"\xff", host + b":1", b"a" * 3000],
        b"X-Forwarded-Host": [b"[", b"\xff", b",,,", b"x" * 3000],
        b"Sec-Fetch-Site": [b"cross-site", b"\xff", b"", b"none"],
        b"Content-Type": [b"text/plain; charset=nonsense", b"\xff", b"", b"multipart/form-data"],
        b"Content-Encoding": [b"gzip", b"deflate", b"br", b"zstd", b"nonsense"],
        b"Content-Length": [b"0", b"1"] if body else [b"0"],  # more would be waited for
        b"Upgrade": [b"websocket"],
        b"Sec-WebSocket-Key": [b"x", b"\xff"],
        b"Cookie": [b"\xff=\xfe"],
    }  # fmt: skip
    for name in rng.sample(sorted(odd), rng.choice([0, 0, 1, 2])):
        headers[name] = rng.choice(odd[name])
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers.items())
    head = method.encode() + b" /livediffusion/" + place + b" HTTP/1.1\r\n" + lines + b"\r\n"
    return head, body


def message(mutate):
    """A hostile message of a listener: text, or bytes."""
    rng = mutate.rng
    if rng.random() < 0.5:
        good = rng.choice([{"type": "shown", "view": 0, "seq": 1, "latency_ms": 5.0},
                           {"type": "compare", "view": 0, "on": True}])  # fmt: skip
        return mutate.text(good).decode("utf-8", "replace")
    return mutate.bytes(inprocess.Packet(1, 1, 0, 1, 1.7e9, 0, 0, jpeg(flat(9))).packed())


def settled(comfy):
    """The live runs that bad requests began after all are ended, so that the next may."""
    for session in list(comfy.sessions._all.values()):
        if session.client != "page" and not session.over:
            comfy.loop.call_soon_threadsafe(session.stop)


def test_requests_and_messages(running, outside, tmp_path):
    """No 500, no traceback, no stall, and the run goes on."""
    comfy, _ = running
    (tmp_path / "input" / "a.gif").write_bytes(gif())
    mutate = fuzz.Mutator(SEED)
    routes = {(one.method, one.path.removeprefix("/livediffusion/")) for one in comfy.routes}

    async def work(http):
        client = await Client.start(http, comfy.url, graph())
        await client.send(flat(10))
        await client.wait(lambda: client.views)
        port = int(comfy.url.rpartition(":")[2])
        statuses, listener = {}, None
        keys = {name: client.begun[name] for name in ("session", "token")}
        with fuzz.watched() as watch:
            for i in range(COUNT):
                head, body = request(mutate, comfy.url, client, routes)
                with watch.case(f"request {i} {head[:200]} {body[:300]}"):
                    try:
                        status = await fuzz.raw(port, head, body)
                    except asyncio.TimeoutError:
                        pytest.fail(f"no answer to {head} {body[:2000]}")
                statuses[status] = statuses.get(status, 0) + 1
                assert status is None or status < 500, (status, head, body[:2000])
                settled(comfy)
                if listener is None or listener.socket.closed:
                    listener = await Client.join(http, comfy.url, client.begun, "watch")
                text = message(mutate)
                with watch.case(f"message {i} {text[:300]}"):
                    if isinstance(text, str):
                        await listener.socket.send_str(text)
                    else:
                        seen = client.answers
                        await client.socket.send_bytes(text)
                        await client.wait(lambda seen=seen: client.answers > seen)
            place = "&".join(f"{k}={v}" for k, v in keys.items())
            async with http.get(f"{comfy.url}/livediffusion/stats?{place}") as reply:
                assert reply.status == 200
        # an edit among them may have taken the browser's camera out
        assert (await client.post("update", prompt=graph(), workflow={}))[0] == 200
        # frames are taken once the edit has been taken over
        for _ in range(200):
            await client.send(flat(77))
            await asyncio.sleep(0.1)
            if any(inprocess.grey(packet) == 77 for packet, _ in client.views[-1:]):
                break
        assert inprocess.grey(client.views[-1][0]) == 77
        if not listener.socket.closed:
            await listener.socket.close()
        await client.stop()
        return watch, statuses

    watch, statuses = inprocess.live(work)
    told(watch.cases, "cases", statuses, "slowest", watch.slowest)
    held(watch, outside, [tmp_path / kind for kind in ("input", "output", "user")])
    # it looks at what is behind the door, too
    assert statuses.get(200) and statuses.get(400, 0) + statuses.get(403, 0) > COUNT // 4


def gif():
    out = io.BytesIO()
    frames = [Image.fromarray(flat(9 * i)) for i in range(3)]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=20)
    return out.getvalue()


def engine():
    """An engine's JSON file as it is written for SD1.5."""
    shape = [[1, 4, 64, 64], [2, 4, 64, 64], [4, 4, 64, 64]]
    return {
        "format": 1,
        "made": {
            "gpu": "g", "capability": "8.9", "cuda_driver": 12040, "tensorrt": "10.3",
            "exporter": 1, "opset": 18, "precision": "fp16", "model": "abc",
            "inputs": ["x", "timesteps"],
            "profile": {"x": shape, "timesteps": [[1], [2], [4]]}, "flags": ["refit"],
            "library": "tensorrt-rtx", "targets": ["8.9", "12.0"],
        },
        "family": {
            "base": ["comfy.model_base", "BaseModel"], "config": ["comfy.supported_models", "SD15"],
            "unet_config": {
                "image_size": 32, "in_channels": 4, "model_channels": 320, "context_dim": 768,
                "num_res_blocks": [2, 2, 2, 2], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
                "use_linear_in_transformer": False, "adm_in_channels": None,
            },
            "sampling_settings": {"timesteps": 1000}, "model_type": "EPS",
            "memory_usage_factor": 1.0,
        },
        "weights": {"a.weight": ["a.weight", True]},
        "built": {"seconds": 10.5, "on": "2026-01-01"}, "size": 3, "digest": "0" * 64,
    }  # fmt: skip


def schedule():
    return {
        "livediffusion": 1, "method": "learned", "solver": "euler", "levels": [14.6, 3.0, 0.5, 0.0],
        "shifts": [0.1, 0.0, -0.1], "goal": "teacher", "errors": {"teacher": [0.1, 0.2]},
        "hand_made": "beta", "model": "abc", "rounds": [8, 8], "asked": {"steps": 3, "cfg": 1.0},
        "curves": {"beta": [14.6, 2.0, 0.4, 0.0]}, "date": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip


def engine_case(path, mutate, watch):
    """Read a hostile engine's JSON file, and make the model that it describes."""
    import comfy.model_base
    import torch
    from livediffusion.compiled.trt import files
    from livediffusion.host.models import skeleton

    text = mutate.text(engine())
    (path.parent / f"{path.name}.json").write_bytes(text)
    with watch.case(f"engine {text[:500]}"):
        try:
            told = files.read(path)
        except files.Unfit:
            return False
        try:
            model = skeleton.made(told.family, torch.float32)
        except ValueError as reason:
            assert str(reason).startswith("engine: ")
            return False
        assert isinstance(model, comfy.model_base.BaseModel)
        return True


def schedule_case(path, mutate, watch):
    """Read a hostile schedule, and plot it."""
    from livediffusion.nodes.plot import plotted
    from livediffusion.schedules import results

    text = mutate.text(schedule())
    path.write_bytes(text)
    with watch.case(f"schedule {text[:500]}"):
        try:
            found = results.load(path)
        except ValueError as reason:
            assert str(reason).startswith(path.name)
            return False
        shown = json.loads(plotted(found)["livediffusion_steps"][0], parse_constant=pytest.fail)
        assert len(shown["levels"]) >= 2
        return True


def test_engine_and_schedule_files(comfyui, outside, tmp_path):
    """A file is what it says or is refused, and names nothing that is run, imported or read."""
    folder = tmp_path / "files"
    folder.mkdir()
    made = {"engine": 0, "schedule": 0}
    # whatever is imported late is imported before anybody watches
    warm = fuzz.Mutator(SEED)
    warm.value = lambda good: good
    with fuzz.watched() as watch:
        engine_case(folder / "x.engine", warm, watch)
        schedule_case(folder / "x.json", warm, watch)
    mutate = fuzz.Mutator(SEED + 1)
    with fuzz.watched() as watch:
        for _ in range(COUNT):
            made["engine"] += engine_case(folder / "a.engine", mutate, watch)
            made["schedule"] += schedule_case(folder / "a.json", mutate, watch)
    told(watch.cases, "cases", made, "slowest", watch.slowest)
    held(watch, outside, [folder])
    assert all(0 < count < COUNT for count in made.values())


def hostile_pictures():
    """JPEG files that ask much of a decoder, by what they do."""
    noise = np.random.default_rng(0).integers(0, 256, (4000, 4000, 3), dtype=np.uint8)
    plain = Image.new("RGB", (4000, 4000), (90, 120, 30))

    def coded(picture, **how):
        out = io.BytesIO()
        picture.save(out, "JPEG", **how)
        return out.getvalue()

    progressive = coded(plain, progressive=True, subsampling=0)
    last = progressive[progressive.rindex(b"\xff\xda") : -2]
    begin, rest = progressive[:2], progressive[2:]
    small = coded(plain.resize((64, 64)))
    size = small.index(b"\xff\xc0") + 5
    return {
        "16 megapixels": coded(plain, quality=85),
        "noise": coded(Image.fromarray(noise), quality=5),
        "noise, progressive": coded(Image.fromarray(noise), quality=4, progressive=True),
        "progressive": progressive,
        "800 scans": progressive[:-2] + last * 800 + progressive[-2:],
        "a restart after each block": coded(plain, restart_marker_blocks=1),
        "cut": progressive[: len(progressive) // 2],
        "cut, a restart after each block": coded(plain, restart_marker_blocks=1)[:100_000],
        "CMYK": coded(plain.convert("CMYK")),
        "CMYK, progressive": coded(plain.convert("CMYK"), progressive=True),
        "grey": coded(plain.convert("L"), progressive=True),
        "Exif, 200,000 times": begin + b"\xff\xe1\0\x0aExif\0\0ab" * 200_000 + rest,
        "profiles": begin + b"\xff\xe2\0\x10ICC_PROFILE\0\1\1" * 200_000 + rest,
        "empty segments": begin + b"\xff\xe5\0\2" * 1_000_000 + rest,
        "comments between scans": progressive[:-2] + b"\xff\xfe\0\2" * 900_000 + b"\xff\xd9",
        "trailing data": small + b"\xff" * 4_000_000,
        "fill": begin + b"\xff" * 4_000_000 + rest,
        "MPO": begin + b"\xff\xe2\0\x40MPF\0MM\0*\0\0\0\x08\xff\xff" + bytes(48) + rest,
        "65535 x 65535": small[:size] + b"\xff" * 4 + small[size + 4 :],
        "no lines (DNL)": small[:size] + b"\0\0" + small[size + 2 :],
        "12 bits": small[: size - 1] + b"\x0c" + small[size:],
        "arithmetic": small.replace(b"\xff\xc0", b"\xff\xc9"),
        "lossless": small.replace(b"\xff\xc0", b"\xff\xc3"),
        "two sizes": small[: size - 5] + small[size - 5 : size + 14] * 2 + small[size + 14 :],
    }


def decoded(data, watch, what):
    """The picture, or None where it is not taken; both soon."""
    from livediffusion.live.codecs import JPEG
    from livediffusion.live.wire import NotTaken

    with watch.case(what):
        try:
            picture = JPEG.decode(data)
        except NotTaken:
            return None
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[-1] == 3
    return picture


@pytest.mark.timeless
def test_pictures(outside, comfyui):
    """Whatever a camera sends is decoded or refused within a second, at 16 megapixels."""
    pictures = hostile_pictures()
    mutate = fuzz.Mutator(SEED + 2)
    small = jpeg(np.asarray(Image.radial_gradient("L").convert("RGB")))
    taken = {}
    with fuzz.watched() as watch:
        for name, data in pictures.items():
            began = time.process_time()
            taken[name] = decoded(data, watch, name) is not None
            took = time.process_time() - began
            told(f"{name}: {len(data)} bytes, {took:.2f} s, decoded: {taken[name]}")
        shown = sum(decoded(mutate.bytes(small), watch, "changed") is not None
                    for _ in range(COUNT))  # fmt: skip
    told(watch.cases, "cases, decoded", shown, "slowest", watch.slowest)
    held(watch, outside, [])
    # what browsers send is decoded
    assert taken["16 megapixels"] and taken["progressive"] and taken["noise"]
    assert not taken["800 scans"] and not taken["65535 x 65535"] and not taken["arithmetic"]
    assert 0 < shown < COUNT


def test_the_watch_sees(tmp_path, outside):
    """What these tests would say if it happened."""
    import importlib
    import logging

    with fuzz.watched() as watch:
        (tmp_path / "outside" / "secret.json").read_text()
        with pytest.raises(OSError):
            importlib.import_module("stranger_module").call()
        try:
            raise ValueError("x")
        except ValueError:
            logging.exception("something")
    del sys.modules["stranger_module"]
    assert str(outside / "secret.json") in watch.opened and "stranger_module" in watch.imported
    assert watch.tracebacks and (outside / "ran").exists()
    with pytest.raises(AssertionError):
        held(watch, outside, [])


def test_a_stall_is_seen():
    async def stall():
        with fuzz.watched() as watch, watch.case("busy"):
            began = time.process_time()
            while time.process_time() - began < 0.05:
                pass
            await asyncio.sleep(0)
        return watch

    assert asyncio.run(stall()).slowest[0] >= 0.05
