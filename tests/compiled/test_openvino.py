"""OpenVINO's UNets against ComfyUI itself; and which of the two runs where both could."""

import itertools
import time

import pytest
import tiny
import torch
from compiled_models import call, lora

pytestmark = pytest.mark.comfy
pytest.importorskip("onnx")
pytest.importorskip("openvino")

# as those of test_onnx.py; a shape costs a compilation here, so rows and sizes come in pairs
SHAPES = [
    (rows, size, tokens)
    for (rows, size), tokens in zip(
        itertools.product((1, 2, 5, 8), ((8, 8), (16, 24))), itertools.cycle((77, 154))
    )
]


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def unet_of(patcher):
    """The UNet of a MODEL, its weights loaded."""
    import comfy.model_management
    from livediffusion.host.models.unet import ComfyUNet

    comfy.model_management.load_models_gpu([patcher], force_patch_weights=True)
    return ComfyUNet(patcher.model.diffusion_model)


def engine(unet, asked, precision="default", folder=None, note=lambda text: None):
    """OpenVINO made for this call."""
    from livediffusion.compiled.engine import Shapes
    from livediffusion.compiled.ov.network import Asked
    from livediffusion.compiled.ov.unet import OpenVino

    made = OpenVino(Asked("CPU", precision, folder), note)
    made.prepare(unet, Shapes.of(asked))
    return made


@pytest.mark.parametrize(
    "control", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "controlnet"]
)
@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_equals_eager(layout, control, comfyui):
    """Every number of rows, size and prompt length, of one export."""
    patcher = tiny.model(layout=layout)
    unet = unet_of(patcher)
    for rows, size, tokens in SHAPES:
        asked = call(patcher, rows, size, tokens, control=control, seed=rows)
        made = engine(unet, asked)
        assert tiny.rms(made(asked), unet(asked)) <= 1e-5, (rows, size, tokens)
