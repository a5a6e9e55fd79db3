"""The embedded model, through ComfyUI's own nodes."""

import time

import pytest
import torch
from clock import crowded
from compiled_models import patched
from pictures import pictures as scenes

pytestmark = pytest.mark.comfy

LOOKS = ("ink drawing", "neon night", "watercolor", "thermal camera", "golden sunset")
COUNT = 3
CONTEXT = 64


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
    """[COUNT, 256, 256, 3] in 0..1."""
    return scenes(COUNT)


def prompted(demo, text):
    import nodes

    return nodes.CLIPTextEncode().encode(demo[1], text)[0]


def restyle(demo, pictures, prompt, cfg=1.0, denoise=0.5, steps=2, model=None):
    """Image to image with stock nodes."""
    import nodes

    vae = demo[2]
    positive = prompted(demo, prompt) if isinstance(prompt, str) else prompt
    latent = nodes.VAEEncode().encode(vae, pictures)[0]
    latent = nodes.KSampler().sample(
        model or demo[0], 0, steps, cfg, "lcm", "normal", positive, prompted(demo, ""), latent,
        denoise=denoise,
    )[0]  # fmt: skip
    return nodes.VAEDecode().decode(vae, latent)[0]


@pytest.fixture(scope="module")
def restyled(demo, pictures):
    with torch.inference_mode():
        return {look: restyle(demo, pictures, look) for look in LOOKS}


def luminance(images):
    return (images * images.new_tensor([0.299, 0.587, 0.114])).sum(-1)


def colour(images):
    """How far the channels are apart, mean of a batch in 0..1."""
    return float((images.amax(-1) - images.amin(-1)).mean())


def correlation(a, b):
    a, b = a.flatten(1), b.flatten(1)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-6)


def structure(images):
    """Where the luminance has edges, at a quarter of the size."""
    y = luminance(images)
    edges = (y.diff(dim=1)[:, :, :-1].square() + y.diff(dim=2)[:, :-1].square()).sqrt()
    return torch.nn.functional.avg_pool2d(edges[:, None], 4)


def distance(a, b):
    return float((a - b).abs().mean())


def test_weights_are_small():
    from livediffusion.demo import loader

    files = list(loader.WEIGHTS.glob("*.safetensors"))
    assert {f.stem for f in files} == {"unet", "text"}
    assert sum(f.stat().st_size for f in files) <= 16e6


def test_every_weight_is_in_the_files_and_the_other_way_round(demo, caplog):
    from livediffusion.demo import loader

    with caplog.at_level("WARNING"):
        model = loader.load_model().model.diffusion_model
        loader.load()
    assert not [r.message for r in caplog.records if "missing" in r.message.lower()]
    stored = loader._weights("unet")
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in stored.items()
    }


def test_loads_in_a_second(demo):
    from livediffusion.demo import loader

    times = []
    for _ in range(3):
        start = time.perf_counter()
        loader.load()
        times.append(time.perf_counter() - start)
    assert min(times) < crowded(), times


def test_fresh_patchers_are_the_same_model(demo):
    """What ComfyUI makes anew, for another device or without dynamic loading, is this model."""
    import comfy.model_patcher

    # ComfyUIs that load dynamically can be asked not to
    asked = [{}, {"disable_dynamic": True}]
    asked = asked if hasattr(comfy.model_patcher, "CoreModelPatcher") else asked[:1]
    for patcher in (demo[0], demo[1].patcher, demo[2].patcher):
        make, arguments = patcher.cached_patcher_init
        for options in asked:
            again = make(*arguments, **options)
            assert type(again) is type(patcher) and type(again.model) is type(patcher.model)
            before, after = patcher.model.state_dict(), again.model.state_dict()
            assert before.keys() == after.keys() and before
            assert all(torch.equal(before[key], after[key]) for key in before)


class TestVAE:
    def test_loses_nothing(self, demo, pictures):
        vae = demo[2]
        latent = vae.encode(pictures)
        assert latent.shape == (COUNT, 48, 64, 64) and latent.dtype == torch.float32
        again = vae.decode(latent)
        assert distance(again, pictures) < 1e-7
        assert torch.equal((again * 255).round(), (pictures * 255).round())
        # one by one as together
        assert torch.equal(latent[1:2], vae.encode(pictures[1:2]))

    def test_in_tiles_it_loses_nothing_either(self, demo):
        import nodes

        picture = scenes(1, 7, 288, 416)
        latent = nodes.VAEEncodeTiled().encode(demo[2], picture, 128, 32)[0]
        assert (latent["samples"] - demo[2].encode(picture)).abs().max() < 1e-5
        shown = nodes.VAEDecodeTiled().decode(demo[2], latent, 128, 32)[0]
        assert (shown - picture).abs().max() < 1e-5

    def test_a_size_that_does_not_divide_is_cropped_in_the_middle(self, demo):
        picture = scenes(1, 8, 250, 263)
        shown = demo[2].decode(demo[2].encode(picture))
        assert (shown - picture[:, 1:249, 1:261]).abs().max() < 1e-6

    def test_an_alpha_channel_is_left_out(self, demo, pictures):
        clear = torch.cat([pictures, torch.zeros_like(pictures[..., :1])], -1)
        assert torch.equal(demo[2].encode(clear), demo[2].encode(pictures))

    def test_asks_for_the_memory_of_its_copies(self, demo, pictures):
        vae = demo[2]
        one = pictures[:1].numel() * 4
        asked = (
            vae.memory_used_encode((COUNT, 3, 256, 256), torch.float32),
            vae.memory_used_decode((COUNT, 48, 64, 64), torch.float32),
        )
        assert all(2 * one <= bytes_ <= 8 * one for bytes_ in asked)


def test_previews_are_the_picture(demo, pictures):
    import latent_preview
    import numpy as np

    kind = demo[0].model.latent_format
    previewer = latent_preview.Latent2RGBPreviewer(
        kind.latent_rgb_factors, kind.latent_rgb_factors_bias, kind.latent_rgb_factors_reshape
    )
    shown = previewer.decode_latent_to_preview(kind.process_in(demo[2].encode(pictures[:1])))
    small = torch.nn.functional.avg_pool2d(pictures[:1].movedim(-1, 1), 4)[0].movedim(0, -1)
    assert np.abs(np.asarray(shown) / 255 - small.numpy()).max() <= 1.5 / 255


SIZES = [(192, 192), (224, 384), (512, 320), (768, 192), (250, 264)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_any_size(demo, size):
    """Also one that no level of the UNet divides, and the picture stays where it was."""
    picture = scenes(1, 11, *size)
    out = restyle(demo, picture, "photo")
    height, width = (side // 4 * 4 for side in size)
    assert out.shape == (1, height, width, 3) and out.isfinite().all()
    source = demo[2].decode(demo[2].encode(picture))
    assert correlation(structure(source), structure(out)) > 0.5


def test_cpu_weights_have_the_fast_layout(demo):
    """And keep it under a LoRA on a convolution, which acts and goes again."""
    import comfy.model_management

    key = "input_blocks.3.0.in_layers.2.weight"
    model = demo[0]
    if not comfy.model_management.is_device_cpu(model.load_device):
        pytest.skip("the layout is for CPUs")

    def weight():
        return model.model.diffusion_model.state_dict()[key]

    before = weight().clone()
    assert before.is_contiguous(memory_format=torch.channels_last) and not before.is_contiguous()
    plain = restyle(demo, scenes(1), "watercolor")
    changed = restyle(demo, scenes(1), "watercolor", model=patched(model, 0.02))
    assert weight().is_contiguous(memory_format=torch.channels_last)
    assert distance(plain, changed) > 1e-4  # without the patch nothing differs at all
    assert torch.equal(restyle(demo, scenes(1), "watercolor"), plain)
    assert torch.equal(weight(), before)


def test_a_lora_moves_the_picture(demo, pictures):
    """On a convolution, a linear layer and the prompt's embedding, as a LoRA loader puts it on."""
    import comfy.sd

    weights, generator, told = demo[0].model.state_dict(), torch.Generator().manual_seed(0), {}
    for layer in (
        "input_blocks.3.0.in_layers.2", "middle_block.1.proj_in", "label_emb.0.0",
        "output_blocks.5.0.out_layers.3",
    ):  # fmt: skip
        out, into, *kernel = weights[f"diffusion_model.{layer}.weight"].shape
        name = f"lora_unet_{layer.replace('.', '_')}"
        up, down = (out, 4, *[1 for _ in kernel]), (4, into, *kernel)
        told[f"{name}.lora_up.weight"] = torch.randn(up, generator=generator) * 0.05
        told[f"{name}.lora_down.weight"] = torch.randn(down, generator=generator) * 0.05

    def changed(strength):
        model = comfy.sd.load_lora_for_models(demo[0], demo[1], told, strength, 1.0)[0]
        assert len(model.patches) == 4
        return distance(plain, restyle(demo, pictures[:1], "watercolor", model=model))

    plain = restyle(demo, pictures[:1], "watercolor")
    assert 1e-3 < changed(0.3) < changed(1.0)
    assert torch.equal(restyle(demo, pictures[:1], "watercolor"), plain)


class TestPrompt:
    def test_pooled_is_the_end_of_the_prompt(self, demo):
        (tokens, extra), *_ = prompted(demo, "a city, neon night")
        assert tokens.shape == (1, 77, CONTEXT) and extra["pooled_output"].shape == (1, CONTEXT)
        end = len(words(demo, "a city, neon night"))
        apart = (tokens[0] - extra["pooled_output"]).abs().amax(-1)
        assert int(apart.argmin()) == end and apart[end] < 1e-5

    def test_both_tokens_and_pooled_reach_the_network(self, demo, pictures):
        ink, neon = prompted(demo, "ink drawing"), prompted(demo, "neon night")
        picture = pictures[:1]
        own = restyle(demo, picture, ink)
        # the pooled prompt says the look
        assert distance(own, restyle(demo, picture, [[ink[0][0], neon[0][1]]])) > 0.1
        assert distance(own, restyle(demo, picture, [[neon[0][0], ink[0][1]]])) > 1e-5

    def test_without_pooled_it_counts_as_zeros(self, demo, pictures):
        import nodes

        tokens, extra = prompted(demo, "ink drawing")[0]
        zeros = [[tokens, {"pooled_output": torch.zeros(1, CONTEXT)}]]
        picture = pictures[:1]
        expected = restyle(demo, picture, zeros)
        assert torch.equal(restyle(demo, picture, [[tokens, {}]]), expected)
        assert not torch.equal(restyle(demo, picture, [[tokens, extra]]), expected)
        zeroed = nodes.ConditioningZeroOut().zero_out([[tokens, extra]])[0]
        assert restyle(demo, picture, zeroed).isfinite().all()

    def test_of_another_model_is_refused_in_words(self, demo, pictures):
        wide = [[torch.zeros(1, 77, 768), {"pooled_output": torch.zeros(1, 768)}]]
        with pytest.raises(ValueError, match=r"^conditioning: .*768.*CLIP output of Live Demo"):
            restyle(demo, pictures[:1], wide)

    def test_weights_work(self, demo):
        plain = prompted(demo, "a city, neon")[0][0]
        strong = prompted(demo, "a city, (neon:1.3)")[0][0]
        changed = (plain - strong).abs().amax(-1)[0] > 1e-4
        where = [1 + i for i, word in enumerate(words(demo, "a city, neon")[1:]) if "neon" in word]
        assert changed[where].all() and not changed[1 : where[0]].any()


def words(demo, text):
    """Words of a prompt as the tokenizer splits it, start token first, without the end."""
    clip = demo[1]
    tokens = clip.tokenizer.untokenize(clip.tokenize(text)["l"][0])
    end = next(i for i, (token, _) in enumerate(tokens) if token[0] == 49407)
    return [str(word) for _, word in tokens[:end]]


class TestPictures:
    def test_looks_have_their_colours(self, restyled, pictures):
        """Ink is grey, the thermal camera is not; all differ from the input and each other."""
        own = colour(pictures)
        assert colour(restyled["ink drawing"]) < 0.1 < 0.5 * own
        assert colour(restyled["thermal camera"]) > 1.2 * own
        sunset = restyled["golden sunset"].mean((0, 1, 2))
        assert sunset[0] > sunset[1] > sunset[2]
        every = [pictures, *restyled.values()]
        apart = [distance(every[i], every[j]) for i in range(len(every)) for j in range(i)]
        assert min(apart) > 0.02, apart

    def test_edges_stay_where_they_are(self, restyled, pictures):
        """Those of the output lie where those of the input lie, not where another's do."""
        kept = {}
        for look, images in restyled.items():
            source, result = structure(pictures), structure(images)
            if look == "ink drawing":  # hatching is edges everywhere: judge it by its tones
                source, result = (
                    torch.nn.functional.avg_pool2d(luminance(p)[:, None], 16)
                    for p in (pictures, images)
                )
            same = correlation(source, result).mean()
            other = correlation(source.roll(1, 0), result).mean()
            kept[look] = (round(float(same), 3), round(float(other), 3))
        assert all(same > other + 0.2 for same, other in kept.values()), kept

    def test_guidance_pushes_further(self, demo, pictures):
        """Guidance 1.4 moves away from the empty prompt's output more than guidance 1 does."""
        empty = restyle(demo, pictures[:1], "")
        for prompt in ("neon night", "watercolor"):
            plain = distance(restyle(demo, pictures[:1], prompt), empty)
            guided = distance(restyle(demo, pictures[:1], prompt, cfg=1.4), empty)
            assert guided > 1.02 * plain > 0.02, (prompt, plain, guided)

    def test_strength_moves_the_picture(self, demo, pictures):
        moved = [
            distance(restyle(demo, pictures[:1], "neon night", denoise=strength), pictures[:1])
            for strength in (0.1, 0.5)
        ]
        assert moved[0] < moved[1], moved

    def test_from_noise_it_gives_pictures_of_the_size_asked_for(self, demo):
        import comfy.latent_formats

        import nodes

        empty = nodes.EmptyLatentImage().generate(256, 192, 2)[0]
        positive, negative = prompted(demo, "golden sunset"), prompted(demo, "")
        latent = nodes.KSampler().sample(
            demo[0], 1, 4, 1.4, "euler", "normal", positive, negative, empty
        )[0]
        image = nodes.VAEDecode().decode(demo[2], latent)[0]
        # older ComfyUIs make empty latents of an eighth of the size for every model
        told = hasattr(comfy.latent_formats.LatentFormat, "spacial_downscale_ratio")
        assert image.shape == ((2, 192, 256, 3) if told else (2, 96, 128, 3))
        assert image.isfinite().all() and luminance(image).flatten(1).std(1).min() > 0.01


def test_the_schedule_of_a_node_is_used(demo, pictures):
    """ModelSamplingDiscrete in place of the model's own sampling."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    model = ModelSamplingDiscrete().patch(demo[0], "x0", False)[0]
    assert model.get_model_object("model_sampling").sigma_data == 1.0
    out = restyle(demo, pictures[:1], "photo", model=model)
    assert out.isfinite().all()
    assert not torch.equal(out, restyle(demo, pictures[:1], "photo"))
