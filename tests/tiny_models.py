"""What tests of streams that remember share: tiny models, and how they are run."""

import functools

import pytest


@functools.cache
def tiny_model(layout="SD1.5"):
    """A MODEL, the same one within a file; what inference mode made does not cross files."""
    import coherent

    return coherent.model(layout)


@pytest.fixture(scope="module", autouse=True)
def forget():
    """ComfyUI's patchers complain if they outlive the interpreter's modules."""
    yield
    tiny_model.cache_clear()


@pytest.fixture(autouse=True)
def inference(comfyui):
    import torch

    with torch.inference_mode():
        yield
