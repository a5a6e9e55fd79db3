"""The trainer: looks, pictures, pairs, a few steps, a checkpoint, an export that loads."""

import copy
import random

import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


@pytest.fixture(scope="module")
def parts(comfyui):
    from livediffusion.demo import looks, measure, pairs, pictures, prompts, training

    return {m.__name__.rsplit(".", 1)[1]: m
            for m in (looks, measure, pairs, pictures, prompts, training)}  # fmt: skip


def scene(height=64, width=96, count=1, seed=0):
    """Blurred blocks of colour, (count, 3, height, width) in 0..1."""
    coarse = torch.rand(count, 3, height // 8, width // 8,
                        generator=torch.Generator().manual_seed(seed))  # fmt: skip
    return torch.nn.functional.interpolate(coarse, scale_factor=8.0, mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (160, 64)])
def test_looks_keep_shape_and_range(parts, size):
    x = scene(*size, count=2)
    every = parts["looks"].every(x)
    assert every.shape == (2, 12, 3, *size)
    assert every.isfinite().all()
    assert every.min() >= 0 and every.max() <= 1
    assert torch.equal(every[:, 0], x)


def test_a_look_does_not_depend_on_its_neighbours_in_the_batch(parts):
    x = scene(count=3)
    alone = torch.cat([parts["looks"].every(one[None]) for one in x])
    assert (parts["looks"].every(x) - alone).abs().max() < 1e-4


def test_looks_are_far_from_each_other(parts):
    every = parts["looks"].every(scene(128, 128, 2))
    for i in range(12):
        for k in range(i):
            assert (every[:, i] - every[:, k]).abs().mean() > 0.02, (i, k)


@pytest.mark.parametrize("look", ["ink", "mosaic", "blueprint", "poster", "pencil", "watercolor"])
def test_patterns_repeat_every_32_pixels(parts, look):
    """What a network with a map of that period can learn."""
    looks = parts["looks"]
    y = looks.LOOKS[look](looks.Scene(torch.full((1, 3, 128, 128), 0.45)))
    inner = y[..., 32:96, 32:96]
    assert (inner[..., :32, :] - inner[..., 32:, :]).abs().max() < 1e-4
    assert (inner[..., :32] - inner[..., 32:]).abs().max() < 1e-4


def test_looks_hardly_see_a_webcams_noise(parts):
    """A flat wall has no lines, however the sensor rustles."""
    looks = parts["looks"]
    wall = torch.full((1, 3, 128, 128), 0.5)
    noisy = wall + 0.02 * torch.randn(wall.shape, generator=torch.Generator().manual_seed(0))
    for look in ("neon", "blueprint", "comic", "oil"):
        clean, other = (looks.LOOKS[look](looks.Scene(x)) for x in (wall, noisy))
        assert (clean - other).abs().mean() < 0.05, look


def test_jpeg_loses_more_at_lower_quality(parts):
    x = scene(64, 64, 2)
    error = [float((parts["pairs"].jpeg(x, q) - x).abs().mean()) for q in (95, 60, 20)]
    assert error[0] < error[1] < error[2] < 0.1
    grey = torch.full((1, 3, 16, 16), 128 / 255)
    assert (parts["pairs"].jpeg(grey, 90) - grey).abs().max() < 0.01


def test_jpeg_is_the_format_itself(parts):
    """Against a real encoder at the same quality."""
    import io

    from PIL import Image

    x = scene(64, 64, 1)
    pixels = (x[0].movedim(0, -1) * 255).round().byte().numpy()
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "JPEG", quality=60, subsampling=2)
        real = torch.from_numpy(np.array(Image.open(file))).movedim(-1, 0)[None] / 255
    mine = parts["pairs"].jpeg(torch.from_numpy(pixels).movedim(-1, 0)[None] / 255, 60)
    assert (mine - real).abs().mean() < 0.25 * (real - x).abs().mean() + 0.003


def test_held_out_files_are_there_and_never_trained_on(parts):
    pictures = parts["pictures"]
    folder = pictures.installed()
    if folder is None:
        pytest.skip("the template packages of this ComfyUI are of other versions")
    train, held = pictures.split(folder)
    names = pictures.held_out()
    assert len(names) == 61 and set(names) <= set(held)
    assert "ltxv_image_to_video-1" in held
    assert len(train) > 500
    # before and after are one scene
    assert not {pictures.stem(n) for n in train} & {pictures.stem(n) for n in held}


def test_pictures_are_prepared_once_and_alike(parts, tmp_path):
    from PIL import Image

    pictures = parts["pictures"]
    folder = tmp_path / f"{pictures.PREFIX}test"
    folder.mkdir()
    for i in range(2):
        pixels = (scene(256, 320, 1, i)[0].movedim(0, -1) * 255).byte().numpy()
        Image.fromarray(pixels).save(folder / f"some-{i}.webp")
    Image.new("RGB", (300, 300)).save(folder / "black-1.webp")
    first = pictures.crops(pictures.files(tmp_path), 5, 0)
    assert first.shape == (5, 256, 256, 3)
    assert np.array_equal(first, pictures.crops(pictures.files(tmp_path), 5, 0))
    assert not np.array_equal(first, pictures.crops(pictures.files(tmp_path), 5, 1))
    seen = []
    data = pictures.prepare(tmp_path, tmp_path, 3, 0, lambda *done: seen.append(done))
    assert data.shape == (3, 12, 3, 256, 256) and seen[-1] == (3, 3)
    again = pictures.prepare(tmp_path, tmp_path, 3, 0, None)
    assert np.array_equal(data, again)
    with pytest.raises(FileNotFoundError, match="no previews"):
        pictures.files(folder)


@pytest.fixture(scope="module")
def data(parts):
    x = scene(256, 256, 2)
    return parts["pictures"].to_bytes(parts["looks"].every(x)).numpy()


def test_a_prompt_that_names_no_look_keeps_the_picture(parts, data):
    pairs = parts["pairs"].Pairs(data, 0, torch.device("cpu"))
    batch = pairs.draw(80, 64)
    assert batch.source.shape == batch.target.shape == (80, 3, 64, 64)
    assert {"keep", "ink", "photo"} <= set(batch.kinds)
    names = [name for group in parts["prompts"].NAMES.values() for name in group]
    kept = [i for i, kind in enumerate(batch.kinds) if kind == "keep"]
    moved = [i for i, kind in enumerate(batch.kinds) if kind not in ("keep", "photo")]
    for i in kept:
        assert not any(name in batch.prompts[i] for name in names), batch.prompts[i]
        # a webcam's noise goes, the picture stays
        assert (batch.source[i] - batch.target[i]).abs().mean() < 0.1
    distance = (batch.source[moved] - batch.target[moved]).abs().mean((1, 2, 3))
    assert distance.median() > 0.15


def test_going_on_leads_down_the_ladder_to_the_same_picture(parts, data):
    pairs = parts["pairs"].Pairs(data, 0, torch.device("cpu"))
    batch = pairs.draw(6, 64)
    after = pairs.go_on(batch, batch.target, batch.source, 4)
    assert len(after.t) == len(after.prompts) == 4
    for target, t, prompt in zip(after.target, after.t, after.prompts, strict=True):
        rows = [i for i, p in enumerate(batch.prompts) if p == prompt
                and torch.equal(batch.target[i], target)]  # fmt: skip
        assert rows and t <= batch.t[rows].max()


def test_trains_resumes_and_exports(parts, data, tmp_path, monkeypatch):
    from livediffusion.demo import loader

    training, lines = parts["training"], []
    monkeypatch.setattr(training, "SIZES", ((64, 4),))
    monkeypatch.setattr(training, "FIRST", (64, 4))
    cpu = torch.device("cpu")
    trainer = training.Trainer(data, 0.05, 0, cpu, lines.append)
    before = copy.deepcopy(trainer.net.state_dict())
    saved = []
    trainer.run(lambda: saved.append(copy.deepcopy(trainer.state())))
    assert trainer.steps > 0 and trainer.spent >= 3
    moved = [k for k, v in trainer.net.state_dict().items() if not torch.equal(v, before[k])]
    assert len(moved) == len(before)
    assert any("looks named" in line for line in lines)

    again = training.Trainer(data, 0.1, 0, cpu, lines.append)
    again.resume(saved[-1])
    assert again.steps == trainer.steps
    old = trainer.net.state_dict()
    assert all(torch.equal(v, old[k]) for k, v in again.net.state_dict().items())
    assert again.pairs.draw(2, 64).prompts == trainer.pairs.draw(2, 64).prompts
    with pytest.raises(ValueError, match=r"prompts\.py"):
        again.resume({**saved[-1], "ids": [1]})

    training.export(trainer, tmp_path)
    assert sum(f.stat().st_size for f in tmp_path.glob("*.safetensors")) <= 16e6
    third = training.Trainer(data, 0.1, 5, cpu, lines.append)
    third.start_from(tmp_path)
    for name, value in trainer.averages[0].state_dict().items():
        assert torch.allclose(third.net.state_dict()[name], value, atol=2e-3), name
    assert torch.allclose(third.text.rows, trainer.averages[1].rows, atol=2e-3)

    monkeypatch.setattr(loader, "WEIGHTS", tmp_path)
    model, clip, _ = loader.load()
    text = trainer.averages[1]
    with torch.inference_mode():
        context, pooled = text.train(False)(["a fox, ink drawing"])
        tokens = clip.tokenize("a fox, ink drawing")
        found = clip.encode_from_tokens(tokens, return_pooled=True, return_dict=True)
    assert torch.allclose(found["cond"].float(), context, atol=0.02)
    assert torch.allclose(found["pooled_output"].float(), pooled, atol=0.02)
    state = model.model.diffusion_model.state_dict()
    mine = trainer.averages[0].state_dict()
    scale = loader.SCALE
    assert torch.allclose(state["out.2.weight"].float() / scale, mine["out.2.weight"], atol=1e-3)


def test_measures_know_right_from_wrong(parts):
    measure = parts["measure"]
    x, other = scene(128, 128, 2), scene(128, 128, 2, 5)
    same = measure.compare(x, x)
    assert same["edge"] > 0.999 and same["ssim"] > 0.999 and abs(same["sharpness"] - 1) < 1e-5
    from livediffusion.demo.filters import blur

    soft = measure.compare(blur(x, 2.0), x)
    assert soft["sharpness"] < 0.9 and soft["psnr"] < 60
    assert measure.compare(other, x)["edge"] < 0.5
    # 20 log10(1 / 0.1)
    assert abs(float(measure.psnr(torch.full((1, 3, 8, 8), 0.6), torch.full((1, 3, 8, 8), 0.5)))
               - 20) < 1e-3  # fmt: skip


def test_every_prompt_names_its_look_in_known_words(parts):
    """The vocabulary covers what `prompt` gives; only UNKNOWN is unknown."""
    from livediffusion.demo.text import TextEncoder

    prompts, text, rng = parts["prompts"], TextEncoder(), np.random.default_rng(0)
    kinds = [*prompts.NAMES, None]
    mark = text.tokens(prompts.UNKNOWN)[1]
    for _ in range(200):
        kind = random.Random(int(rng.integers(1e9))).choice(kinds)
        words = set(text.tokens(prompts.prompt(kind, rng))) - {mark}
        assert words <= set(text.index), kind
