"""The embedded model, through ComfyUI's own nodes."""

import statistics
import time

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.comfy

STYLES = {
    "ink": "ink drawing",
    "neon": "neon night",
    "watercolor": "watercolor",
    "mosaic": "mosaic tiles",
    "thermal": "thermal camera",
    "blueprint": "blueprint",
    "poster": "pop art poster",
    "sunset": "golden sunset",
}
COUNT = 6


@pytest.fixture(autouse=True)
def inference():
    # ComfyUI's executor runs nodes so
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def demo(comfyui):
    from livediffusion.demo import loader

    with torch.inference_mode():
        return loader.load()


@pytest.fixture(scope="module")
def pictures():
    """Scenes the training never drew, (B, H, W, 3) in 0..1."""
    from livediffusion.demo import scenes

    drawn = [scenes.draw(1_000_000 + i)[0] for i in range(COUNT)]
    return torch.from_numpy(np.stack(drawn)).float() / 255


def restyle(demo, pictures, prompt, cfg=1.0, denoise=0.5, steps=4, seed=0):
    """Image to image with stock nodes."""
    import nodes

    model, clip, vae = demo
    positive = nodes.CLIPTextEncode().encode(clip, prompt)[0]
    negative = nodes.CLIPTextEncode().encode(clip, "")[0]
    latent = nodes.VAEEncode().encode(vae, pictures)[0]
    latent = nodes.KSampler().sample(
        model, seed, steps, cfg, "lcm", "normal", positive, negative, latent, denoise=denoise
    )[0]
    return nodes.VAEDecode().decode(vae, latent)[0]


@pytest.fixture(scope="module")
def restyled(demo, pictures):
    with torch.inference_mode():
        return {look: restyle(demo, pictures, prompt) for look, prompt in STYLES.items()}


def luminance(images):
    return (images * images.new_tensor([0.299, 0.587, 0.114])).sum(-1)


def gradients(images):
    """Strength of the luminance edges (B, 255, 255)."""
    y = luminance(images)
    return (y.diff(dim=1)[:, :, :-1].square() + y.diff(dim=2)[:, :-1].square()).sqrt()


def statistics_of(images):
    """Colour and edge statistics of each picture (B, 8)."""
    colour = images.flatten(1, 2)
    chroma = (images.amax(-1) - images.amin(-1)).flatten(1).mean(1)
    edge = 5 * gradients(images).flatten(1).mean(1)
    return torch.cat([colour.mean(1), colour.std(1), chroma[:, None], edge[:, None]], 1)


def correlation(a, b):
    a, b = a.flatten(1), b.flatten(1)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-6)


def structure(images):
    """Where the edges are, at an eighth of the size."""
    return torch.nn.functional.avg_pool2d(gradients(images)[:, None], 8)


def test_weights_are_small():
    from livediffusion.demo import loader

    files = list(loader.WEIGHTS.glob("*.safetensors"))
    assert {f.stem for f in files} == {"unet", "autoencoder", "text"}
    assert sum(f.stat().st_size for f in files) <= 16e6


def test_loads_in_a_second(demo):
    from livediffusion.demo import loader

    times = []
    for _ in range(3):
        start = time.perf_counter()
        loader.load()
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 1.0, times


def test_autoencoder_keeps_pictures(demo, pictures):
    vae = demo[2]
    latent = vae.encode(pictures)
    assert latent.shape == (COUNT, 8, 32, 32)
    assert torch.equal(latent, vae.encode(pictures))
    error = (vae.decode(latent) - pictures).square().mean((1, 2, 3))
    psnr = -10 * error.log10()
    assert psnr.median() > 20, psnr


def test_preview_colours_follow_the_picture(demo, pictures):
    latent_format = demo[0].model.latent_format
    latent = latent_format.process_in(demo[2].encode(pictures)).movedim(1, -1)
    factors = torch.tensor(latent_format.latent_rgb_factors)
    preview = latent @ factors + torch.tensor(latent_format.latent_rgb_factors_bias)
    small = torch.nn.functional.avg_pool2d(pictures.movedim(-1, 1), 8).movedim(1, -1)
    assert correlation(preview, small).min() > 0.9
    assert ((preview + 1) / 2 - small).abs().mean() < 0.1


def test_obeys_the_prompt(restyled, pictures):
    """Each output must have the statistics of its own look, not those of any other look."""
    from livediffusion.demo import looks

    x = pictures.movedim(-1, 1)
    own = torch.stack([statistics_of(f(x).movedim(1, -1)) for f in looks.LOOKS.values()])
    names = list(looks.LOOKS)
    right = {}
    for look, images in restyled.items():
        nearest = (own - statistics_of(images)).norm(dim=-1).argmin(0)
        right[look] = float((nearest == names.index(look)).float().mean())
    assert statistics.mean(right.values()) >= 0.6, right
    assert sum(share > 0.5 for share in right.values()) >= len(right) - 1, right


def test_prompts_differ_from_each_other(restyled):
    means = torch.stack([images.mean(0) for images in restyled.values()])
    apart = [(means[i] - means[j]).abs().mean() for i in range(len(means)) for j in range(i)]
    assert min(apart) > 0.04, apart


def test_keeps_the_layout(restyled, pictures):
    """The edges of the output lie where those of the input lie, not where another's do."""
    kept = {}
    for look, images in restyled.items():
        if look == "mosaic":  # its joints are edges everywhere: judge it by its tiles
            source, result = (
                torch.nn.functional.avg_pool2d(luminance(p)[:, None], 8) for p in (pictures, images)
            )
        else:
            source, result = structure(pictures), structure(images)
        same = correlation(source, result).mean()
        other = correlation(source.roll(1, 0), result).mean()
        kept[look] = (round(float(same), 3), round(float(other), 3))
    assert all(same > other + 0.1 for same, other in kept.values()), kept


def test_guidance_pushes_further(demo, pictures):
    """Guidance 1.4 moves away from the empty prompt's output more than guidance 1 does."""
    for prompt in ("neon night", "watercolor"):
        empty = restyle(demo, pictures[:3], "")
        plain = (restyle(demo, pictures[:3], prompt) - empty).abs().mean()
        guided = (restyle(demo, pictures[:3], prompt, cfg=1.4) - empty).abs().mean()
        assert guided > 1.02 * plain > 0.05, (prompt, float(plain), float(guided))


def test_prompt_weights_work(demo):
    import nodes

    def encode(text):
        return nodes.CLIPTextEncode().encode(demo[1], text)[0][0][0]

    plain, strong = encode("a city, neon"), encode("a city, (neon:1.3)")
    assert plain.shape == (1, 77, 64)
    changed = (plain - strong).abs().amax(-1)[0] > 1e-4
    where = [i for i, word in enumerate(tokens(demo, "a city, neon")) if "neon" in word]
    assert changed[where].all() and not changed[1 : where[0]].any()


def tokens(demo, text):
    """Words of a prompt as the tokenizer splits it, start token first."""
    clip = demo[1]
    return [str(word) for _, word in clip.tokenizer.untokenize(clip.tokenize(text)["l"][0])]


def test_draws_from_noise(demo):
    """Text to image: finite, not flat, and the prompt shows."""
    import nodes

    model, clip, vae = demo
    empty = nodes.EmptyLatentImage().generate(256, 256, 2)[0]
    negative = nodes.CLIPTextEncode().encode(clip, "")[0]
    means = []
    for prompt in ("a landscape, blueprint", "a landscape, golden sunset"):
        positive = nodes.CLIPTextEncode().encode(clip, prompt)[0]
        latent = nodes.KSampler().sample(
            model, 1, 8, 1.4, "euler", "normal", positive, negative, empty
        )[0]
        image = nodes.VAEDecode().decode(vae, latent)[0]
        assert image.shape == (2, 256, 256, 3) and image.isfinite().all()
        assert luminance(image).flatten(1).std(1).min() > 0.03
        means.append(image.mean((0, 1, 2)))
    blueprint, sunset = means
    assert blueprint[2] > blueprint[0] and sunset[0] > sunset[2], means
