"""Live Compile VAE: an ordinary VAE for stock nodes and ours, its network on an engine."""

import logging

import pytest
import tiny
import torch
import vaes

pytestmark = pytest.mark.comfy
pytest.importorskip("onnx")
pytest.importorskip("openvino")


@pytest.fixture(autouse=True)
def inference(comfyui):
    from livediffusion.nodes.compiled_vae import LiveCompileVAE

    LiveCompileVAE.hidden = type("Hidden", (), {"unique_id": None})
    with torch.inference_mode():
        yield


@pytest.fixture
def node(monkeypatch, tmp_path):
    """(the node's function, what it has said)."""
    from livediffusion.nodes import compiled_vae

    said = []
    monkeypatch.setattr(compiled_vae, "teller", lambda node: said.append)
    monkeypatch.setattr(compiled_vae, "kept_folder", lambda: tmp_path)
    return lambda *asked: compiled_vae.LiveCompileVAE.execute(*asked).result[0], said


@pytest.fixture(scope="module")
def taesd(comfyui):
    return vaes.taesd()


def test_stock_nodes_and_ours_see_the_same_vae(taesd, node):
    from livediffusion.host.frames import vae as frames

    import nodes

    execute, said = node
    vae = execute(taesd, "openvino")
    image = torch.rand(1, 64, 48, 3, generator=torch.Generator().manual_seed(0))
    latent = nodes.VAEEncode().encode(taesd, image)[0]["samples"]
    picture = nodes.VAEDecode().decode(taesd, {"samples": latent})[0]
    assert picture.std() > 0.01
    for encoded in (nodes.VAEEncode().encode(vae, image)[0]["samples"], frames.encode(vae, image)):
        assert tiny.rms(encoded, latent) <= 1e-5
    for decoded in (
        nodes.VAEDecode().decode(vae, {"samples": latent})[0], frames.decode(vae, latent)
    ):  # fmt: skip
        assert tiny.rms(decoded, picture) <= 1e-5
    stage = vae.first_stage_model
    assert (stage.ran, stage.fell_back) == (4, 0)
    assert said[-1].startswith("openvino; relative error against the VAE itself: encode ")
    assert max(stage.errors.values()) <= 1e-5
    # the first one is as it was, and an engine can be taken off again
    assert type(taesd.first_stage_model).__name__ == "TAESD"
    assert execute(vae, "eager").first_stage_model is taesd.first_stage_model
    assert vae.get_sd().keys() == taesd.get_sd().keys()


def test_less_precision_tells_its_error(taesd, node):
    from livediffusion.compiled.ov import api

    if api.refused(torch.device("cpu"), "auto", "bfloat16"):
        pytest.skip("this processor does not multiply bfloat16")
    execute, said = node
    vae = execute(taesd, "openvino", "bfloat16")
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert tiny.rms(vae.decode(latent), taesd.decode(latent)) <= 5e-2
    assert 1e-5 < vae.first_stage_model.errors["decode"] <= 5e-2
    assert said[-1].startswith("openvino in bfloat16; relative error against the VAE itself")


def test_vaes_that_gain_nothing_run_as_they_are(node):
    from livediffusion.demo import loader

    execute, said = node
    _, _, embedded = loader.load()
    out = execute(embedded, "openvino")
    assert out.first_stage_model is embedded.first_stage_model
    assert said == ["this VAE only rearranges pixels, so there is nothing to run faster"]

    class Other:
        first_stage_model, device = torch.nn.Identity(), torch.device("cpu")

    execute(Other(), "openvino")
    assert said[-1] == "Identity runs as it is; only TAESD is compiled"


def test_a_failure_never_stops_the_picture(taesd, caplog):
    from livediffusion.host.frames.compiled_vae import compiled

    class Failing:
        name, precision, settled = "own", "default", True
        made = released = 0

        def prepare(self, network, x):
            Failing.made += 1

        def __call__(self, x):
            raise RuntimeError("kernel exploded")

        def release(self):
            Failing.released += 1

    said = []
    vae = compiled(taesd, Failing, said.append)
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(vae.decode(latent), taesd.decode(latent))
    assert (Failing.made, Failing.released) == (1, 1) and vae.first_stage_model.fell_back == 3
    assert said == ["the VAE runs as it is: RuntimeError: kernel exploded"]
    assert caplog.text.count("kernel exploded") == 1


def test_sizes_are_bounded(taesd):
    from livediffusion.host.frames import compiled_vae

    class Plain:
        name, precision, settled = "own", "default", True
        alive = 0

        def prepare(self, network, x):
            Plain.alive += 1
            self.network = network

        def __call__(self, x):
            return self.network(x)

        def release(self):
            Plain.alive -= 1

    vae = compiled_vae.compiled(taesd, Plain, lambda text: None)
    for side in range(1, 8):
        latent = torch.randn(1, 4, side, 8, generator=torch.Generator().manual_seed(0))
        assert tiny.rms(vae.decode(latent), taesd.decode(latent)) <= 1e-6
    assert Plain.alive == 4


def test_what_cannot_be_is_refused_by_its_input(taesd, node):
    execute, _ = node
    with pytest.raises(ValueError, match=r"^device: OpenVINO finds no NPU here"):
        execute(taesd, "openvino", "default", "NPU")
    with pytest.raises(ValueError, match=r"^precision: eager has the VAE's own"):
        execute(taesd, "eager", "int8")


def test_nothing_wired_is_told(node):
    with pytest.raises(ValueError, match="vae: nothing came in"):
        node[0](None, "auto")
