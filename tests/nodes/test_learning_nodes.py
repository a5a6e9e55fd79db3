"""Live Learned Steps and Live Searched Steps on real ComfyUI models."""

import errno
import functools
import json
import logging
import time

import pytest
import torch

pytestmark = pytest.mark.comfy

SOLVER, STEPS = "dpmpp_2m", 3


@pytest.fixture(autouse=True)
def folder(comfyui, tmp_path, monkeypatch):
    """Results of a test are its own."""
    from livediffusion.nodes import learning

    monkeypatch.setattr(learning, "folder", lambda: tmp_path / "schedules")
    with torch.inference_mode():
        yield tmp_path / "schedules"


@pytest.fixture(scope="module", autouse=True)
def forget():
    """ComfyUI's patchers complain if they outlive the interpreter's modules."""
    yield
    model.cache_clear()


@functools.cache
def model(prediction="epsilon", seed=0):
    """ComfyUI's own, but for its network, which is quick: what is tested is around it."""
    import tiny

    patcher = tiny.model(prediction, seed)
    weight = patcher.model.diffusion_model.middle_block[0].in_layers[2].weight

    def network(x, timesteps, context=None, **kwargs):
        time = (timesteps.float() / 1000).reshape(-1, 1, 1, 1)
        prompt = context.mean((1, 2)).reshape(-1, 1, 1, 1)
        pulled = torch.tanh(2 * x + 9 * weight[0, 0, 0, 0] + prompt)
        return x * (0.4 + 0.3 * time) + pulled * (1 - time)

    patcher.model.diffusion_model.forward = network
    return patcher


@pytest.fixture
def calls(monkeypatch):
    """How often the model is called, and a way to stop it."""
    from livediffusion.host.learning import study

    class Calls:
        made, last = 0, None

    before = study.comfy.model_management.throw_exception_if_processing_interrupted

    def counted():
        Calls.made += 1
        if Calls.last is not None and Calls.made > Calls.last:
            raise study.comfy.model_management.InterruptProcessingException
        before()

    monkeypatch.setattr(
        study.comfy.model_management, "throw_exception_if_processing_interrupted", counted
    )
    return Calls


def learn(patcher=None, **changed):
    import tiny
    from livediffusion.nodes.learning import LiveLearnedSteps

    given = {
        "model": patcher or model(), "positive": tiny.conditioning(1), "cfg": 1.0,
        "solver": SOLVER, "steps": STEPS, "samples": 3, "iterations": 2, "seed": 0,
        "strength": 1.0, "result": "find", "time_shift": False,
        "latent": {"samples": torch.zeros(1, 4, 8, 8)}, **changed,
    }  # fmt: skip
    return LiveLearnedSteps.execute(**given)


def search(**changed):
    import tiny
    from livediffusion.nodes.learning import LiveSearchedSteps

    given = {
        "model": model(), "positive": tiny.conditioning(1), "cfg": 1.0, "solver": SOLVER,
        "steps": STEPS, "population": 6, "generations": 2, "seed": 0, "samples": 3,
        "strength": 1.0, "result": "find", "objective": "match the fine solution",
        "latent": {"samples": torch.zeros(1, 4, 8, 8)}, **changed,
    }  # fmt: skip
    return LiveSearchedSteps.execute(**given)


def only(folder):
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
def test_what_is_promised_is_what_comfyuis_sampler_does(prediction, folder):
    """The error on the node, worked out again with stock nodes and the node's two outputs."""
    import comfy.samplers
    import tiny
    from comfy_extras.nodes_custom_sampler import Guider_Basic, SamplerCustomAdvanced
    from livediffusion.host.learning.study import Subject
    from livediffusion.nodes.schedules import LiveStrength

    patcher = model(prediction)
    sigmas, told = learn(patcher, time_shift=True, seed=5).args
    assert (sigmas[:-1] > sigmas[1:]).all() and sigmas[-1] == 0 and len(sigmas) == STEPS + 1
    latents = torch.zeros(3, 4, 8, 8)

    class Held:
        seed = 0

        def generate_noise(self, latent):
            return Subject(patcher, [], None, 1.0, latents[:1], 6, 5).noise()[3:]

    def sampled(patcher, sigmas):
        guider = Guider_Basic(patcher)
        guider.set_conds(tiny.conditioning(1))
        sampler = comfy.samplers.sampler_object("dpmpp_2m")
        out = SamplerCustomAdvanced.execute(Held(), guider, sampler, sigmas, {"samples": latents})
        return patcher.model.process_latent_in(out.args[0]["samples"])

    fine = sampled(patcher, LiveStrength.execute(patcher, 100, 1.0, "uniform t").args[0])
    file = only(folder)
    assert tiny.rms(sampled(told, sigmas), fine) == pytest.approx(
        file["errors"]["teacher"][0], rel=2e-3
    )
    assert file["errors"]["teacher"][0] <= file["errors"]["teacher"][1]
    if file["shifts"]:
        assert told is not patcher


@pytest.mark.parametrize("guided", [False, True])
def test_the_steps_run_in_the_stream(guided):
    import tiny
    from livediffusion.nodes.sampling import LiveRCFGGuider, LiveStreamSampler

    more = {"cfg": 2.0, "negative": tiny.conditioning(2)} if guided else {}
    pictures = {"samples": tiny.latents(2)}
    for node, extra in ((learn, {"time_shift": True}), (search, {})):
        out = node(strength=0.6, latent=pictures, solver="pfdiff-1_1", steps=4, **extra, **more)
        patcher = out.args[1] if len(out.args) > 1 else model()
        guider = LiveRCFGGuider.execute(patcher, tiny.conditioning(1), 1.0, 1.0, "off").args[0]
        LiveStreamSampler.hidden = None
        done = LiveStreamSampler.execute(
            guider, out.args[0], pictures, 0, "pfdiff-1_1", 1, "clip", "per frame", True
        )
        assert done.args[0]["samples"].shape == (2, 4, 8, 8)
        assert done.args[0]["samples"].isfinite().all()


def test_the_same_is_not_found_again(calls, folder):
    began = time.perf_counter()
    first = learn().args[0]
    once = time.perf_counter() - began
    made = calls.made
    assert made > 100
    took = []
    for _ in range(5):
        began = time.perf_counter()
        again = learn()
        took.append(time.perf_counter() - began)
        assert torch.equal(again.args[0], first)
    assert calls.made == made and len(list(folder.iterdir())) == 1
    assert min(took) < once / 20
    assert json.loads(again.ui["livediffusion_steps"][0])["levels"] == pytest.approx(first.tolist())


def test_whatever_changes_the_result_is_another_entry(calls, folder):
    import tiny
    from livediffusion.host.models import fingerprint

    learn()
    name = "diffusion_model.middle_block.0.in_layers.2.weight"
    lora = model().clone()
    low = torch.randn_like(model().model.state_dict()[name])
    assert lora.add_patches({name: (low,)}, 0.3)
    stronger = model().clone()
    stronger.add_patches({name: (low,)}, 0.4)
    prints = {fingerprint.of_model(m) for m in (model(), lora, stronger, model(seed=1))}
    assert len(prints) == 4
    before = calls.made
    for patcher, changed in (
        (lora, {}), (model(seed=1), {}), (None, {"positive": tiny.conditioning(3)}),
        (None, {"seed": 1}), (None, {"solver": "euler"}), (None, {"time_shift": True}),
    ):  # fmt: skip
        learn(patcher, **changed)
        assert calls.made > before
        before = calls.made
    assert len(list(folder.iterdir())) == 7


def test_a_model_is_known_again_in_another_session():
    """Another object with the same weights, patched and loaded or not, is the same model."""
    import comfy.model_management
    import tiny
    from livediffusion.host.models import fingerprint

    other = tiny.model("epsilon", 0)
    assert fingerprint.of_model(other) == fingerprint.of_model(model())
    assert fingerprint.of_model(tiny.model("v", 0)) != fingerprint.of_model(model())
    name = "diffusion_model.middle_block.0.in_layers.2.weight"
    lora = other.clone()
    lora.add_patches({name: (torch.ones_like(other.model.state_dict()[name]),)}, 0.5)
    unloaded = fingerprint.of_model(lora)
    comfy.model_management.load_models_gpu([lora])
    fingerprint._known.clear()
    assert fingerprint.of_model(lora) == unloaded
    assert fingerprint.of(tiny.conditioning(1)) == fingerprint.of(tiny.conditioning(1))
    assert fingerprint.of(tiny.conditioning(1)) != fingerprint.of(tiny.conditioning(2))
    assert fingerprint.of(object()) != fingerprint.of(object())
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize("find", [learn, search])
def test_cancel_keeps_the_best_and_the_next_run_goes_on(find, calls, folder):
    from livediffusion.host.learning import study

    whole = find()
    full, error = calls.made, only(folder)["errors"]["teacher"][0]
    next(folder.glob("*.json")).unlink()
    calls.made, calls.last = 0, full - 12
    with pytest.raises(study.comfy.model_management.InterruptProcessingException):
        find()
    part = only(folder)
    assert part["rounds"][0] < part["rounds"][1]
    assert part["errors"]["teacher"][0] <= part["errors"]["teacher"][1]
    calls.last = None
    again = find()
    after = only(folder)
    assert after["rounds"][0] == after["rounds"][1]
    assert after["errors"]["teacher"][0] <= part["errors"]["teacher"][0] * (1 + 1e-6)
    assert after["errors"]["teacher"][0] <= error * 1.1
    assert again.args[0].shape == whole.args[0].shape


def test_cancelled_before_anything_was_found_leaves_nothing(calls, folder):
    from livediffusion.host.learning import study

    calls.last = 50
    with pytest.raises(study.comfy.model_management.InterruptProcessingException):
        learn()
    assert not folder.exists()


def test_a_full_disk_costs_nothing_but_the_file(folder, monkeypatch, caplog):
    from livediffusion.schedules import results

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(results.os, "replace", full)
    with caplog.at_level(logging.WARNING):
        sigmas = learn().args[0]
    assert len(sigmas) == STEPS + 1
    assert "cannot be kept" in caplog.text and "No space left" in caplog.text
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"livediffusion": 1, "levels": [1, 2]}'])
def test_a_broken_file_is_found_anew(text, folder, caplog):
    first = learn().args[0]
    file = next(folder.glob("*.json"))
    file.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(learn().args[0], first)
    assert "is not used" in caplog.text
    assert only(folder)["levels"] == pytest.approx(first.tolist())


def test_a_file_from_somebody_else_is_used(calls, folder):
    import tiny
    from livediffusion.nodes import learning

    sigmas = learn(time_shift=True).args[0]
    file = next(folder.glob("*.json")).rename(folder / "learned-from-a-friend.json")
    assert learning.kept("learned") == [file.name] and learning.kept("searched") == []
    made = calls.made
    other = {"positive": tiny.conditioning(9), "result": file.name}
    assert torch.equal(learn(**other).args[0], sigmas)
    assert calls.made == made
    for changed, says in (
        ({"steps": 4}, r"result: .* is for solver dpmpp_2m with 3 steps"),
        ({"solver": "euler"}, r"result: .* is for solver dpmpp_2m"),
        ({"strength": 0.5}, r"result: .* starts at noise level 14.6"),
        ({"result": "gone.json"}, "result: there is no gone.json"),
    ):
        with pytest.raises(ValueError, match=says):
            learn(**{**other, **changed})
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"result: .* holds no schedule"):
        learn(**other)


def test_too_little_memory_makes_smaller_calls(monkeypatch, caplog):
    import comfy.samplers
    from livediffusion.host.learning import study

    plain = comfy.samplers.CFGGuider.__call__
    most = []

    def tight(self, x, *args, **kwargs):
        if len(x) > 2:
            raise study.comfy.model_management.OOM_EXCEPTION("out of memory")
        most.append(len(x))
        return plain(self, x, *args, **kwargs)

    monkeypatch.setattr(comfy.samplers.CFGGuider, "__call__", tight)
    with caplog.at_level(logging.WARNING):
        sigmas = learn(samples=6).args[0]
    assert max(most) == 2 and "samples at once" in caplog.text
    assert (sigmas[:-1] > sigmas[1:]).all()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"steps": 0}, "steps: (at least 1|0 cannot be)"),
        ({"strength": 0.0}, "strength: 0.0 must be above 0"),
        ({"strength": 0.002, "steps": 5}, "steps: 5 do not fit below strength"),
        ({"cfg": 3.0}, "negative: guidance with cfg 3.0 needs"),
        ({"strength": 0.5, "latent": None}, "latent: strength 0.5 starts from pictures"),
        ({"latent": {"samples": torch.ones(1, 7, 8, 8)}}, "latent: 7 channels"),
    ],
)
def test_bad_input_is_named(changed, says):
    for find in (learn, search):
        with pytest.raises(ValueError, match=says):
            find(**changed)


def test_a_model_without_noise_levels_is_named():
    class Nothing:
        def get_model_object(self, name):
            raise AttributeError(name)

    with pytest.raises(ValueError, match="model: has no table of noise levels"):
        learn(Nothing())


def test_pictures_are_needed_to_match_them(folder):
    import tiny

    with pytest.raises(ValueError, match="pictures: objective match pictures needs some"):
        search(objective="match pictures")
    with pytest.raises(ValueError, match="pictures: one says nothing"):
        search(objective="match pictures", pictures={"samples": tiny.latents(1)})
    out = search(objective="match pictures", pictures={"samples": tiny.latents(8)}, samples=6)
    file = only(folder)
    assert set(file["errors"]) == {"teacher", "pictures"}
    assert file["errors"]["pictures"][0] <= file["errors"]["pictures"][1]
    lines = json.loads(out.ui["livediffusion_steps"][0])["lines"]
    assert lines[0].startswith("RMSE to 100 steps") and lines[1].startswith("Frechet distance")


def test_one_step_is_a_schedule_too():
    assert learn(steps=1).args[0].tolist() == pytest.approx([14.6146, 0.0], rel=1e-4)
    assert learn(steps=1, time_shift=True).args[0].tolist() == learn(steps=1).args[0].tolist()


def test_the_shift_is_told_between_the_levels_too():
    from livediffusion.host.models.time_shift import shifted

    sampling = model("flow").get_model_object("model_sampling")
    told = shifted(model("flow"), (0.9, 0.5, 0.1), (0.0, 0.2, -0.4)).get_model_object(
        "model_sampling"
    )

    def factor(level):
        sigma = torch.tensor([level])
        return float((told.timestep(sigma) / sampling.timestep(sigma)).log())

    assert [factor(level) for level in (1.0, 0.9, 0.5, 0.1, 0.01)] == pytest.approx(
        [0.0, 0.0, 0.2, -0.4, -0.4], abs=1e-5
    )
    assert factor((0.5 * 0.1) ** 0.5) == pytest.approx(-0.1, abs=1e-5)
    assert model("flow").get_model_object("model_sampling") is sampling


def test_a_shifted_model_is_another_model():
    from livediffusion.host.models import fingerprint
    from livediffusion.host.models.time_shift import shifted

    one, other = (shifted(model(), (3.0, 1.0), (0.0, by)) for by in (0.1, 0.2))
    twice = shifted(one, (3.0, 1.0), (0.0, 0.1))
    same = shifted(model(), (3.0, 1.0), (0.0, 0.1))
    prints = [fingerprint.of_model(m) for m in (model(), one, other, twice)]
    assert len(set(prints)) == 4 and fingerprint.of_model(same) == prints[1]


def test_progress_and_a_preview_are_shown(monkeypatch):
    import latent_preview
    from livediffusion.nodes import learning

    told, pictures = [], []

    class Bar:
        def __init__(self, total):
            self.total, self.current = total, 0

        def update_absolute(self, value, total=None, preview=None):
            self.current = value
            (told if preview is None else pictures).append(preview or value / self.total)

    def previewer(device, form):
        return latent_preview.Latent2RGBPreviewer(form.latent_rgb_factors)

    monkeypatch.setattr(learning.comfy.utils, "ProgressBar", Bar)
    monkeypatch.setattr(latent_preview, "get_previewer", previewer)
    for find in (learn, search):
        told.clear(), pictures.clear()
        find()
        assert len(told) > 10 and told == sorted(told) and told[-1] == 1.0
        assert len(told) <= 210  # messages, however many calls
        kind, image, _ = pictures[-1]
        assert len(pictures) >= 2 and kind == "JPEG" and image.size == (8, 8)
