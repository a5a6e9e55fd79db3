"""The embedded model on a few held-out real pictures: what `run.py evaluate` measures."""

import pathlib

import pytest
import torch

# a real network: on the primary ComfyUI only
pytestmark = [pytest.mark.comfy, pytest.mark.slow]

DEMO = pathlib.Path(__file__).resolve().parents[2] / "demo"
COUNT = 4
# a little below the model card: these are fewer pictures
LEAST = {"edge": 0.88, "psnr": 20.5, "ssim": 0.78, "sharpness": 0.58}
WORST = {"edge": 0.78, "psnr": 16.0, "sharpness": 0.38}


@pytest.fixture(scope="module")
def judging(comfyui):
    """demo/evaluate.py, as a module, and its Judge of COUNT pictures."""
    from livediffusion.demo import pictures

    if pictures.installed() is None:
        pytest.skip("the template packages of this ComfyUI are of other versions")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DEMO))
        import evaluate
    with torch.inference_mode():
        return evaluate, evaluate.Judge(None, COUNT)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def figures(judging):
    """{look: figures} at two steps, cfg 1."""
    evaluate, judge = judging
    with torch.inference_mode():
        targets = judge.targets(judge.x)
        return {
            look: judge.measure.compare(judge.restyle(judge.x, prompt), targets[look])
            for look, prompt in evaluate.PROMPTS.items()
        }


def test_looks_are_as_good_as_the_model_card_says(judging, figures):
    mean = judging[0].mean(list(figures.values()))
    assert mean["edge"] > LEAST["edge"], mean
    assert mean["psnr"] > LEAST["psnr"], mean
    assert mean["ssim"] > LEAST["ssim"], mean
    assert mean["sharpness"] > LEAST["sharpness"], mean


def test_no_look_is_mush(figures):
    for look, found in figures.items():
        assert found["edge"] > WORST["edge"], (look, found)
        assert found["psnr"] > WORST["psnr"], (look, found)
        assert found["sharpness"] > WORST["sharpness"], (look, found)


@pytest.mark.parametrize("prompt", ["", "zebra", "a cinematic shot of a wizard, 8k"])
def test_a_prompt_that_names_no_look_keeps_the_photo(judging, prompt):
    x = judging[1].x[:3]
    assert (judging[1].restyle(x, prompt) - x).abs().mean() < 10 / 255


@pytest.mark.parametrize("look", ["ink drawing", "neon night", "blueprint"])
def test_more_strength_is_farther_from_the_photo(judging, look):
    x = judging[1].x[:3]
    moved = [float((judging[1].restyle(x, look, strength=s) - x).abs().mean())
             for s in (0.1, 0.2, 0.3, 0.5)]  # fmt: skip
    assert moved == sorted(moved) and moved[-1] > 1.5 * moved[0], moved


def test_a_poor_webcam_costs_little(judging):
    evaluate, judge = judging
    x = judge.x[:4]
    targets = judge.targets(x)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    poor = judge.pairs.jpeg((x + 0.03 * noise).clamp(0, 1), 60)
    looks = ("ink", "watercolor", "comic", "sunset")
    clean, other = (
        sum(float(judge.measure.psnr(judge.restyle(v, evaluate.PROMPTS[k]), targets[k]).mean())
            for k in looks) / len(looks)
        for v in (x, poor)
    )  # fmt: skip
    assert clean - other < 1.5, (clean, other)


@pytest.mark.parametrize("size", [(192, 192), (256, 384)])
def test_other_sizes_are_as_good(judging, size):
    judge = judging[1]
    whole = torch.cat([judge.middle(name, 512) for name in judge.names[:2]])

    def found(height, width):
        long = max(height, width)
        x = whole[..., : 512 * height // long, : 512 * width // long]
        x = torch.nn.functional.interpolate(x, size=(height, width), mode="area")
        target = judge.targets(x)["comic"]
        return float(judge.measure.psnr(judge.restyle(x, "comic"), target).mean())

    assert found(*size) > found(256, 256) - 1.5


def test_the_pictures_are_of_the_looks_they_were_asked_for(judging):
    """Colour tells some apart without any statistics of ours."""
    judge = judging[1]
    ink, thermal, blue, warm = (
        judge.restyle(judge.x, p)
        for p in ("ink drawing", "thermal camera", "blueprint", "golden sunset")
    )

    def spread(v):
        return float((v.amax(1) - v.amin(1)).mean())

    assert spread(ink) < 0.15 < 0.4 < spread(thermal)
    assert (blue[:, 2] - blue[:, 0]).mean() > 0.25
    assert (warm[:, 0] - warm[:, 2]).mean() > 0.25
