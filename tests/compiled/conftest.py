"""TensorRT's double in the place of TensorRT, and a models folder of the test's own."""

import shutil
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


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    """Files that were exported for a test, by what they are of."""
    return {}, tmp_path_factory.mktemp("exports")


@pytest.fixture
def exported_once(comfyui, monkeypatch, exports):
    """One network with the same weights, in the same shapes, is exported once."""
    from livediffusion.compiled import onnx_export
    from livediffusion.compiled.exports import _digest

    files, folder = exports
    export = onnx_export.export

    def known(unet, call, path, dtype, dynamic=frozenset(), external=1 << 30, named=False):
        # this refuses what cannot be exported
        module = unet.traceable(dtype).module
        shapes = tuple((name, tensor.shape) for name, tensor in call.named().items())
        key = _digest(module), shapes, dtype, dynamic, external, named
        if call.memory is not None:
            return export(unet, call, path, dtype, dynamic, external, named)
        if key not in files:
            made = export(unet, call, path, dtype, dynamic, external, named)
            files[key] = shutil.copy(path, folder / f"{len(files)}.onnx"), made.weights
        file, weights = files[key]
        shutil.copy(file, path)
        return onnx_export.Exported(path, dict(weights))

    monkeypatch.setattr(onnx_export, "export", known)
