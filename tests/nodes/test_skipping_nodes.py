"""Live Searched Steps with skip_up_to, on real ComfyUI models."""

import dataclasses
import functools
import json

import pytest
import torch

pytestmark = pytest.mark.comfy

STEPS, SHARE = 2, 0.4


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
    _searched.clear()


@pytest.fixture
def calls(monkeypatch):
    """How often the model is called, and a way to stop it."""
    from livediffusion.host.learning import study

    class Calls:
        made, last = 0, 10**9

    before = study.Bench.__call__

    def counted(self, *args):
        Calls.made += 1
        if Calls.made > Calls.last:
            raise study.comfy.model_management.InterruptProcessingException
        return before(self, *args)

    monkeypatch.setattr(study.Bench, "__call__", counted)
    return Calls


_searched = {}  # name and text of the file, and the calls that it took


@pytest.fixture
def searched(folder, calls):
    """The result of one search, which all tests share, in this test's folder; the file."""
    if not _searched:
        search()
        (file,) = folder.glob("*.json")
        _searched.update(name=file.name, text=file.read_text(), calls=calls.made)
    folder.mkdir(exist_ok=True)
    file = folder / _searched["name"]
    file.write_text(_searched["text"])
    calls.made = 0
    return file


@functools.cache
def model():
    import tiny

    return tiny.model(prompt=1.0)


def search(**changed):
    import tiny
    from livediffusion.nodes.learning import LiveSearchedSteps

    given = {
        "model": model(), "positive": tiny.conditioning(1), "cfg": 1.0, "solver": "euler",
        "steps": STEPS, "population": 4, "generations": 2, "seed": 3, "samples": 2,
        "strength": 0.4, "result": "find", "objective": "match the fine solution",
        "latent": {"samples": tiny.latents(2)}, "skip_up_to": SHARE, **changed,
    }  # fmt: skip
    return LiveSearchedSteps.execute(**given)


def only(folder):
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())


def share(skips):
    from livediffusion.host.models.skips import cost

    return cost(model(), (8, 8), 8).share(skips)


def test_what_is_promised_is_what_comfyuis_sampler_does(searched, calls):
    """The error and the share, worked out again with stock nodes and the node's two outputs."""
    import comfy.samplers
    import tiny
    from comfy_extras.nodes_custom_sampler import Guider_Basic, SamplerCustomAdvanced
    from livediffusion.host.learning.study import Subject
    from livediffusion.nodes.schedules import LiveStrength

    sigmas, cut = search().args
    file = json.loads(searched.read_text())
    assert not calls.made  # it is not searched again
    assert file["flops"] == pytest.approx(share(file["skips"])) and file["flops"] <= 1 - SHARE
    assert len(file["skips"]) == STEPS and "bodies" not in file
    own, rule = file["errors"]["teacher"]
    assert own <= rule and file["hand_made"].startswith("one in ")
    assert file["whole"]["teacher"][0] <= file["whole"]["teacher"][1]
    clean = tiny.latents(2)  # of four, which repeat, the second half

    class Held:
        seed = 0

        def generate_noise(self, latent):
            return Subject(model(), [], None, 1.0, clean[:1], 4, 3).noise()[2:]

    def sampled(patcher, sigmas, sampler="euler"):
        guider = Guider_Basic(patcher)
        guider.set_conds(tiny.conditioning(1))
        out = SamplerCustomAdvanced.execute(
            Held(), guider, comfy.samplers.sampler_object(sampler), sigmas, {"samples": clean}
        )
        return patcher.model.process_latent_in(out.args[0]["samples"])

    levels = LiveStrength.execute(model(), 100, 0.4, "uniform t").args[0]
    fine = sampled(model(), levels, "dpmpp_2m")
    assert tiny.rms(sampled(cut, sigmas), fine) == pytest.approx(own, rel=2e-3)
    assert tiny.rms(sampled(model(), sigmas), fine) == pytest.approx(
        file["whole"]["teacher"][0], rel=2e-3
    )


def test_the_outputs_run_in_the_stream(searched):
    import tiny
    from livediffusion.nodes.sampling import LiveRCFGGuider, LiveStreamSampler

    sigmas, cut = search().args
    guider = LiveRCFGGuider.execute(cut, tiny.conditioning(1), 1.0, 1.0, "off").args[0]
    LiveStreamSampler.hidden = None
    done = LiveStreamSampler.execute(
        guider, sigmas, {"samples": tiny.latents(3)}, 0, "euler", 1, "clip", "per frame", True
    )
    assert done.args[0]["samples"].isfinite().all()


def test_without_it_the_model_and_the_results_are_as_ever(folder):
    """The same file under the same name, with nothing in it that older packs do not know."""
    sigmas, out = search(skip_up_to=0.0).args
    assert out is model()
    (file,) = folder.glob("*.json")
    told = json.loads(file.read_text())
    assert not {"skips", "flops", "whole"} & set(told) and "skip" not in told["asked"]
    assert torch.equal(search(skip_up_to=0.0).args[0], sigmas)


def test_what_was_left_out_is_told(searched):
    before = json.loads(searched.read_text())
    lines = json.loads(search().ui["livediffusion_steps"][0])["lines"]
    assert lines[0].startswith("RMSE to 100 steps") and "one in " in lines[0]
    assert lines[1].startswith("the whole network: ")
    assert lines[2] == f"{before['flops']:.0%} of the network runs: use the model output"


def test_cancel_keeps_the_best_and_the_next_run_goes_on(searched, folder, calls):
    from livediffusion.host.learning import study

    whole = json.loads(searched.read_text())
    searched.unlink()
    calls.last = _searched["calls"] - 8  # while blocks are left out
    with pytest.raises(study.comfy.model_management.InterruptProcessingException):
        search()
    kept = only(folder)
    assert 2 <= kept["rounds"][0] < kept["rounds"][1] == 4 and kept["skips"]
    calls.last, calls.made = 10**9, 0
    search()
    after = only(folder)
    assert calls.made < _searched["calls"]  # steps are not searched again
    assert after["rounds"] == whole["rounds"] == [4, 4] and after["flops"] <= 1 - SHARE
    assert after["errors"]["teacher"][0] <= kept["errors"]["teacher"][0] * (1 + 1e-6)
    assert after["whole"] == kept["whole"] == whole["whole"]
    assert after["curves"] == whole["curves"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"skips": [["input.1.0"]]}, "it leaves blocks out 1 times, and euler calls the model 2"),
        ({"skips": [["input.1.0"], ["input.3.7"]]}, "has no block input.3.7"),
        ({"skips": [["input.1.0"], ["../../x"]]}, "holds no schedule"),
        ({"skips": [["input.1.0"] * 501, []]}, "holds no schedule"),
        ({"skips": "input.1.0"}, "holds no schedule"),
        ({"flops": 7}, "holds no schedule"),
        ({"whole": {"teacher": 1}}, "holds no schedule"),
        ({"blocks": []}, "holds no schedule"),
    ],
)
def test_files_of_strangers_are_checked_in_words(searched, folder, change, says):
    told = json.loads(searched.read_text())
    given = {"skips": [["input.1.0"], []], "flops": 0.9, "whole": {"teacher": [0.1, 0.2]}}
    mine = folder / "searched-mine.json"
    mine.write_text(json.dumps({**told, **given}))
    # what is left out is the file's, whatever skip_up_to says
    assert search(result=mine.name, skip_up_to=0.0).args[1] is not model()
    mine.write_text(json.dumps({**told, **given, **change}))
    with pytest.raises(ValueError, match=says):
        search(result=mine.name)


def test_what_cannot_be_left_out_is_refused_in_words():
    import tiny

    said = r"skip_up_to: 0\.99 (is more than this model's blocks are|cannot be)"
    with pytest.raises(ValueError, match=said):
        search(skip_up_to=0.99)
    replaced = tiny.model(prompt=1.0, seed=1)
    unet = replaced.model.diffusion_model
    whole = unet.forward
    unet.forward = lambda x, *args, **kwargs: unet._forward(x, *args, **kwargs)
    with pytest.raises(ValueError, match="skip_up_to: something runs this model's network in a"):
        search(model=replaced)
    unet.forward = whole

    class Other(torch.nn.Module):
        pass

    odd = tiny.model(prompt=1.0, seed=2)
    odd.model.diffusion_model = Other()
    with pytest.raises(ValueError, match="skip_up_to: nothing of this model can be left out"):
        search(model=odd)


def test_a_result_with_skips_is_read_as_it_was_written(tmp_path):
    from livediffusion.schedules.results import Result, load, save

    made = Result(
        "searched", "euler", (2.0, 1.0, 0.0), (), "teacher", {"teacher": (0.1, 0.2)}, "a rule",
        "model", (4, 4), skips=(("input.1.0",), ()), flops=0.75, whole={"teacher": (0.05, 0.06)},
    )  # fmt: skip
    save(made, tmp_path / "a.json")
    assert load(tmp_path / "a.json") == made
    assert made.steps.skips == (frozenset(["input.1.0"]), frozenset())
    save(dataclasses.replace(made, skips=()), tmp_path / "b.json")
    assert load(tmp_path / "b.json").steps.skips == ()
