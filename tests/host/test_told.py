"""What tells a conditioning from another where rows may stand for each other: all that ComfyUI puts
into an entry, but for pictures that are a frame's own."""

import copy
import pathlib
import re

import pytest
import torch
from tiny_models import forget, inference, tiny_model  # noqa: F401

pytestmark = pytest.mark.comfy

# what nodes call an entry's dict where they write a name into it
WRITTEN = re.compile(r"\b(?:n|c|cond|t)\[1\]\[['\"](\w+)['\"]\] = |\bd\[['\"](\w+)['\"]\] = ")
GIVEN = re.compile(r"conditioning_set_values\(\s*\w+,\s*\{([^}]*)\}")
# put there by ComfyUI itself on the way to a call
ITSELF = {"cross_attn", "pooled_output", "timestep_start", "timestep_end", "hooks", "default",
          "clip_start_percent", "clip_end_percent", "set_area_to_bounds"}  # fmt: skip


def noise(seed, *shape):
    return torch.randn(*(shape or (1, 4, 4)), generator=torch.Generator().manual_seed(seed))


def names():
    """All that this ComfyUI's nodes put into a conditioning."""
    import comfy.samplers

    root, found = pathlib.Path(comfy.samplers.__file__).parents[1], set(ITSELF)
    for path in (root / "nodes.py", root / "comfy" / "hooks.py", *root.glob("comfy_extras/*.py")):
        text = path.read_text(encoding="utf-8")
        found |= {name for pair in WRITTEN.findall(text) for name in pair if name}
        for given in GIVEN.findall(text):
            found |= set(re.findall(r"['\"](\w+)['\"]\s*:", given))
    return found


def hooked(kind):
    import comfy.hooks

    def made(strength):
        hook = comfy.hooks.WeightHook(strength_model=strength)
        group = comfy.hooks.HookGroup()
        group.add(hook)
        return group

    first, keyframed = made(1.0), made(1.0)
    if kind == "keyframes":
        keyframed = first.clone()
        frames = comfy.hooks.HookKeyframeGroup()
        frames.add(comfy.hooks.HookKeyframe(0.5))
        keyframed.set_keyframes_on_hooks(frames)
    return first, first.clone(), keyframed


def values(name):
    """Of a name: a value, one that asks for the same, and one that does not."""
    if name in ("mask", "concat_mask"):
        return [[noise(1), noise(1), noise(2)], [noise(1), noise(1), noise(1)[:, :2]]]
    if name == "hooks":
        return [hooked("another"), hooked("keyframes")]
    thing, embedded, model = object(), noise(1), torch.nn.Linear(1, 1)
    held = noise(3)
    return [
        (held, held, held.clone()), (thing, thing, object()), (0.5, 0.5, 0.6), ("a", "a", "b"),
        (None, None, 1), ([held], [held], [held, held]), ((1, 2, 0, 0), (1, 2, 0, 0), (1, 2, 0, 1)),
        # of GLIGEN, and of unCLIP
        *[tuple(("position", model, [(embedded, 4, 4, 0, x)]) for x in (0, 0, 2))],
        *[tuple([{"clip_vision_output": thing, "strength": 1.0, "noise_augmentation": a}]
                for a in (0.1, 0.1, 0.2))],
    ]  # fmt: skip


def test_all_that_nodes_put_into_a_conditioning_counts():
    from livediffusion.host.sampling import told

    found = names()
    assert found >= {"gligen", "control", "mask", "concat_latent_image", "noise_augmentation",
                     "unclip_conditioning", "area", "strength", "reference_latents"}  # fmt: skip
    entry = {"cross_attn": noise(9), "uuid": 1, "model_conds": {}}
    for name in sorted((found | {"of another pack"}) - {"control", "conditioning_lyrics"}):
        for one, same, other in values(name):
            asked = [told.asked({**entry, "uuid": i, name: value})
                     for i, value in enumerate((one, same, other))]  # fmt: skip
            assert asked[0] == asked[1] and hash(asked[0]) == hash(asked[1]), name
            own = name in told.OF_ONE_FRAME
            assert (asked[0] == asked[2]) == own, (name, one, other)
    assert found >= told.OF_ONE_FRAME


def test_what_a_pack_hands_the_model_counts_and_what_comfyui_makes_of_the_rest_does_not():
    import comfy.conds
    from livediffusion.host.sampling import told

    def asked(name, cond):
        return told.asked({"model_conds": {name: cond}})

    held = noise(1)
    for name in ("y", "c_concat", "c_crossattn", "crossattn_controlnet"):
        assert asked(name, comfy.conds.CONDRegular(noise(1))) == asked(
            name, comfy.conds.CONDRegular(noise(2)))  # fmt: skip
    for kind, one, other in ((comfy.conds.CONDRegular, held, noise(1)),
                             (comfy.conds.CONDConstant, 0.5, 0.6)):  # fmt: skip
        assert asked("theirs", kind(one)) == asked("theirs", kind(one))
        assert asked("theirs", kind(one)) != asked("theirs", kind(other))


# of a control: pictures of its frame, what the network brings with it, what calls leave behind
NOT_ASKED = {
    "cond_hint_original", "extra_concat_orig", "cond_hint", "extra_concat", "control_input",
    "latent_format", "compression_ratio", "upscale_algorithm", "preprocess_image", "channels_in",
    "manual_cast_dtype", "load_device", "device", "control_model_wrapped", "multigpu_clones",
    "timestep_range", "model_sampling_current", "previous_controlnet", "extra_conds",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["ControlNet", "T2IAdapter", "ControlLora"])
def test_all_of_a_control_counts_but_its_pictures(kind):
    import comfy.controlnet
    from livediffusion.host.sampling import told

    net = torch.nn.Linear(1, 1)
    given = {"ControlNet": (net,), "T2IAdapter": (net, 3, 8, "")}
    if kind == "ControlLora":
        control = comfy.controlnet.ControlLora({"weight": noise(1)})
        control.control_model = torch.nn.Linear(1, 1)  # made anew for each run
    else:
        control = getattr(comfy.controlnet, kind)(*given[kind])

    def asked(control):
        return told.asked({"control": control})

    before = asked(control)
    assert before == asked(control.copy()) == asked(
        control.copy().set_cond_hint(noise(1, 1, 3, 8, 8), control.strength)
    )
    skipped = NOT_ASKED | ({"control_model"} if kind == "ControlLora" else set())
    for name in sorted(vars(control).keys() - skipped):
        other = copy.copy(control)
        value = {"extra_args": {"control_type": [3]}, "extra_hooks": hooked("")[0],
                 "control_weights": {"weight": noise(1)}}.get(name, object())  # fmt: skip
        setattr(other, name, value)
        assert asked(other) != before, name
    assert asked(control.copy().set_previous_controlnet(control.copy())) != before
    other = copy.copy(control)
    for name in NOT_ASKED & vars(control).keys() - {"previous_controlnet"}:
        setattr(other, name, object())
    assert asked(other) == before


def test_networks_that_nobody_else_holds_are_let_go():
    import gc
    import weakref

    import comfy.controlnet
    from livediffusion.host.sampling import told

    network = torch.nn.Linear(1, 1)
    control, gone = comfy.controlnet.ControlNet(network), weakref.ref(network)
    asked = told.asked({"control": control, "gligen": ("position", network, [])})
    del control, network
    gc.collect()
    assert gone() is None and asked == asked and asked != told.asked({})


# -- in streams -----------------------------------------------------------------------------------


def area_mask(base, strength):
    return {"mask": torch.full((1, 64, 64), strength)}


def inpainted(base, strength):
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = strength
    return {"concat_latent_image": noise(1, 1, 4, 8, 8), "concat_mask": mask}


def control(base, strength):
    import parts

    hint = parts.image().movedim(-1, 1)
    return {"control": base.copy().set_cond_hint(hint, 0.8, (0.0, strength))}


@pytest.mark.parametrize("made", [area_mask, inpainted, control])
def test_another_one_beside_the_same_prompt_has_all_of_it_computed(made):
    import families
    import pairs
    import parts
    import tiny
    from livediffusion.engine.blocks.schedule import Reuse
    from livediffusion.host.models.coherence import attach
    from livediffusion.host.sampling.stream import Stream

    model = families.model("inpaint") if made is inpainted else tiny_model()
    base = parts.control_net("SD1.5") if made is control else None
    reusing = attach(model, reuse=Reuse(8, "outermost block", 0.0))
    prompt, stream = tiny.conditioning(1), Stream(1)

    def run(beside, count, first):
        """Rows, and those that ran whole, of runs whose guider is made anew for each."""
        ran = []
        for i in range(first, first + count):
            guider = pairs.guider(reusing, "off")
            guider.set_conds([[prompt[0][0], dict(beside)]], prompt)
            settings = pairs.settings((8.0, 2.0, 0.5, 0.0), immediate=True)
            stream.run(guider, tiny.latents(1, i), settings)
            ran.append(stream.coherent.neighbours.reusing.looked())
        return ran

    first, other = made(base, 0.25), made(base, 0.75)
    run(first, 5, 0)
    assert any(whole < rows for rows, whole in run(first, 3, 5)), "something was reused"
    ((rows, whole),) = run(other, 1, 8)
    assert rows == whole == 3
    assert any(whole < rows for rows, whole in run(other, 3, 9))


def test_gligen_has_all_of_it_computed_and_it_is_said():
    """Its patch holds a row for each row of a call, where inner blocks have fewer."""
    import pairs
    import parts
    import tiny
    from livediffusion.engine.blocks.schedule import Reuse
    from livediffusion.host.models.coherence import attach
    from livediffusion.host.sampling.stream import Stream

    base, prompt = tiny_model(), tiny.conditioning(1)
    box = {"gligen": ("position", parts.gligen("SD1.5"), [(noise(1, 1, 16), 4, 4, 0, 1)])}
    streams = []
    for model in (base, attach(base, reuse=Reuse(2, "outermost block", 0.0))):
        guider, stream = pairs.guider(model, "off"), Stream(1)
        guider.set_conds([[prompt[0][0], dict(box)]], prompt)
        streams.append((stream, guider))
    for i in range(5):
        outs = [stream.run(guider, tiny.latents(1, i), pairs.settings((8.0, 2.0, 0.5, 0.0)))
                for stream, guider in streams]  # fmt: skip
        assert tiny.rms(outs[1], outs[0]) <= 1e-5
    assert "GLIGEN" in streams[1][0].coherent.neighbours.reusing.why
