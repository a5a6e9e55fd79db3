"""The ways that a frame may take from a visitor's page to a replica and back, each measured.

    python benchmarks/serve_ways.py [--frames 300] [--out FILE]

Run with a Python that has `ray[serve]` (run.py serve sets one up). Each way carries the same
messages to the same echo, which stands in for a replica's gate, on loopback:

- direct: the replica's own port
- relay: Serve's proxy, the ingress, a TCP connection to the replica's port
- handle: Serve's proxy, the ingress, a call through Serve's handle with a session's number
- relay and handle again where HAProxy stands in for Serve's proxy (RAY_SERVE_ENABLE_HA_PROXY)
"""

import argparse
import asyncio
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

SIZES = (5_000, 30_000, 50_000, 800_000)
PORT = 8766
WARM = 20  # messages before those that count


def app():
    """An echo, and an ingress that reaches it in both ways."""
    import aiohttp
    import fastapi
    from aiohttp import web
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    hashed = RequestRouterConfig(
        request_router_class="ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
    )

    @serve.deployment(num_replicas=2, request_router_config=hashed,
                      ray_actor_options={"num_cpus": 0.1})  # fmt: skip
    class Echo:
        async def __init__(self):
            async def socket(request):
                ws = web.WebSocketResponse(compress=False, max_msg_size=2**22)
                await ws.prepare(request)
                async for message in ws:
                    await ws.send_bytes(message.data)
                return ws

            made = web.Application()
            made.router.add_get("/", socket)
            self._runner = web.AppRunner(made, access_log=None)
            await self._runner.setup()
            self._site = web.TCPSite(self._runner, "127.0.0.1", 0)
            await self._site.start()

        def port(self):
            return self._runner.addresses[0][1]

        async def echo(self, data: bytes):
            return data

    front = fastapi.FastAPI()

    @serve.deployment(ray_actor_options={"num_cpus": 0.1})
    @serve.ingress(front)
    class Ingress:
        def __init__(self, echo):
            self._echo = echo

        @front.get("/port")
        async def port(self):
            return await self._echo.options(session_id="a").port.remote()

        @front.websocket("/handle")
        async def handled(self, socket: fastapi.WebSocket):
            await socket.accept()
            handle = self._echo.options(session_id="a")
            while True:
                await socket.send_bytes(await handle.echo.remote(await socket.receive_bytes()))

        @front.websocket("/relay")
        async def relayed(self, socket: fastapi.WebSocket):
            await socket.accept()
            port = await self._echo.options(session_id="a").port.remote()
            async with (
                aiohttp.ClientSession() as http,
                http.ws_connect(f"http://127.0.0.1:{port}/", compress=0, max_msg_size=2**22) as ws,
            ):

                async def back():
                    async for message in ws:
                        await socket.send_bytes(message.data)

                task = asyncio.create_task(back())
                try:
                    while True:
                        await ws.send_bytes(await socket.receive_bytes())
                finally:
                    task.cancel()

    return Ingress.bind(Echo.bind())


async def timed(url: str, frames: int) -> dict[str, dict[str, float]]:
    """Milliseconds that a message takes there and back, by its size."""
    import aiohttp

    result = {}
    async with (
        aiohttp.ClientSession() as http,
        http.ws_connect(url, compress=0, max_msg_size=2**22) as ws,
    ):
        for size in SIZES:
            data, took = os.urandom(size), []
            for i in range(frames + WARM):
                began = time.perf_counter()
                await ws.send_bytes(data)
                message = await ws.receive()
                assert len(message.data) == size
                if i >= WARM:
                    took.append(1000 * (time.perf_counter() - began))
                # a stream's own pace: without it the proxy's processes never sleep
                await asyncio.sleep(0.01)
            cut = statistics.quantiles(took, n=100)
            result[str(size)] = {"p50": cut[49], "p99": cut[98]}
    return result


def measure(frames: int, out: pathlib.Path) -> None:
    """Write one JSON object: the ways through the proxy that the environment asks for."""
    import urllib.request

    import ray
    from ray import serve

    with tempfile.TemporaryDirectory(prefix="ldr") as folder:
        ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR",
                 log_to_driver=False, _temp_dir=folder)  # fmt: skip
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": PORT})
            serve.run(app())
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/port", timeout=30) as reply:
                own = json.loads(reply.read())
            ways = {"direct": f"http://127.0.0.1:{own}/"}
            ways |= {name: f"http://127.0.0.1:{PORT}/{name}" for name in ("relay", "handle")}
            found = {name: asyncio.run(timed(url, frames)) for name, url in ways.items()}
            out.write_text(json.dumps(found), encoding="utf-8")
        finally:
            serve.shutdown()
            ray.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--inside", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        measure(args.frames, args.inside)
        return 0
    found = {}
    for proxy in ("serve", "haproxy"):
        env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0",
               "RAY_SERVE_ENABLE_HA_PROXY": str(int(proxy == "haproxy"))}  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / "found.json"
            command = [sys.executable, __file__, "--inside", str(out)]
            command += ["--frames", str(args.frames)]
            # what Ray says is not of interest here
            subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=True)
            found[proxy] = json.loads(out.read_text(encoding="utf-8"))
    for size in SIZES:
        for proxy, ways in found.items():
            line = "   ".join(
                f"{name} {way[str(size)]['p50']:6.2f} / {way[str(size)]['p99']:6.2f}"
                for name, way in ways.items()
            )
            print(f"{size // 1000:4} kB  {proxy:<8} {line}   (ms, p50 / p99)")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
