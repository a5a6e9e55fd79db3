"""The sampling nodes: what they refuse, in which words, and that the stream goes on."""

import types

import pytest
import torch

pytestmark = pytest.mark.comfy

LEVELS = torch.tensor([8.0, 3.0, 1.2, 0.0])


@pytest.fixture(scope="module")
def world():
    import tiny
    from livediffusion.host.registry import streams
    from livediffusion.nodes import sampling

    return types.SimpleNamespace(
        tiny=tiny, model=tiny.model(), streams=streams, nodes=sampling
    )  # fmt: skip


def guider(world, **kwargs):
    values = {"cfg": 1.4, "delta": 1.0, "mode": "self-negative"} | kwargs
    return world.nodes.LiveRCFGGuider.execute(
        world.model, world.tiny.conditioning(1), **values
    ).args[0]


def sample(world, node_id="7", workflow="w", **kwargs):
    """LiveStreamSampler as ComfyUI calls it: on a clone of the class with its hidden inputs."""
    import comfy_api.latest._io as _io

    node = world.nodes.LiveStreamSampler
    hidden = {
        _io.Hidden.unique_id: node_id,
        _io.Hidden.extra_pnginfo: {"workflow": {"id": workflow}},
    }
    clone = node.PREPARE_CLASS_CLONE({"hidden_inputs": hidden})
    values = {
        "guider": None, "sigmas": LEVELS, "latent": {"samples": world.tiny.latents(1)},
        "noise_seed": 1, "step_rule": "lcm", "frames_per_slot": 1, "mode": "live",
        "conditioning": "per frame", "add_noise": True,
    } | kwargs  # fmt: skip
    values["guider"] = values["guider"] or guider(world)
    return clone.execute(**values)


BAD = {
    "one level": ({"sigmas": torch.tensor([1.0])}, r"sigmas: 1 noise levels are too few"),
    "no level": ({"sigmas": torch.tensor([])}, r"sigmas: 0 noise levels are too few"),
    "rising": ({"sigmas": LEVELS.flip(0)}, r"sigmas: levels must fall"),
    "equal": ({"sigmas": torch.tensor([2.0, 2.0, 0.0])}, r"sigmas: levels must fall"),
    "negative level": ({"sigmas": torch.tensor([2.0, -1.0])}, r"sigmas: .* at 0 or above"),
    "level not finite": ({"sigmas": torch.tensor([float("inf"), 1.0])}, r"sigmas: .*finite"),
    "levels of two rows": ({"sigmas": LEVELS[None]}, r"sigmas: expected one row"),
    "rank": ({"latent": {"samples": torch.zeros(4, 8, 8)}}, r"latent: expected 4 dimensions"),
    "channels": ({"latent": {"samples": torch.ones(1, 16, 8, 8)}}, r"latent: 16 channels"),
    "no frame": ({"latent": {"samples": torch.zeros(0, 4, 8, 8)}}, r"latent: the batch holds no"),
    "nothing": ({"latent": {"samples": None}}, r"latent: the batch holds no frame"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_names_the_input_and_the_stream_goes_on(world, what):
    wrong, message = BAD[what]
    frames = [{"samples": f} for f in world.tiny.latents(6).split(1)]
    calm, disturbed = [], []
    for out, node_id in ((calm, f"calm {what}"), (disturbed, f"disturbed {what}")):
        for i, latent in enumerate(frames):
            if out is disturbed and i == 4:
                with pytest.raises(ValueError, match=message):
                    sample(world, node_id, **({"latent": latent} | wrong))
            out.append(sample(world, node_id, latent=latent).args[0]["samples"])
    assert torch.equal(torch.cat(calm), torch.cat(disturbed))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_live_stream_goes_on_without_a_frame_that_is_not_finite(world, value):
    """As it does on a GPU, where nobody looks before: it is replaced, and counted."""
    node_id, dropped = f"live {value}", []
    for i, frame in enumerate(world.tiny.latents(8).split(1)):
        bad = torch.full_like(frame, value) if i in (2, 3) else frame
        out = sample(world, node_id, latent={"samples": bad}).args[0]["samples"]
        assert torch.isfinite(out).all()
        stream = next(s for k, s in world.streams._states.items() if k.execution == node_id)
        dropped.append(int(stream.stats()["dropped"]))
    assert dropped[:2] == [0, 0] and dropped[-1] >= 2 and dropped[-1] == dropped[4]


def test_nan_names_the_frames(world):
    samples = world.tiny.latents(9)
    samples[3, 0, 0, 0] = float("nan")
    samples[7, 1] = float("inf")
    with pytest.raises(ValueError, match=r"latent: frame 3, 7 of 9"):
        sample(world, "nan", latent={"samples": samples}, mode="clip")


@pytest.mark.parametrize("mode", ["full", "onetime-negative"])
def test_guidance_that_needs_a_negative_says_so(world, mode):
    with pytest.raises(ValueError, match=r"negative: mode .* needs a negative"):
        guider(world, mode=mode)


@pytest.mark.parametrize("mode", ["self-negative", "off"])
def test_the_other_modes_need_none_and_mind_none(world, mode):
    with_one = guider(world, mode=mode, negative=world.tiny.conditioning(2))
    a = sample(world, "a", guider=with_one, mode="clip").args[0]["samples"]
    b = sample(world, "b", guider=guider(world, mode=mode), mode="clip").args[0]["samples"]
    assert torch.equal(a, b)


def test_empty_latent_is_fitted_as_stock_nodes_do(world):
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    out = sample(world, "empty", latent=latent, mode="clip").args[0]["samples"]
    assert out.shape == (1, 4, 8, 8)
    assert torch.isfinite(out).all()


def test_latent_keeps_what_else_it_carries(world):
    latent = {"samples": world.tiny.latents(2), "batch_index": [4, 5], "type": "x"}
    out = sample(world, "extras", latent=latent, mode="clip").args[0]
    assert (out["batch_index"], out["type"]) == ([4, 5], "x")
    assert latent["samples"] is not out["samples"]


def test_streams_of_two_nodes_and_two_workflows_do_not_mix(world):
    frames = [{"samples": f} for f in world.tiny.latents(4).split(1)]
    alone = [sample(world, "one", "A", latent=f).args[0]["samples"] for f in frames]
    for f, want in zip(frames, alone, strict=True):
        for other in (("two", "A"), ("one", "B")):
            got = sample(world, *other, latent=f).args[0]["samples"]
            assert torch.equal(got, want), "each began empty and keeps its own state"


def test_clip_leaves_the_live_state_alone(world):
    frames = [{"samples": f} for f in world.tiny.latents(6).split(1)]
    calm = [sample(world, "c1", latent=f).args[0]["samples"] for f in frames]
    mixed = []
    for f in frames:
        sample(world, "c2", latent={"samples": world.tiny.latents(3)}, mode="clip")
        mixed.append(sample(world, "c2", latent=f).args[0]["samples"])
    assert torch.equal(torch.cat(calm), torch.cat(mixed))


def test_a_clip_reports_its_counts_and_a_live_run_is_silent(world):
    out = sample(world, "ui", latent={"samples": world.tiny.latents(5)}, mode="clip")
    assert out.ui["live"] == [
        {"frames": 5, "ticks": 7, "calls": 7, "rows": 15, "dropped": 0, "overtaken": 0,
         "road": "direct", "why": ""}
    ]
    assert sample(world, "ui").ui is None


def test_another_frames_per_slot_starts_a_new_ring(world):
    for per_slot in (1, 2, 1):
        out = sample(
            world, "f", frames_per_slot=per_slot, latent={"samples": world.tiny.latents(2)}
        )
        assert out.args[0]["samples"].shape[0] == 2


def test_noise_of_slot_0_is_comfyuis_for_the_seed(world):
    import comfy.sample
    from livediffusion.engine.noise import SlotNoise

    want = comfy.sample.prepare_noise(torch.zeros(1, 4, 8, 8), 123)[0]
    assert torch.equal(SlotNoise(123, (4, 8, 8)).slot(0), want)
