"""The life of a TensorRT engine: built, kept, found again, refused, loaded, run.

TensorRT is the double; what runs it is everything of ours, on ComfyUI's own models.
"""

import json
import os
import pathlib
import re
import sys
import time

import pytest
import tiny
import torch
from compiled_models import lora

pytestmark = [pytest.mark.comfy, pytest.mark.slow]
pytest.importorskip("onnxruntime")

SIGMAS = (10.0, 5.0, 1.0, 0.0)


@pytest.fixture(autouse=True)
def inference(trt):
    with torch.inference_mode():
        yield


@pytest.fixture
def build(exported_once):
    """Builds an engine for a model; returns its path."""
    from livediffusion.host.models import tensorrt

    def build(model, width=64, height=64, rows=4, tokens=77, controlnet=False, precision="fp32",
              name="x", report=lambda *told: None, **flags):  # fmt: skip
        asked = tensorrt.wish(model, width, height, rows, tokens, controlnet, precision, **flags)
        return tensorrt.build(model, asked, name, report)

    return build


def sampled(model, rows=2, size=(8, 8), tokens=77, cfg=1.5, prompts=None, **extra):
    """What a stock guider samples with the model, under random prompts if none are given."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    pooled = model.model.model_config.unet_config.get("adm_in_channels")
    sides = prompts or [tiny.conditioning(i, tokens, pooled, **extra) for i in (1, 2)]
    guider.set_conds(*sides)
    guider.set_cfg(cfg)
    channels = model.model.latent_format.latent_channels
    noise = torch.randn(rows, channels, *size, generator=torch.Generator().manual_seed(0))
    return guider.sample(
        noise, torch.zeros_like(noise), comfy.samplers.ksampler("euler"), torch.tensor(SIGMAS),
        disable_pbar=True,
    )  # fmt: skip


def loaded(path, model=None):
    from livediffusion.compiled.trt import files
    from livediffusion.host.models import tensorrt

    sidecar = files.check(path, tensorrt.here)
    if model is None:
        return tensorrt.load(path, sidecar, lambda text: None)
    return tensorrt.run_on(model, path, sidecar, lambda text: None)


def engine(model):
    from livediffusion.host.models.engines import engine_of

    return engine_of(model)


@pytest.mark.parametrize("version", ["8.5.3", "10.0.1", "10.13.3.9", "11.4.0.106"])
def test_an_engine_gives_what_the_unet_gives(version, build, monkeypatch):
    """Loaded alone and with the model, on versions whose flags differ."""
    import tensorrt_double

    double = tensorrt_double.make(version)
    monkeypatch.setitem(sys.modules, "tensorrt", double)
    model = tiny.model()
    path = build(model, precision="fp16" if version == "8.5.3" else "fp32")
    expected = {
        "8.5.3": {"EXPLICIT_BATCH", "FP16"}, "10.0.1": {"EXPLICIT_BATCH", "STRONGLY_TYPED"},
        "10.13.3.9": {"EXPLICIT_BATCH", "STRONGLY_TYPED"}, "11.4.0.106": {"STRONGLY_TYPED"},
    }  # fmt: skip
    assert double.flags == expected[version]
    for made in (loaded(path), loaded(path, model)):
        close = 2e-2 if version == "8.5.3" else 1e-5
        assert tiny.rms(sampled(made), sampled(model)) <= close
        assert engine(made).stats()["fallbacks"] == 0 and engine(made).ran == 3


@pytest.mark.parametrize("layout", ["SD2.1", "SDXL"])
def test_layouts(layout, build):
    model = tiny.model(layout=layout)
    if layout == "SDXL":
        model.model.encode_adm = lambda **kwargs: kwargs["pooled_output"]
    made = loaded(build(model), model)
    assert tiny.rms(sampled(made), sampled(model)) <= 1e-5
    assert engine(made).fell_back == 0


def test_the_embedded_model_alone(build):
    """Its MODEL is made up again from the sidecar: classes of this pack, latents of pixels."""
    from livediffusion.demo import loader

    model, clip, _ = loader.load()
    made = loaded(build(model, 256, 256, rows=2))
    assert type(made.model) is type(model.model)
    assert type(made.model.latent_format) is type(model.model.latent_format)
    assert type(made.model.model_sampling) is type(model.model.model_sampling)
    prompts = [clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in ("watercolor", "")]
    wants, gives = (sampled(m, 1, (64, 64), prompts=prompts) for m in (model, made))
    assert tiny.rms(gives, wants) <= 1e-5 and engine(made).fell_back == 0
    assert made.model_size() > 1 << 20  # what ComfyUI makes room for
    assert [p.numel() for p in made.model.diffusion_model.parameters()] == []


def test_fewer_rows_and_shorter_prompts_fit_more_do_not(build):
    model = tiny.model()
    made = loaded(build(model, rows=4, tokens=154), model)
    for rows, tokens in ((1, 77), (2, 154), (2, 77)):
        assert (
            tiny.rms(sampled(made, rows, tokens=tokens), sampled(model, rows, tokens=tokens))
            <= 1e-5
        )
    assert engine(made).fell_back == 0
    for asked, reason in (
        ({"rows": 5}, "built for 4 rows, and this call has 10"),
        ({"tokens": 231}, "built for 154 tokens, and this prompt has 231"),
        ({"size": (8, 16)}, "built for latents of 8 x 8 .* this call has 8 x 16"),
    ):
        before = engine(made).ran
        assert tiny.rms(sampled(made, **asked), sampled(model, **asked)) <= 1e-6
        assert engine(made).ran == before
        assert re.search(reason, engine(made).reason), engine(made).reason


def test_alone_it_says_what_it_cannot_do_and_goes_on(build):
    model = tiny.model()
    made = loaded(build(model, rows=4))
    with pytest.raises(RuntimeError, match="build it with rows 10"):
        sampled(made, rows=5)
    assert tiny.rms(sampled(made), sampled(model)) <= 1e-5


def test_dynamic_size(build):
    model = tiny.model()
    made = loaded(build(model, 128, 128, dynamic_size=True), model)
    for size in ((8, 8), (16, 24), (24, 8)):
        assert tiny.rms(sampled(made, size=size), sampled(model, size=size)) <= 1e-5, size
    assert engine(made).fell_back == 0
    sampled(made, size=(32, 16))
    assert "latents of 8..24 x 8..24" in engine(made).reason


def controlled(model, seed, gain=1.0):
    """Conditioning with a ControlNet that gives this UNet's residuals."""
    import comfy.controlnet
    from compiled_models import call, controls

    class Given(comfy.controlnet.ControlBase):
        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            asked = call(model, x_noisy.shape[0], x_noisy.shape[2:])
            sides = {"input": [], "middle": [], "output": []}
            named = controls(model, asked, seed)
            for name in sorted(named, key=lambda n: int(n.rpartition("_")[2]), reverse=True):
                sides[name.split("_")[1]].append(gain * named[name])
            return sides

        def copy(self):
            return self

    given = Given()
    return {"control": given, "control_apply_to_uncond": True}


def test_controlnet(build):
    model = tiny.model()
    plain = loaded(build(model), model)
    able = loaded(build(model, controlnet=True), model)
    with_control = controlled(model, 1)
    truth = sampled(model, **with_control)
    assert tiny.rms(truth, sampled(model)) > 0.01
    assert tiny.rms(sampled(able, **with_control), truth) <= 1e-5
    # and without one again: the last residuals are gone
    assert tiny.rms(sampled(able), sampled(model)) <= 1e-5
    assert engine(able).fell_back == 0
    assert tiny.rms(sampled(plain, **with_control), truth) <= 1e-6
    assert "built without ControlNet" in engine(plain).reason
    with pytest.raises(RuntimeError, match="build it with controlnet on"):
        sampled(loaded(build(model)), **with_control)


def test_patches_are_refused_by_name(build):
    model = tiny.model()
    made = loaded(build(model), model)

    def pulled(q, context, value, extra):
        return q * 0.5, context, value

    for patcher in (made, model):
        patcher.set_model_attn1_patch(pulled)
    assert tiny.rms(sampled(made), sampled(model)) <= 1e-6
    assert engine(made).ran == 0
    assert "patched the UNet (patches: attn1_patch)" in engine(made).reason
    alone = loaded(build(model))
    alone.set_model_attn1_patch(pulled)
    with pytest.raises(RuntimeError, match="patches: attn1_patch"):
        sampled(alone)


def test_a_lora_after_the_build_is_refused(build):
    model = tiny.model()
    path = build(model)
    added = lora(loaded(path, model))
    truth = sampled(lora(model))
    assert tiny.rms(sampled(added), truth) <= 1e-6
    assert "a LoRA was added after the engine was built" in engine(added).reason
    with pytest.raises(ValueError, match="model: a LoRA cannot be added"):
        lora(loaded(path))
    with pytest.raises(ValueError, match="with other LoRAs or strengths"):
        loaded(path, lora(model))


def test_a_lora_before_the_build_is_in_it(build):
    model = lora(tiny.model())
    made = loaded(build(model), model)
    assert tiny.rms(sampled(made), sampled(model)) <= 1e-5
    assert engine(made).fell_back == 0
    assert tiny.rms(sampled(loaded(build(model))), sampled(model)) <= 1e-5


@pytest.mark.parametrize("version", ["10.13.3.9", "11.4.0.106"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_refit_follows_a_lora(version, precision, build, monkeypatch, trt):
    """Strength up, down and off, without another build."""
    import tensorrt_double

    double = tensorrt_double.make(version)
    monkeypatch.setitem(sys.modules, "tensorrt", double)
    model = tiny.model(prompt=1.0)
    path = build(model, precision=precision, refit=True)
    assert "REFIT_INDIVIDUAL" in double.flags and "REFIT" not in double.flags
    made = loaded(path, model)
    close = 1e-5 if precision == "fp32" else 5e-3
    for strength in (0.5, 1.0, None):
        changed = made if strength is None else lora(made, strength)
        truth = sampled(model if strength is None else lora(model, strength))
        assert tiny.rms(sampled(changed), truth) <= close, strength
    assert engine(made).fell_back == 0
    assert double.built == 1
    # a model with a LoRA already, on the engine that was built without
    ready = loaded(path, lora(model, 0.7))
    assert tiny.rms(sampled(ready), sampled(lora(model, 0.7))) <= close


def test_refit_needs_a_version_that_exchanges_single_weights(build, monkeypatch):
    import tensorrt_double

    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_double.make("10.0.1"))
    with pytest.raises(ValueError, match=r"TensorRT 10\.0\.1 cannot exchange single weights"):
        build(tiny.model(), refit=True)


def test_bf16_cannot_be_refitted(build):
    with pytest.raises(ValueError, match="refit: weights of bf16"):
        build(tiny.model(), precision="bf16", refit=True)


def test_a_second_build_finds_the_first(build, trt, tmp_path):
    model = tiny.model()
    told = []
    first = build(model)
    assert build(model, report=lambda *step: told.append(step)) == first
    assert trt.built == 1 and told == []
    names = sorted(p.name for p in first.parent.iterdir())
    assert names == sorted([first.name, f"{first.name}.json", "timing-double-gpu-10.16.1.11.cache"])
    build(model, rows=2)
    assert trt.timing == [b"", b"timing 10.16.1.11 Double GPU"]


@pytest.mark.parametrize(
    "change",
    [
        {"width": 128}, {"height": 128}, {"rows": 8}, {"tokens": 154}, {"controlnet": True},
        {"precision": "fp16"}, {"dynamic_size": True}, {"refit": True}, {"model": "lora"},
        {"model": "strength"}, {"model": "other"}, {"gpu": "Another GPU"}, {"capability": "9.0"},
        {"cuda_driver": 13}, {"tensorrt": "10.13.3.9"}, {"exporter": 99}, {"opset": 18},
    ],
    ids=lambda change: "-".join(f"{k}={v}" for k, v in change.items()),
)  # fmt: skip
def test_everything_an_engine_depends_on_is_in_its_key(change, trt, monkeypatch):
    from livediffusion.compiled import onnx_export
    from livediffusion.compiled.trt import api
    from livediffusion.host.models import tensorrt

    base = tiny.model()
    settings = {"width": 64, "height": 64, "rows": 4, "tokens": 77, "controlnet": False,
                "precision": "fp32"}  # fmt: skip
    model = lora(base)
    key = tensorrt.wish(model, **settings).made().key()
    assert key == tensorrt.wish(lora(base), **settings).made().key()
    ((name, value),) = change.items()
    if name == "model":
        model = {"lora": base, "strength": lora(base, 0.7), "other": lora(tiny.model(seed=1))}[
            value
        ]
    elif name == "tensorrt":
        monkeypatch.setattr(trt, "__version__", value)
    elif name in ("exporter", "opset"):
        monkeypatch.setattr(onnx_export, {"exporter": "VERSION", "opset": "OPSET"}[name], value)
    elif name in api.gpu():
        here = {**api.gpu(), name: value}
        monkeypatch.setattr(api, "gpu", lambda: here)
    else:
        settings[name] = value
    assert tensorrt.wish(model, **settings).made().key() != key


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gpu": "NVIDIA Another"}, "built for another GPU: Double GPU, and here is NVIDIA Anoth"),
        ({"capability": "9.0"}, "another compute capability: 8.9"),
        ({"cuda_driver": 13}, "another CUDA driver"),
        ({"tensorrt": "11.4.0.106"}, "another TensorRT: 10.16.1.11"),
        ({"exporter": 99}, "another version of this pack's exporter"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_engine_of_elsewhere_is_not_loaded(change, said, build):
    from livediffusion.compiled.trt import files
    from livediffusion.host.models import tensorrt

    path = build(tiny.model())
    with pytest.raises(files.Unfit, match=said):
        files.check(path, lambda library: {**tensorrt.here(library), **change})


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def sidecar(text):
    def change(path):
        path.with_name(f"{path.name}.json").write_text(text, encoding="utf-8")

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncated, "is damaged: .* bytes instead of"),
        (flipped, "its content has changed"),
        (sidecar("{"), "JSON file beside it that cannot be read"),
        (sidecar("[]"), "JSON file beside it that cannot be read"),
        (sidecar(json.dumps({"format": 0})), "another version of this pack"),
        (sidecar(json.dumps({"format": 1, "made": {}})), "cannot be read"),
        (lambda path: path.with_name(f"{path.name}.json").unlink(), "no JSON file beside it"),
    ],
    ids=["half-written", "corrupt", "half a sidecar", "a list", "old", "empty", "no sidecar"],
)
def test_a_damaged_engine_is_named_and_built_anew(damage, said, build, trt, caplog):
    from livediffusion.compiled.trt import files
    from livediffusion.host.models import tensorrt

    model = tiny.model()
    path = build(model)
    damage(path)
    with pytest.raises(files.Unfit, match=said):
        files.check(path, tensorrt.here)
    assert build(model) == path
    assert trt.built == 2
    assert "it is built anew" in caplog.text
    assert files.check(path, tensorrt.here).size == path.stat().st_size


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("parse", "cannot read the UNet: In node 7: no importer for Frobnicate"),
        ("build", "TensorRT built nothing"),
        ("raise", "RuntimeError: the builder has crashed"),
    ],
)
def test_a_build_that_fails_leaves_nothing_half_done(trouble, said, build, trt):
    import folder_paths

    model = tiny.model()
    trt.trouble.add(trouble)
    with pytest.raises(ValueError, match=f"The engine was not built: .*{said}"):
        build(model)
    folder = pathlib.Path(folder_paths.models_dir) / "tensorrt"
    assert [p.name for p in folder.iterdir() if not p.name.startswith("timing-")] == []
    trt.trouble.clear()
    assert tiny.rms(sampled(loaded(build(model), model)), sampled(model)) <= 1e-5


def test_a_full_disk_is_said(build, trt, monkeypatch):
    from livediffusion.compiled.trt import files

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(ValueError, match=r"not built: .*No space left on device"):
        build(tiny.model())


def test_progress_and_cancel(build, trt):
    import comfy.model_management
    import folder_paths

    model = tiny.model()
    told = []
    build(model, report=lambda *step: told.append(step))
    phases = list(dict.fromkeys(phase for phase, _, _ in told))
    assert phases == ["exporting", "tactics"]
    assert ("tactics", trt.steps, trt.steps) in told

    def stop(phase, step, steps):
        if (phase, step) == ("tactics", 3):
            comfy.model_management.interrupt_current_processing()

    trt.steps = 100_000
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        build(model, rows=2, report=stop)
    assert trt.built == 1
    folder = pathlib.Path(folder_paths.models_dir) / "tensorrt"
    assert not [p for p in folder.iterdir() if p.name.startswith(".building")]
    trt.steps = 8
    build(model, rows=2)
    assert trt.built == 2


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("deserialize", "TensorRT cannot load"),
        ("context", "not enough GPU memory"),
        ("address", "does not accept a buffer"),
        ("execute", "TensorRT could not run"),
    ],
)
def test_what_fails_at_load_or_run_never_stops_the_picture(trouble, said, build, trt, caplog):
    model = tiny.model()
    path = build(model)
    trt.trouble.add(trouble)
    made = loaded(path, model)
    assert tiny.rms(sampled(made), sampled(model)) <= 1e-6
    assert said in engine(made).reason
    assert caplog.text.count(said) == 1
    with pytest.raises(RuntimeError, match=said):
        sampled(loaded(path))
    trt.trouble.clear()
    alone = loaded(path)
    assert tiny.rms(sampled(alone), sampled(model)) <= 1e-5


def test_comfyui_may_take_the_memory_back(build, trt):
    """The engine goes when ComfyUI unloads its MODEL, and comes back with the next call."""
    import comfy.model_management

    model = tiny.model()
    path = build(model)
    for made in (loaded(path), loaded(path, model)):
        before = trt.loaded
        sampled(made)
        assert trt.loaded == before + 1
        sampled(made)
        assert trt.loaded == before + 1
        held = [e.model for e in comfy.model_management.current_loaded_models]
        # the file's weights, and the working memory that the engine says it needs
        assert path.stat().st_size + (1 << 20) in [p.model_size() for p in held]
        comfy.model_management.unload_all_models()
        assert tiny.rms(sampled(made), sampled(model)) <= 1e-5
        assert trt.loaded == before + 2


def test_leftovers_of_a_killed_build_are_swept(build, trt):
    import folder_paths

    folder = pathlib.Path(folder_paths.models_dir) / "tensorrt"
    for name, age in ((".building-old", 2 * 86400), (".building-new", 60)):
        (folder / name).mkdir(parents=True)
        os.utime(folder / name, (time.time() - age,) * 2)
    build(tiny.model())
    assert not (folder / ".building-old").exists() and (folder / ".building-new").exists()
