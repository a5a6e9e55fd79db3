"""Live Flow Noise and the sampler's noise input, as ComfyUI calls them."""

import types

import pytest
import torch
from photographs import scene, seen

pytestmark = pytest.mark.comfy

LEVELS = torch.tensor([8.0, 3.0, 1.2, 0.0])


@pytest.fixture(scope="module")
def world():
    import tiny
    from livediffusion.nodes import flow, sampling

    return types.SimpleNamespace(tiny=tiny, model=tiny.model(), flow=flow, nodes=sampling)


def sample(world, node_id="7", **kwargs):
    import comfy_api.latest._io as _io

    node = world.nodes.LiveStreamSampler
    hidden = {
        _io.Hidden.unique_id: node_id,
        _io.Hidden.extra_pnginfo: {"workflow": {"id": "flow"}},
    }
    values = {
        "sigmas": LEVELS, "latent": {"samples": world.tiny.latents(1)}, "noise_seed": 1,
        "step_rule": "lcm", "frames_per_slot": 1, "mode": "clip", "conditioning": "per frame",
        "add_noise": True,
    } | kwargs  # fmt: skip
    guider = world.nodes.LiveRCFGGuider.execute(
        world.model, world.tiny.conditioning(1), 1.4, 1.0, "self-negative"
    ).args[0]
    clone = node.PREPARE_CLASS_CLONE({"hidden_inputs": hidden})
    return clone.execute(guider, **values).args[0]["samples"]


def camera(count):
    return torch.stack([seen(scene(0), x=6.0 * i, side=64) for i in range(count)])


def flow_noise(world, image, seed=1, flow=None):
    return world.flow.LiveFlowNoise.execute(image, seed, flow).args[0]


def test_still_pictures_are_as_if_nothing_was_wired(world):
    latent = {"samples": world.tiny.latents(3)}
    plain = sample(world, latent=latent)
    still = flow_noise(world, camera(1).expand(3, -1, -1, -1))
    # the wired seed counts
    assert torch.equal(sample(world, latent=latent, noise=still, noise_seed=99), plain)
    moving = sample(world, latent=latent, noise=flow_noise(world, camera(3)))
    assert torch.equal(moving[0], plain[0])
    assert not torch.allclose(moving[1], plain[1])


def test_a_live_stream_goes_on_from_run_to_run(world):
    """As the same frames in one clip."""
    frames, latents = camera(5), world.tiny.latents(5)
    want = sample(world, latent={"samples": latents}, noise=flow_noise(world, frames))
    got = [
        sample(
            world, "live", mode="live", latent={"samples": latents[i : i + 1]},
            noise=flow_noise(world, frames[i : i + 1]),
        )
        for i in range(5)
    ]  # fmt: skip
    for i in range(3):
        assert world.tiny.rms(got[i + 2], want[i : i + 1]) <= 1e-5


@pytest.mark.parametrize("rule", ["lcm", "euler"])
def test_random_noise_is_the_seed(world, rule):
    from comfy_extras.nodes_custom_sampler import DisableNoise, RandomNoise

    given = {"step_rule": rule, "latent": {"samples": world.tiny.latents(1)}}
    wired = sample(world, noise=RandomNoise.execute(1).args[0], noise_seed=99, **given)
    assert torch.equal(wired, sample(world, noise_seed=1, **given))
    none = sample(world, noise=DisableNoise.execute().args[0], **given)
    assert not torch.allclose(none, wired)
    if rule == "euler":
        assert world.tiny.rms(none, sample(world, add_noise=False, **given)) <= 1e-5


def test_random_noise_is_each_frames_own_in_a_clip(world):
    from comfy_extras.nodes_custom_sampler import RandomNoise

    noise, latents = RandomNoise.execute(1).args[0], world.tiny.latents(3)
    drawn = noise.generate_noise({"samples": latents})
    got = sample(world, step_rule="euler", latent={"samples": latents}, noise=noise)
    for i in range(3):

        class One:
            seed = 1

            def generate_noise(self, latent, i=i):
                return drawn[i : i + 1]

        one = {"samples": latents[i : i + 1]}
        want = sample(world, step_rule="euler", latent=one, noise=One())
        assert world.tiny.rms(got[i : i + 1], want) <= 1e-5


def test_in_comfyuis_own_sampler(world):
    """A NOISE like any other: one picture of noise per latent, which moves."""
    noise = flow_noise(world, camera(4), seed=3)
    drawn = noise.generate_noise({"samples": torch.zeros(4, 4, 8, 8)})
    assert drawn.shape == (4, 4, 8, 8) and noise.seed == 3
    assert torch.equal(drawn, noise.generate_noise({"samples": torch.zeros(4, 4, 8, 8)}))
    import comfy.sample

    assert torch.equal(drawn[:1], comfy.sample.prepare_noise(torch.zeros(1, 4, 8, 8), 3))
    # 6 pixels of the picture are 3 / 4 of the latent's: after four frames two and a quarter
    assert (drawn[3][..., :6] * drawn[0][..., 2:]).mean() > 0.5
    assert (drawn[3] * drawn[0]).mean().abs() < 0.3


class Odd:
    seed = 0

    def generate_noise(self, latent):
        return torch.zeros(1, 4, 2, 2)


REFUSED = {
    "pictures": (
        lambda world: sample(world, noise=flow_noise(world, camera(2))),
        r"noise: Live Flow Noise has 2 pictures for 1 latents\. Wire the same frames",
    ),
    "odd noise": (
        lambda world: sample(world, noise=Odd()),
        r"noise: Odd gives no noise of the latents' size \[1, 4, 8, 8\]",
    ),
    "flows": (
        lambda world: flow_noise(world, camera(2), flow=torch.zeros(1, 8, 8, 3)),
        r"flow: 1 flow images for 2 pictures\. Wire one for each",
    ),
    "channels": (
        lambda world: flow_noise(world, camera(1), flow=torch.zeros(1, 8, 8, 1)),
        r"flow: an image of one channel",
    ),
    "film latents": (
        lambda world: flow_noise(world, camera(1)).generate_noise(
            {"samples": torch.zeros(1, 4, 2, 8, 8)}
        ),
        r"noise: .* Leave noise unwired",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_words(world, case):
    ask, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        ask(world)


def test_a_stream_survives_what_is_refused(world):
    frames, latents = camera(4), world.tiny.latents(4)

    def one(node_id, i, shown):
        latent = {"samples": latents[i : i + 1]}
        noise = flow_noise(world, shown)
        return sample(world, node_id, mode="live", latent=latent, noise=noise)

    for i in range(4):
        want = one("as ever", i, frames[i : i + 1])
        with pytest.raises(ValueError, match="noise: "):
            one("refused", i, frames[:2])
        assert torch.equal(one("refused", i, frames[i : i + 1]), want)


NO_FRAMES = {
    "mask": torch.zeros(2, 8, 8), "film": torch.zeros(2, 1, 8, 8, 3), "number": torch.tensor(1.0),
    "no frame": torch.zeros(0, 8, 8, 3), "no height": torch.zeros(2, 0, 8, 3),
    "no width": torch.zeros(2, 8, 0, 3), "no pixel": torch.zeros(2, 0, 0, 3),
    "no channel": torch.zeros(2, 8, 8, 0), "bytes": torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
    "complex": torch.zeros(2, 8, 8, 3, dtype=torch.complex64),
    "sparse": torch.zeros(2, 8, 8, 3).to_sparse(), "text": "image", "int": 3, "list": [1, 2],
    "latent": {"samples": torch.zeros(2, 4, 8, 8)}, "array": torch.zeros(2, 8, 8, 3).numpy(),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_FRAMES)
def test_what_is_no_frames_is_said_at_its_input(world, kind):
    bad = NO_FRAMES[kind]
    with pytest.raises(ValueError, match=r"^image: .*\. (Connect an IMAGE|Check the node)"):
        flow_noise(world, bad)
    with pytest.raises(ValueError, match=r"^flow: .*\. (Connect an IMAGE|Check the node)"):
        flow_noise(world, camera(2), flow=bad)


def test_no_image_is_said(world):
    with pytest.raises(ValueError, match=r"^image: expected frames, got NoneType"):
        flow_noise(world, None)


SEEDS = {"None": None, "float": 1.5, "text": "7", "list": [1], "too much": 2**64,
         "too little": -(2**63) - 1, "tensor": torch.tensor([0.5])}  # fmt: skip


@pytest.mark.parametrize("kind", SEEDS)
def test_a_seed_that_is_none_is_said(world, kind):
    """Of another pack's NOISE, and of ours as it is below its node, which refuses such itself."""
    from livediffusion.engine.moving import Pictures
    from livediffusion.host.sampling.noises import FlowNoise

    odd = Odd()
    odd.seed = SEEDS[kind]
    for noise in (odd, FlowNoise(SEEDS[kind], Pictures(camera(1)))):
        with pytest.raises(ValueError, match=r"^noise: the seed of .*\. Wire Live Flow Noise"):
            sample(world, noise=noise)


@pytest.mark.parametrize("noise", [
    object(), "noise", 3, {"samples": torch.zeros(1, 4, 8, 8)}, torch.zeros(1, 4, 8, 8),
    types.SimpleNamespace(seed=1), types.SimpleNamespace(generate_noise=lambda latent: None),
])  # fmt: skip
def test_what_is_no_noise_is_said(world, noise):
    with pytest.raises(ValueError, match=r"^noise: \w+ is no NOISE\. Wire Live Flow Noise"):
        sample(world, noise=noise)


def test_whole_numbers_of_other_kinds_are_seeds(world):
    want = sample(world, noise=flow_noise(world, camera(1)))
    got = sample(world, noise=flow_noise(world, camera(1), torch.tensor(1).numpy()[()]))
    assert torch.equal(got, want)
