"""The pack in a running ComfyUI: its nodes as saved workflows know them, and good manners."""

import importlib.util
import pathlib
import re

import pytest
import torch

pytestmark = [pytest.mark.comfy, pytest.mark.server]

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACK = "ComfyUI-LiveDiffusion"

# the saved-workflow format: append only, never rename, reorder or remove.
# id: (required inputs, optional inputs, outputs); an input is (id, type, default)
NODES = {
    "LiveCamera": (
        [
            ("source", "COMBO", "browser"),
            ("file", "COMBO", None),
            ("width", "INT", 512),
            ("height", "INT", 512),
            ("fit", "COMBO", "crop"),
            ("fps", "INT", 30),
            ("mirror", "BOOLEAN", True),
            ("loop", "BOOLEAN", True),
        ],
        # graphs saved before they were there lack them
        [("device", "STRING", ""), ("address", "STRING", ""), ("sender", "STRING", "")],
        ["IMAGE", "INT"],
    ),
    "LiveView": (
        [
            ("image", "IMAGE", None),
            ("quality", "INT", 85),
            ("record", "BOOLEAN", False),
            ("filename_prefix", "STRING", "live/recording"),
        ],
        [],
        [],
    ),
    "LiveSend": (
        [
            ("image", "IMAGE", None),
            ("to", "COMBO", "virtual camera"),
            ("name", "STRING", ""),
            ("address", "STRING", ""),
            ("fps", "INT", 30),
            ("bit_rate", "FLOAT", 6.0),
        ],
        [],
        [],
    ),
    "LiveRun": ([("session", "STRING", "")], [], []),
    "LiveKeep": (
        [("value", "COMFY_MATCHTYPE_V3", None), ("name", "STRING", "feedback")],
        [],
        ["COMFY_MATCHTYPE_V3"],
    ),
    "LiveLast": (
        [("name", "STRING", "feedback"), ("first", "COMFY_MATCHTYPE_V3", None)],
        [],
        ["COMFY_MATCHTYPE_V3"],
    ),
    "LiveStreamSampler": (
        [
            ("guider", "GUIDER", None),
            ("sigmas", "SIGMAS", None),
            ("latent", "LATENT", None),
            ("noise_seed", "INT", 0),
            ("step_rule", "COMBO", "lcm"),
            ("frames_per_slot", "INT", 1),
            ("mode", "COMBO", "live"),
            ("conditioning", "COMBO", "per frame"),
            ("add_noise", "BOOLEAN", True),
        ],
        [("noise", "NOISE", None)],
        ["LATENT"],
    ),
    "LiveStreamBatch": (
        [("step_rule", "COMBO", "lcm"), ("frames_per_slot", "INT", 1)],
        [],
        ["SAMPLER"],
    ),
    "LiveRCFGGuider": (
        [
            ("model", "MODEL", None),
            ("positive", "CONDITIONING", None),
            ("cfg", "FLOAT", 1.4),
            ("delta", "FLOAT", 1.0),
            ("mode", "COMBO", "self-negative"),
        ],
        [("negative", "CONDITIONING", None)],
        ["GUIDER"],
    ),
    "LiveFutureAttention": (
        [("model", "MODEL", None), ("levels", "COMBO", "all but the finest")], [], ["MODEL"],
    ),
    "LiveMemory": (
        [
            ("model", "MODEL", None),
            ("preset", "COMBO", "calm"),
            ("frames", "INT", 1),
            ("interval", "INT", 4),
            ("bank", "COMBO", "merged"),
            ("fuse", "FLOAT", 0.0),
            ("threshold", "FLOAT", 0.98),
            ("levels", "COMBO", "all but the finest"),
            ("carry", "FLOAT", 0.85),
        ],
        [],
        ["MODEL"],
    ),
    "LiveReuse": (
        [
            ("model", "MODEL", None), ("interval", "INT", 4), ("depth", "COMBO", "finest level"),
            ("awake", "FLOAT", 0.5),
        ],
        [],
        ["MODEL"],
    ),
    "LivePatchwork": (
        [("model", "MODEL", None), ("threshold", "FLOAT", 0.1), ("grow", "INT", 1)], [], ["MODEL"]
    ),
    "LiveFlowNoise": (
        [("image", "IMAGE", None), ("noise_seed", "INT", 0)],
        [("flow", "IMAGE", None)],
        ["NOISE"],
    ),
    "LivePFDiff": ([("base", "COMBO", "euler"), ("k", "INT", 1), ("h", "INT", 1)], [], ["SAMPLER"]),
    "LivePromptBlend": (
        [
            ("a", "CONDITIONING", None),
            ("b", "CONDITIONING", None),
            ("weight", "FLOAT", 0.5),
            ("method", "COMBO", "slerp"),
        ],
        [],
        ["CONDITIONING"],
    ),
    "LiveTimesteps": (
        [("model", "MODEL", None), ("indices", "STRING", "18, 26, 35, 45"), ("grid", "INT", 50)],
        [],
        ["SIGMAS"],
    ),
    "LiveStrength": (
        [
            ("model", "MODEL", None),
            ("steps", "INT", 4),
            ("strength", "FLOAT", 0.6),
            ("spacing", "COMBO", "uniform t"),
        ],
        [],
        ["SIGMAS"],
    ),
    "LiveOptimizedSteps": (
        [
            ("model", "MODEL", None),
            ("solver", "COMBO", "unipc"),
            ("steps", "INT", 5),
            ("strength", "FLOAT", 1.0),
        ],
        [],
        ["SIGMAS"],
    ),
    "LiveLearnedSteps": (
        [
            ("model", "MODEL", None),
            ("positive", "CONDITIONING", None),
            ("cfg", "FLOAT", 1.0),
            ("solver", "COMBO", "dpmpp_2m"),
            ("steps", "INT", 4),
            ("samples", "INT", 16),
            ("iterations", "INT", 8),
            ("seed", "INT", 0),
            ("strength", "FLOAT", 1.0),
            ("result", "COMBO", "find"),
            ("time_shift", "BOOLEAN", False),
        ],
        [("negative", "CONDITIONING", None), ("latent", "LATENT", None)],
        ["SIGMAS", "MODEL"],
    ),
    "LiveSearchedSteps": (
        [
            ("model", "MODEL", None),
            ("positive", "CONDITIONING", None),
            ("cfg", "FLOAT", 1.0),
            ("solver", "COMBO", "dpmpp_2m"),
            ("steps", "INT", 4),
            ("population", "INT", 20),
            ("generations", "INT", 12),
            ("seed", "INT", 0),
            ("samples", "INT", 16),
            ("strength", "FLOAT", 1.0),
            ("result", "COMBO", "find"),
            ("objective", "COMBO", "match the fine solution"),
        ],
        [
            ("negative", "CONDITIONING", None),
            ("latent", "LATENT", None),
            ("pictures", "LATENT", None),
            ("skip_up_to", "FLOAT", 0.0),
        ],
        ["SIGMAS", "MODEL"],
    ),
    "LiveSimilarityFilter": (
        [
            ("image", "IMAGE", None),
            ("processed", "IMAGE", None),
            ("threshold", "FLOAT", 0.98),
            ("max_skip", "INT", 10),
            ("settle", "INT", 3),
            ("measure", "COMBO", "centred"),
            ("seed", "INT", 0),
        ],
        [],
        ["IMAGE", "BOOLEAN"],
    ),
    "LiveEncode": ([("pixels", "IMAGE", None), ("vae", "VAE", None)], [], ["LATENT"]),
    "LiveDecode": ([("samples", "LATENT", None), ("vae", "VAE", None)], [], ["IMAGE"]),
    "LiveCompile": (
        [
            ("model", "MODEL", None),
            ("engine", "COMBO", "auto"),
        ],
        # graphs saved before they were there lack them
        [("precision", "COMBO", "default"), ("device", "COMBO", "auto")],
        ["MODEL"],
    ),
    "LiveCompileVAE": (
        [
            ("vae", "VAE", None),
            ("engine", "COMBO", "auto"),
        ],
        # graphs saved before they were there lack them
        [("precision", "COMBO", "default"), ("device", "COMBO", "auto")],
        ["VAE"],
    ),
    "LiveTensorRTBuild": (
        [
            ("model", "MODEL", None),
            ("width", "INT", 512),
            ("height", "INT", 512),
            ("rows", "INT", 4),
            ("context_tokens", "INT", 77),
            ("controlnet", "BOOLEAN", False),
            ("precision", "COMBO", "fp16"),
            ("name", "STRING", "unet"),
            ("dynamic_size", "BOOLEAN", False),
            ("refit", "BOOLEAN", False),
        ],
        [("library", "COMBO", "auto"), ("targets", "COMBO", "this GPU")],
        ["STRING"],
    ),
    "LiveTensorRTLoader": (
        [("engine", "COMBO", None), ("rebuild", "BOOLEAN", False)],
        [("model", "MODEL", None)],
        ["MODEL"],
    ),
    "LiveDemoModel": ([], [], ["MODEL", "CLIP", "VAE"]),
}
OPTIONS = {
    ("LiveCamera", "source"): [
        *("browser", "file", "screen", "device", "address", "ndi", "spout", "syphon", "phone"),
        "whip",
    ],
    ("LiveSend", "to"): ["virtual camera", "ndi", "spout", "syphon", "stream", "whip"],
    ("LiveCamera", "file"): ["none"],
    ("LiveCamera", "fit"): ["crop", "pad", "stretch"],
    ("LiveStreamSampler", "step_rule"): ["lcm", "euler", "dpmpp_2m", "unipc", "deis", "pfdiff-1_1"],
    ("LiveStreamSampler", "mode"): ["live", "clip"],
    ("LiveStreamSampler", "conditioning"): ["per frame", "immediate"],
    ("LiveStreamBatch", "step_rule"): ["lcm", "euler", "dpmpp_2m", "unipc", "deis", "pfdiff-1_1"],
    ("LiveRCFGGuider", "mode"): ["self-negative", "onetime-negative", "full", "off"],
    ("LiveOptimizedSteps", "solver"): ["unipc", "dpmpp_2m", "euler"],
    ("LiveLearnedSteps", "solver"): ["euler", "dpmpp_2m", "unipc", "deis", "pfdiff-1_1"],
    ("LiveSearchedSteps", "objective"): ["match the fine solution", "match pictures"],
    ("LivePFDiff", "base"): ["euler"],
    ("LiveFutureAttention", "levels"): ["all but the finest", "all", "deepest", "off"],
    ("LiveMemory", "preset"): ["calm", "calmer", "off", "custom"],
    ("LiveMemory", "bank"): ["merged", "queue"],
    ("LiveReuse", "depth"): ["outermost block", "two blocks", "finest level"],
    ("LiveMemory", "levels"): ["all but the finest", "all", "deepest"],
    ("LivePromptBlend", "method"): ["slerp", "lerp"],
    ("LiveSimilarityFilter", "measure"): ["centred", "cosine"],
    ("LiveCompile", "engine"): [
        *("auto", "cudagraph", "inductor", "onnxruntime", "openvino", "eager"),
    ],
    ("LiveCompile", "precision"): ["default", "float16", "bfloat16", "int8"],
    ("LiveCompile", "device"): ["auto", "CPU", "GPU", "NPU"],
    ("LiveTensorRTBuild", "precision"): ["fp16", "bf16", "fp32"],
}


@pytest.fixture(scope="module")
def info(server):
    return server.json("/object_info")


def test_every_node_is_registered_and_no_other(info):
    ours = {name for name, node in info.items() if PACK in node["python_module"]}
    assert ours == set(NODES)


@pytest.mark.parametrize("name", NODES)
def test_inputs_and_outputs_are_the_saved_format(info, name):
    node = info[name]
    required, optional, outputs = NODES[name]
    for kind, expected in (("required", required), ("optional", optional)):
        order = node["input_order"].get(kind, [])
        assert order == [i for i, _, _ in expected]
        shown = node["input"].get(kind, {})
        assert list(shown) == order
        for i, type_, default in expected:
            assert shown[i][0] == type_, i
            assert shown[i][1].get("default") == default, i
            assert name == "LiveRun" or len(shown[i][1]["tooltip"]) > 10, i
    assert node["output"] == outputs
    assert node["category"].startswith("live/") or name == "LiveRun"
    assert len(node["description"]) > 20
    for (owner, i), options in OPTIONS.items():
        if owner == name:
            shown = node["input"]["required"] | node["input"].get("optional", {})
            assert shown[i][1]["options"][: len(options)] == options


def test_the_loader_says_what_to_install(info):
    """This machine has no TensorRT, or no GPU: the list of engines is what to do about it."""
    (said,) = info["LiveTensorRTLoader"]["input"]["required"]["engine"][1]["options"]
    if importlib.util.find_spec("tensorrt_rtx") is None:
        assert said.startswith("tensorrt not installed: pip install tensorrt")
    elif not torch.cuda.is_available():
        assert said == "TensorRT needs an NVIDIA GPU, and torch sees none here"


def test_optional_packages_stay_out_until_a_node_needs_them(server):
    names = {name.partition(".")[0] for name in server.start_up["modules"]}
    assert "torch" in names
    # triton comes with torchvision, which ComfyUI imports
    assert not names & {
        "tensorrt", "tensorrt_rtx", "onnx", "onnxruntime", "openvino", "segno", "aiortc", "NDIlib",
        "pyvirtualcam", "SpoutGL", "syphon", "cryptography", "trustme",
    }  # fmt: skip


def test_a_skipped_picture_is_not_asked_for(info):
    assert info["LiveSimilarityFilter"]["input"]["required"]["processed"][1]["lazy"] is True


def test_the_internal_node_is_not_offered(info):
    node = info["LiveRun"]
    assert node.get("dev_only") or node.get("deprecated")


def test_start_up_is_quick(server):
    """Some times what the pack's own source takes to compile: nothing big is imported with it."""
    found = re.findall(rf"([\d.]+) seconds( \(IMPORT FAILED\))?: .*{PACK}", server.log)
    assert len(found) == 1, server.log
    seconds, failed = found[0]
    assert not failed
    compiled, crowd = server.start_up["compiled"], server.start_up["crowd"]
    assert float(seconds) / crowd < 0.6 + 3 * compiled, (seconds, compiled, crowd)


def test_the_log_holds_no_complaint(server):
    assert "IMPORT FAILED" not in server.log
    assert any(record[3] == "the probe listens" for record in server.start_up["records"])
    homes = (f"{server.base / 'custom_nodes' / PACK}/", f"{ROOT}/")
    complaints = [
        record
        for record in server.start_up["records"]
        if record[2].startswith(homes) or "livediffusion" in f"{record[1]} {record[3]}".lower()
    ]
    assert complaints == []


def test_no_top_level_module_is_taken(server):
    """ComfyUI owns `nodes`; ours are all below the name that ComfyUI gave the pack."""
    modules = server.start_up["modules"]
    assert pathlib.Path(modules["nodes"]).name == "nodes.py"
    assert PACK not in modules["nodes"]
    link = server.base / "custom_nodes" / PACK
    ours = {name: f for name, f in modules.items() if f.startswith((f"{link}/", f"{ROOT}/"))}
    assert any(name.endswith(".engine.ring") for name in ours)
    root = next(name for name, file in ours.items() if file == str(link / "__init__.py"))
    assert [name for name in ours if name != root and not name.startswith(f"{root}.")] == []


def test_workflows_are_templates_with_pictures(server):
    names = sorted(server.json("/workflow_templates")[PACK])
    assert names == [
        "clip_stylise",
        "image_to_image_sd_turbo",
        "lcm_lora_4_steps_rcfg",
        "live_screen",
        "live_to_obs",
        "live_webcam",
        "live_webcam_calm",
        "live_webcam_sd_turbo",
        "live_webcam_similarity_filter",
    ]
    for name in names:
        assert server.json(f"/api/workflow_templates/{PACK}/{name}.json")["nodes"]
        status, picture = server.get(f"/api/workflow_templates/{PACK}/{name}.jpg")
        assert status == 200
        assert picture[:3] == b"\xff\xd8\xff"


@pytest.mark.parametrize("name", NODES)
def test_help_page_is_served(server, name):
    status, page = server.get(f"/extensions/{PACK}/docs/{name}.md")
    assert status == 200
    assert len(page.decode("utf-8")) > 200


def test_scripts_are_listed_once(server):
    ours = [path for path in server.json("/extensions") if "live" in path.lower()]
    expected = list((ROOT / "web").rglob("*.js"))
    assert len(ours) == len(set(ours)) == len(expected)
