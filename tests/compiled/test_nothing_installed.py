"""Without any optional package the pack loads, runs, and says what to install."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

TESTS = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = """
import json, sys
for name in ("tensorrt", "tensorrt_rtx", "triton", "onnx", "onnxruntime", "openvino"):
    sys.modules[name] = None  # importing it fails, and it is not found
sys.argv = sys.argv[:1]
import conftest, tiny, torch, asyncio
from livediffusion.nodes.extension import LiveDiffusionExtension
nodes = {n.__name__: n for n in asyncio.run(LiveDiffusionExtension().get_node_list())}
told = {"nodes": sorted(nodes)}
combo = lambda node: next(i for i in nodes[node].define_schema().inputs if i.id == "engine").options
told["loader"], told["engines"] = combo("LiveTensorRTLoader"), combo("LiveCompile")
hidden = type("Hidden", (), {"unique_id": None})
nodes["LiveCompile"].hidden = nodes["LiveTensorRTBuild"].hidden = hidden
model = tiny.model()
told["auto"] = json.loads(nodes["LiveCompile"].execute(model, "auto").ui["livediffusion_engine"][0])
for engine in ("onnxruntime", "openvino", "cudagraph"):
    try:
        nodes["LiveCompile"].execute(model, engine)
    except ValueError as error:
        told[engine] = str(error)
try:
    nodes["LiveTensorRTBuild"].execute(model, 64, 64, 1, 77, False, "fp32", "x", False, False)
except ValueError as error:
    told["build"] = str(error)
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(comfyui):
    command = [sys.executable, "-c", SCRIPT]
    surroundings = {**os.environ, "COMFYUI_PATH": str(comfyui), "PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_everything_is_registered(told):
    assert {"LiveCompile", "LiveTensorRTBuild", "LiveTensorRTLoader", "LiveCamera"} <= set(
        told["nodes"]
    )


def test_what_to_install_is_said(told):
    assert told["loader"][0].startswith("tensorrt not installed: pip install tensorrt")
    assert told["engines"] == ["auto", "cudagraph", "inductor", "onnxruntime", "openvino", "eager"]
    assert told["auto"]["engine"] == "eager"
    assert "pip install onnx onnxruntime" in told["onnxruntime"]
    assert "pip install openvino onnx" in told["openvino"]
    assert told["cudagraph"].startswith("engine: cudagraph cannot be used here")
    assert told["build"].startswith("The engine was not built: tensorrt not installed")
