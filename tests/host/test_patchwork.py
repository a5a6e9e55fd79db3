"""Live Patchwork: ComfyUI's UNet on tokens of changed tiles against the same UNet with what is kept
put in by hand, and in streams."""

import contextlib
import copy
import functools
from unittest import mock

import pytest
import tiny
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.comfy

LAYOUTS = ["SD1.5", "SD2.1", "SDXL"]
NEAR = 1e-5  # of the largest value
ROWS, SIZE = 3, 16


@functools.cache
def model(layout="SD1.5"):
    import coherent

    if layout == "embedded":
        from livediffusion.demo import loader

        return loader.load_model()
    if layout == "deep":
        # as deep as Stable Diffusion's: at the deepest level a token is more than a tile
        more = {"num_res_blocks": [1] * 4, "channel_mult": [1, 1, 2, 2],
                "transformer_depth": [1, 1, 1, 0],
                "transformer_depth_output": [1, 1, 1, 1, 1, 1, 0, 0]}  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny, "LAYOUTS", {**tiny.LAYOUTS, "deep": more})
            return coherent.model("deep")
    return coherent.model(layout)


@pytest.fixture(scope="module", autouse=True)
def forget():
    yield
    model.cache_clear()


@pytest.fixture(autouse=True)
def inference(comfyui):
    with torch.inference_mode():
        yield


def asked(layout, rows=ROWS, seed=0):
    """Of a call: x, timesteps, context, y."""
    g = torch.Generator().manual_seed(seed)
    unet = model(layout).model.diffusion_model
    width, pooled = (64, 64) if layout == "embedded" else (16, 24 if layout == "SDXL" else None)
    y = None if pooled is None else torch.randn(rows, pooled, generator=g)
    x = torch.randn(rows, unet.in_channels, SIZE, SIZE, generator=g)
    context = torch.randn(rows, 5, width, generator=g)
    return x, torch.linspace(900, 30, rows), context, y


@contextlib.contextmanager
def by_hand(unet, kept, mask):
    """Layers see what they saw in the call before wherever nothing has changed.

    Args:
        kept: filled in a first call, where `mask` is None.
        mask: bool [R, 1, H, W] of positions.
    """
    from comfy.ldm.modules.attention import CrossAttention

    hooks = []

    def at(h, w):
        return F.adaptive_max_pool2d(mask.float(), (h, w)) > 0

    def window(part, args):
        x = args[0]
        if mask is not None:
            x = torch.where(at(*x.shape[-2:]), x, kept[part])
        kept[part] = x.clone()
        return (x, *args[1:])

    def norm(part, args, out):
        x, groups = args[0], part.num_groups
        if mask is None:
            flat = x.unflatten(1, (groups, -1)).flatten(2)
            kept[part] = flat.mean(2), flat.var(2, correction=0)
            return None
        mean, variance = (t.repeat_interleave(x.shape[1] // groups, 1) for t in kept[part])
        unit = (x - mean[..., None, None]) / (variance + part.eps).sqrt()[..., None, None]
        return unit * part.weight[:, None, None] + part.bias[:, None, None]

    def tokens(part, args, out):
        if mask is not None:
            flat = at(*unet_size(mask, out.shape[1])).flatten(2).transpose(1, 2)
            out = torch.where(flat, out, kept[part])
        kept[part] = out.clone()
        return out

    for name, part in unet.named_modules():
        if isinstance(part, torch.nn.GroupNorm):
            hooks.append(part.register_forward_hook(norm))
        elif isinstance(part, torch.nn.AvgPool2d) or getattr(part, "kernel_size", 0) == (3, 3):
            hooks.append(part.register_forward_pre_hook(window))
        elif isinstance(part, CrossAttention) and name.endswith("attn1"):
            hooks += [p.register_forward_hook(tokens) for p in (part.to_k, part.to_v)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def unet_size(mask, tokens):
    side = round(tokens**0.5)
    assert side * side == tokens
    return side, side


def moved(x, share, seed):
    """Another picture in some of the tiles."""
    from livediffusion.engine.patchwork.mask import spread

    g = torch.Generator().manual_seed(seed)
    tiles = torch.rand(x.shape[0], SIZE // 4, SIZE // 4, generator=g) < share
    return torch.where(spread(tiles), torch.randn(x.shape, generator=g), x)


def patching(threshold=0.0, grow=1, most=1.0):
    from livediffusion.engine.patchwork.mask import Patchwork
    from livediffusion.engine.patchwork.patching import Patching

    out = Patching(torch.device("cpu"))
    out.settle(Patchwork(threshold, grow, most, float("inf")), "key")
    return out


def equal(ours, wanted):
    torch.testing.assert_close(ours, wanted, rtol=0, atol=NEAR * float(wanted.abs().max()))


@pytest.mark.parametrize("layout", [*LAYOUTS, "deep", "embedded"])
def test_equals_what_is_kept_put_in_by_hand(layout):
    """Tick after tick, so that what tiles renew is looked at, too; in float64, as rounding adds up
    from tick to tick."""
    from livediffusion.engine.patchwork.mask import changed, spread
    from livediffusion.host.models import patchwork

    unet = copy.deepcopy(model(layout).model.diffusion_model).double()
    assert patchwork.why_not(unet) == patchwork.why_not_now(unet) == ""
    x, timesteps, context, y = (None if t is None else t.double() for t in asked(layout))
    ours, kept, last = patching(), {}, None
    for tick, share in enumerate((1.0, 0.1, 0.4, 0.0, 0.9, 0.05)):
        now = moved(x, share, tick).double()
        mask = None if last is None else spread(changed(now, x, ours.settings))
        out = ours.call(patchwork.network(unet), range(ROWS), now, timesteps, context, y)
        assert out is not None and ours.why == ""
        with by_hand(unet, kept, mask):
            wanted = unet(now, timesteps, context=context, y=y)
        if mask is not None:
            wanted = torch.where(mask, wanted, last)
            now = torch.where(mask, now, x)
        assert out.dtype == torch.float64
        equal(out, wanted)
        x, last = now, out
    assert 0 < ours.share < 1


@pytest.mark.parametrize("layout", [*LAYOUTS, "deep", "embedded"])
def test_all_of_it_equals_the_network(layout):
    """As one whole pass, and tile by tile with the statistics of the same picture."""
    from livediffusion.engine.patchwork.kept import Kept
    from livediffusion.engine.patchwork.tiles import Tiles
    from livediffusion.host.models import patchwork

    unet = model(layout).model.diffusion_model
    x, timesteps, context, y = asked(layout)
    wanted = unet(x, timesteps, context=context, y=y)
    kept, at = Kept(), torch.tensor([2, 0, 1])
    kept.grow(ROWS)
    net = patchwork.network(unet)
    out = net.whole(kept, at, x, timesteps, context, y)
    equal(out, wanted)
    # what is written anew is seen: all that tiles may write is gone
    for name, value in kept._of.items():
        if ".other." not in name and not name.endswith((".scale", ".shift")) and value.ndim > 3:
            value[:, 1:-1, 1:-1] = float("nan")
        elif ".own." in name:
            value.fill_(float("nan"))
    tiles = Tiles(torch.ones(ROWS, SIZE // 4, SIZE // 4, dtype=torch.bool), at, 4)
    out = net.some(kept, tiles, x)
    out = out[tiles.inputs.argsort()].view(ROWS, SIZE, SIZE, -1).permute(0, 3, 1, 2)
    equal(out, wanted)


# -- in streams -----------------------------------------------------------------------------------


class Beside:
    """A stream, and the same with Live Patchwork."""

    def __init__(self, threshold=0.05, layout="SD1.5", base=None, frames=1):
        from livediffusion.engine.patchwork.mask import Patchwork
        from livediffusion.host.models.coherence import attach
        from livediffusion.host.sampling.stream import Stream

        self.base = base or model(layout)
        self.told = []
        ours = attach(self.base, patchwork=Patchwork(threshold), tell_patchwork=self.told.append)
        self.models = self.base, ours
        self.streams, self.frames = (Stream(frames), Stream(frames)), frames
        self.still = tiny.latents(frames, 5, SIZE)

    @property
    def patching(self):
        return self.streams[1].coherent.neighbours.patching

    def run(self, latents=None, mode="self-negative", prompt=1, seed=0, models=None, sigmas=None):
        import pairs

        latents = self.still if latents is None else latents
        asked = {} if sigmas is None else {"sigmas": sigmas}
        return [
            stream.run(pairs.guider(own, mode, prompt=prompt), latents,
                       pairs.settings(seed=seed, **asked))
            for stream, own in zip(self.streams, models or self.models, strict=True)
        ]  # fmt: skip


def near(a, b):
    assert tiny.rms(b, a) < 1e-4 if a.any() else not b.any()


@pytest.mark.parametrize("mode", ["off", "self-negative", "onetime-negative", "full"])
def test_a_scene_that_stands_still_costs_nothing(mode):
    both = Beside(frames=2)
    for _ in range(6):
        near(*both.run(mode=mode))
    both.patching.looked()
    for _ in range(3):
        near(*both.run(mode=mode))
    assert both.patching.share == 0 and both.patching.why == ""
    assert both.streams[1].stats()["patchwork_mb"] > 0


def test_prompts_of_unequal_lengths_cost_nothing_either():
    """Each side has a call of its own."""
    import pairs

    both = Beside(frames=2)

    def run():
        guiders = [pairs.guider(own, "full") for own in both.models]
        for guider in guiders:
            guider.set_conds(tiny.conditioning(1), tiny.conditioning(2, tokens=13))
        return [
            stream.run(guider, both.still, pairs.settings())
            for stream, guider in zip(both.streams, guiders, strict=True)
        ]

    for _ in range(6):
        near(*run())
    both.patching.looked()
    for _ in range(3):
        near(*run())
    assert both.patching.share == 0 and both.patching.why == ""


def test_what_moves_everywhere_is_computed_everywhere():
    both = Beside(threshold=0.0)
    for tick in range(8):
        near(*both.run(tiny.latents(1, tick, SIZE)))
    assert both.patching.share == 1


def test_a_part_that_moves_is_followed():
    """Closer than what was kept, by far, at a part of the tiles."""
    # levels at which the picture counts for more than the noise
    both, sigmas = Beside(threshold=0.0), (0.6, 0.3, 0.0)
    for _ in range(4):
        both.run(sigmas=sigmas)
    before = both.run(sigmas=sigmas)[1]
    both.patching.looked()
    latents = both.still.clone()
    for tick in range(8):
        latents[:, :, 4:8, 4:8] = tiny.latents(1, tick // 5, 4)
        a, b = both.run(latents, sigmas=sigmas)
    assert 0 < both.patching.share < 0.6
    assert (b - a).square().mean() < 0.1 * (before - a).square().mean()


@pytest.mark.parametrize("what", ["prompt", "seed", "guidance", "size", "steps", "cut"])
def test_changes(what):
    """The scene stands still before and behind: what is kept of another prompt would be seen."""
    both = Beside(threshold=0.0)
    asked = {
        "prompt": {"prompt": 3}, "seed": {"seed": 4}, "guidance": {"mode": "full"},
        "size": {"latents": tiny.latents(1, 6, 24)}, "steps": {"sigmas": (9.0, 2.0, 0.0)},
        "cut": {"latents": tiny.latents(1, 7, SIZE)},
    }[what]  # fmt: skip
    for more in ({}, asked, {}):
        for _ in range(4):
            near(*both.run(**more))
        assert both.patching.why == ""


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_bad_frames_leave_nothing_behind(value):
    both = Beside()
    for tick in range(14):
        bad = torch.full_like(both.still, value) if tick in (5, 6) else None
        a, b = both.run(bad)
        if not 5 <= tick < 11:
            near(a, b)
    assert both.patching.share < 1


def test_weights_that_change_are_seen():
    import coherent

    both = Beside(threshold=0.0, base=coherent.model())
    for _ in range(4):
        both.run()
    weight = "diffusion_model.middle_block.0.in_layers.2.weight"
    shape = both.base.model.diffusion_model.middle_block[0].in_layers[2].weight.shape
    patch = {weight: ("diff", (0.3 * torch.randn(shape),))}
    changed = [m.clone() for m in both.models]
    for one in changed:
        one.add_patches(patch, 1.0)
    for models in (changed, both.models):
        for _ in range(4):
            # one MODEL is loaded at a time: each as it is asked for
            near(*both.run(models=models))


def test_weights_are_looked_at_once_as_long_as_they_are_the_same(monkeypatch):
    """Walking a network of Stable Diffusion's takes milliseconds."""
    import coherent
    from livediffusion.host.models import patchwork

    looked, look = [], patchwork._why_not_weights
    monkeypatch.setattr(patchwork, "_why_not_weights", lambda u: looked.append(u) or look(u))
    both = Beside(base=coherent.model())
    for _ in range(6):
        both.run()
    assert len(looked) == 1 and both.patching.why == ""
    conv = both.base.model.diffusion_model.input_blocks[0][0]
    conv.weight = torch.nn.Parameter(conv.weight.detach().half().float(), requires_grad=False)
    conv.comfy_cast_weights = True
    for _ in range(3):
        both.run()
    assert len(looked) == 2 and "call by call" in both.patching.why


def freeu(patcher):
    from comfy_extras.nodes_freelunch import FreeU

    return FreeU.execute(patcher, 1.2, 1.3, 0.9, 0.4).args[0]


def wrapped(patcher):
    from comfy.patcher_extension import WrappersMP

    clone = patcher.clone()
    clone.add_wrapper_with_key(
        WrappersMP.DIFFUSION_MODEL, "someone", lambda own, *args, **more: own(*args, **more)
    )
    return clone


def future(patcher):
    from livediffusion.engine.coherence.neighbours import Future
    from livediffusion.host.models.coherence import attach

    return attach(patcher, future=Future())


def reuse(patcher):
    from livediffusion.engine.blocks.schedule import Reuse
    from livediffusion.host.models.coherence import attach

    return attach(patcher, reuse=Reuse(2, "outermost block", 0.0))


@pytest.mark.parametrize(
    ("made", "why"),
    [(freeu, "patches"), (wrapped, "wrapped"), (future, "help each other"), (reuse, "a plan")],
)  # fmt: skip
def test_where_other_nodes_act_it_does_not_and_says_so(made, why):
    both = Beside()
    plain, ours = both.models
    models = made(plain), made(ours)
    for _ in range(4):
        near(*both.run(models=models))
    assert why in both.patching.why and both.patching.share == 1
    assert why in both.streams[1].stats()["patchwork"]


def a_hook(unet, put):
    handle = unet.input_blocks[1][0].register_forward_hook(lambda part, given, out: out * 1.2)
    put.callback(handle.remove)


def a_forward(unet, put):
    part = unet.output_blocks[0][0]
    old = part.forward
    put.enter_context(mock.patch.object(part, "forward", lambda *args: old(*args) * 1.2))


def a_class(unet, put):
    from comfy.ldm.modules.attention import CrossAttention

    old = CrossAttention.forward
    changed = mock.patch.object(CrossAttention, "forward", lambda *a, **k: old(*a, **k) * 1.3)
    put.enter_context(changed)


def around_edges(unet, put):
    conv = unet.input_blocks[0][0]
    put.enter_context(mock.patch.object(conv, "padding_mode", "circular"))
    put.enter_context(mock.patch.object(conv, "_reversed_padding_repeated_twice", (1,) * 4))


def a_convolution(unet, put):
    conv = unet.input_blocks[0][0]
    put.enter_context(mock.patch.object(conv, "_conv_forward", lambda x, w, b: conv_of(x, w)))


def conv_of(x, weight):
    return torch.nn.functional.conv2d(x, weight, None, 1, 1)


@pytest.mark.parametrize("change", [a_hook, a_forward, a_class, around_edges, a_convolution])
def test_what_packs_have_made_of_its_parts_is_run(change):
    both = Beside()
    with contextlib.ExitStack() as put:
        change(both.base.model.diffusion_model, put)
        for _ in range(3):
            near(*both.run())
        assert "its" in both.patching.why and both.patching.share == 1
    near(*both.run())
    assert not both.patching.why


def test_statistics_of_a_scene_that_is_gone_do_not_stay():
    """Never more than a part changes at a time, until nothing is left of what there was."""
    both = Beside(0.002)
    other = 2 * tiny.latents(1, 77, SIZE)
    for part in range(SIZE // 4 + 1):
        seen = torch.cat([other[..., : 4 * part], both.still[..., 4 * part :]], -1)
        both.run(seen)
    errors = [tiny.rms(*reversed(both.run(other))) for _ in range(24)]
    assert max(errors[-4:]) < 1e-4, errors


def test_networks_that_are_not_known_are_refused():
    from livediffusion.engine.patchwork.mask import Patchwork
    from livediffusion.host.models.coherence import attach

    base = model().clone()
    base.add_object_patch("diffusion_model", torch.nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match="is no UNet"):
        attach(base, patchwork=Patchwork())


def test_two_streams_share_nothing_and_the_node_is_told(monkeypatch):
    from livediffusion.host.sampling import patched

    monkeypatch.setattr(patched, "_TOLD", 5)
    both, other = Beside(), Beside()
    for _ in range(6):
        near(*both.run())
        near(*other.run(tiny.latents(1, 9, SIZE)))
    assert both.told and "of the picture is computed" in both.told[0]
    assert other.patching is not both.patching
