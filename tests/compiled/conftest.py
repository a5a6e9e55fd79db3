"""TensorRT's double in the place of TensorRT, and a models folder of the test's own."""

import sys

import pytest

GPU = {"gpu": "Double GPU", "capability": "8.9", "cuda_driver": 12}


@pytest.fixture
def trt(comfyui, tmp_path, monkeypatch):
    """TensorRT 10.16 on a GPU of its own, as far as the adapter can tell."""
    import folder_paths
    import tensorrt_double
    from livediffusion.compiled.trt import api

    double = tensorrt_double.make()
    monkeypatch.setitem(sys.modules, "tensorrt", double)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)  # as if it were not installed
    monkeypatch.setattr(api, "gpu", lambda: dict(GPU))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    return double


@pytest.fixture
def at_once(comfyui, monkeypatch):
    """Weights count as settled at once."""
    import torch
    from livediffusion.host.models import engines
    from livediffusion.host.sampling import recordings

    monkeypatch.setattr(recordings, "REST", 0.0)
    monkeypatch.setattr(engines, "REST", 0.0)
    with torch.inference_mode():
        yield
