"""What looks at a call: the list of what has been read, kept to, and everything else found."""

import functools
import types

import pytest
import torch

pytestmark = pytest.mark.comfy

LEVELS, SEED = (8.0, 3.0, 1.2, 0.5, 0.0), 11


@pytest.fixture(scope="module")
def world():
    import coherent
    import comfy.samplers
    import tiny
    from livediffusion.host.models import looks
    from livediffusion.host.sampling import route
    from livediffusion.host.sampling.stream import Settings, Stream

    return types.SimpleNamespace(
        tiny=tiny, looks=looks, route=route, samplers=comfy.samplers, Settings=Settings,
        Stream=Stream, model=tiny.model(prompt=1.0), fine=coherent.model("fine"),
    )  # fmt: skip


def hypernetwork(model):
    """HypernetworkLoader's patch without its file: k and v are moved by what k and v are."""
    import comfy_extras.nodes_hypernetwork as nodes

    state = {
        16: [
            {f"linear.{i}.{name}": value for i in (0, 1) for name, value in (
                ("weight", torch.eye(16) * 0.3), ("bias", torch.full((16,), 0.1)),
            )}
            for _ in "kv"
        ],
        "activation_func": "linear",
    }  # fmt: skip
    load = nodes.comfy.utils.load_torch_file
    nodes.comfy.utils.load_torch_file = lambda *args, **kwargs: state
    try:
        patch = nodes.load_hypernetwork_patch("none", 0.7)
    finally:
        nodes.comfy.utils.load_torch_file = load
    patched = model.clone()
    patched.set_model_attn1_patch(patch)
    patched.set_model_attn2_patch(patch)
    return patched


def free(name):
    def patched(model):
        import comfy_extras.nodes_freelunch as nodes

        return getattr(nodes, name).execute(model, 1.4, 1.6, 0.7, 0.3).args[0]

    return patched


def shrunk(model):
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale as Node

    out = Node.execute(model, 1, 2.0, 0.0, 0.75, True, "bicubic", "bicubic")
    return out.args[0]


def rescaled(model):
    from comfy_extras.nodes_model_advanced import RescaleCFG

    return RescaleCFG().patch(model, 0.7)[0]


def perturbed(model):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance as Node

    return Node.execute(model, 2.0).args[0]


def merged(model):
    from comfy_extras.nodes_tomesd import TomePatchModel as Node

    return Node.execute(model, 0.5).args[0]


def tiled(model):
    from comfy_extras.nodes_hypertile import HyperTile as Node

    return Node.execute(model, 64, 1, 0, False)[0]


# every function on the list, by a node that hangs it on a MODEL; and the road that it allows
READ = {
    "TomePatchModel": (merged, "guider"),
    "HyperTile": (tiled, "guider"),
    "FreeU": (free("FreeU"), "guider"),
    "FreeU_V2": (free("FreeU_V2"), "guider"),
    "hypernetwork": (hypernetwork, "guider"),
    "PatchModelAddDownscale": (shrunk, "per level"),
    "RescaleCFG": (rescaled, "per level"),
    "PerturbedAttentionGuidance": (perturbed, "per level"),
}


def guider(world, model):
    out = world.samplers.CFGGuider(model)
    out.set_conds(world.tiny.conditioning(1), world.tiny.conditioning(2))
    out.set_cfg(2.0)
    return out


def each_alone(world, model, frames):
    from livediffusion.engine.noise import SlotNoise

    noise = SlotNoise(SEED, tuple(frames.shape[1:])).slot(0)[None]
    return torch.cat([
        guider(world, model).sample(
            noise.clone(), frame, world.samplers.ksampler("euler"), torch.tensor(LEVELS),
            disable_pbar=True, seed=SEED,
        )
        for frame in frames.split(1)
    ])  # fmt: skip


class Drawing:
    """torch whose draws are the same every time."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def randint(self, *args, **kwargs):
        return torch.randint(*args, **kwargs, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", READ)
def test_what_has_been_read_looks_at_no_more(world, name, monkeypatch):
    """Frames at all steps in one call, or at one level in one call, as if each were alone."""
    import comfy_extras.nodes_tomesd

    monkeypatch.setattr(comfy_extras.nodes_tomesd, "torch", Drawing())
    patch, road = READ[name]
    # these act at the finest level alone
    model = world.fine if name in ("TomePatchModel", "HyperTile") else world.model
    patched, frames = patch(model), world.tiny.latents(3, size=16)
    want = each_alone(world, patched, frames)
    without = each_alone(world, model, frames[:1])
    assert world.tiny.rms(want[:1], without) > 1e-4, "it acts"
    for per_slot in (1, 2):
        stream = world.Stream(per_slot)
        out = stream.run(
            guider(world, patched), frames, world.Settings(LEVELS, "euler", SEED, drain=True)
        )
        assert stream.roads()["road"] == road
        assert world.tiny.rms(out, want) <= 1e-5


def test_the_test_above_covers_the_list(world):
    """Differential diffusion, which acts on masks, is met in test_paths.py and test_registry.py."""
    seen = set()
    for patch, _ in READ.values():
        patched = patch(world.model)
        for value in _functions(patched.model_options):
            code = world.looks._code(value)
            seen.add((world.looks._relative(code.co_filename), code.co_name))
    listed = {key for key in world.looks._KNOWN if "differential" not in key[0]}
    assert listed == seen


def _functions(options):
    if isinstance(options, dict):
        options = list(options.values())
    if not isinstance(options, list | tuple):
        return [options] if callable(options) else []
    return [function for value in options for function in _functions(value)]


def patch(q, k, v, extra_options):
    return q, k, v * 0.5


class Callable_:
    def __call__(self, q, k, v, extra_options):
        return q, k, v * 0.5

    def method(self, q, k, v, extra_options):
        return q, k, v * 0.5


WRITTEN = {
    "function": patch,
    "partial": functools.partial(patch),
    "object": Callable_(),
    "method": Callable_().method,
    "compiled": torch.nn.Identity(),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_whatever_nobody_has_read_is_sampled_alone(world, kind):
    patched = world.model.clone()
    patched.set_model_attn2_patch(WRITTEN[kind])
    found = world.route.before(guider(world, patched))
    assert found.road is world.route.Road.PER_FRAME and "attn2_patch" in found.why


PLACES = {
    "cfg": lambda m: m.set_model_sampler_cfg_function(lambda a: a["cond"]),
    "post cfg": lambda m: m.set_model_sampler_post_cfg_function(lambda a: a["denoised"]),
    "pre cfg": lambda m: m.set_model_sampler_pre_cfg_function(lambda a: a["conds_out"]),
    "calc": lambda m: m.set_model_sampler_calc_cond_batch_function(lambda a: None),
    "function": lambda m: m.set_model_unet_function_wrapper(lambda f, a: None),
    "mask": lambda m: m.set_model_denoise_mask_function(lambda *a, **k: None),
    "attn1": lambda m: m.set_model_attn1_patch(patch),
    "replace": lambda m: m.set_model_attn1_replace(patch, "input", 1),
    "block": lambda m: m.set_model_input_block_patch(lambda h, o: h),
    "output": lambda m: m.set_model_output_block_patch(lambda h, s, o: (h, s)),
    "emb": lambda m: m.set_model_emb_patch(lambda *a: a),
    "object": lambda m: m.add_object_patch("diffusion_model.out", torch.nn.Identity()),
    "wrapper": lambda m: m.add_wrapper_with_key("apply_model", "other", patch),
    "callback": lambda m: m.add_callback_with_key("on_pre_run", "other", patch),
    "injection": lambda m: m.set_injections(
        "other", [types.SimpleNamespace(inject=patch, eject=patch)]
    ),
    "option": lambda m: m.model_options["transformer_options"].update(other={"deep": [patch]}),
    "tensor": lambda m: m.model_options["transformer_options"].update(other=torch.ones(2)),
}


@pytest.mark.parametrize("place", PLACES)
def test_it_is_found_wherever_it_hangs(world, place):
    patched = world.model.clone()
    PLACES[place](patched)
    found = world.route.before(guider(world, patched))
    assert found is not None and found.why, place


def test_plain_numbers_and_what_only_loads_do_not_slow_a_stream(world):
    patched = world.model.clone()
    patched.model_options["transformer_options"]["rope"] = {"scale": 2.0, "kind": "yarn"}
    patched.add_callback_with_key("on_load_after", "other", lambda *args: None)
    assert world.route.before(guider(world, patched)) is None


def test_a_method_put_on_a_guider_is_seen(world):
    made = guider(world, world.model)
    assert world.route.before(made) is None
    made.predict_noise = lambda *args, **kwargs: None
    assert "predict_noise" in world.route.before(made).why


def test_a_pack_that_replaces_comfyuis_own_way_is_seen(world, monkeypatch):
    monkeypatch.setattr(world.samplers, "calc_cond_batch", lambda *args: None)
    assert "calc_cond_batch" in world.route.before(guider(world, world.model)).why
