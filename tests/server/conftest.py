"""Real ComfyUI servers with the pack linked in, one for each version in the cache."""

import dataclasses
import json
import pathlib
import re
import urllib.error
import urllib.request

import pytest
from serving import load_run, serving

RUN = load_run()
CACHE = RUN.setup.CACHE / "comfyui"

# reports from inside the server: whose module is whose, and what was logged
PRESTARTUP = """
import logging, sys
records = []
class Keep(logging.Handler):
    def emit(self, record):
        records.append([record.levelname, record.name, record.pathname, record.getMessage()])
logging.getLogger().addHandler(Keep(logging.WARNING))
sys.live_probe_records = records
"""
PROBE = """
import logging, pathlib, sys, time
import psutil
from aiohttp import web
from comfy_api.latest import ComfyExtension
from server import PromptServer

@PromptServer.instance.routes.get("/probe")
async def probe(request):
    files = {n: getattr(m, "__file__", None) or "" for n, m in list(sys.modules.items())}
    return web.json_response(
        {"modules": files, "records": sys.live_probe_records, "compiled": compiled, "crowd": crowd}
    )

logging.getLogger("probe").warning("the probe listens")

# what the pack's own source takes to compile, here and now
pack = pathlib.Path(__file__).parents[1] / "ComfyUI-LiveDiffusion"
rooms = ("nodes", "host", "live", "compiled", "schedules", "engine", "kernels")
sources = [f.read_text() for room in rooms for f in (pack / room).rglob("*.py")]
began = time.process_time()
for source in sources:
    compile(source, "pack", "exec")
compiled = time.process_time() - began
# how many times as long as alone everything has taken this process so far
crowd = max(1.0, (time.time() - psutil.Process().create_time()) / time.process_time())

class Nothing(ComfyExtension):
    async def get_node_list(self):
        return []

async def comfy_entrypoint():
    return Nothing()
"""


@dataclasses.dataclass
class Server:
    """A running ComfyUI; `primary` is the version on which all is tested, not the short part."""

    version: str
    primary: bool
    url: str
    base: pathlib.Path
    log_file: pathlib.Path
    start_up: dict = dataclasses.field(default_factory=dict)  # the probe's answer before any work

    @property
    def log(self) -> str:
        text = self.log_file.read_text(encoding="utf-8", errors="replace")
        return re.sub(r"\x1b\[[0-9;]*m", "", text)

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a GET."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def json(self, path: str):
        status, body = self.get(path)
        assert status == 200, f"{path}: {status}"
        return json.loads(body)

    def post(self, path: str, data: dict) -> tuple[int, dict]:
        """Status and JSON answer of a POST."""
        request = urllib.request.Request(
            self.url + path, json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return reply.status, json.loads(reply.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())


@pytest.fixture(scope="session", params=[RUN.PRIMARY, *RUN.ALSO])
def server(request, comfyui, tmp_path_factory):
    """ComfyUI with the pack and a probe; COMFYUI_PATH stands for the primary version."""
    path, primary = CACHE / request.param, request.param == RUN.PRIMARY
    if primary and not path.is_dir():
        path = comfyui
    if not (path / "main.py").is_file():
        pytest.skip(f"ComfyUI {request.param} is not in {CACHE}")
    base = tmp_path_factory.mktemp("comfyui")
    probe = base / "custom_nodes" / "probe"
    probe.mkdir(parents=True)
    (probe / "__init__.py").write_text(PROBE, encoding="utf-8")
    (probe / "prestartup_script.py").write_text(PRESTARTUP, encoding="utf-8")
    with serving(path, base) as (port, _, log):
        running = Server(request.param, primary, f"http://127.0.0.1:{port}", base, log)
        running.start_up = running.json("/probe")
        yield running
