"""FLOPs of a UNet and its parts, counted without running it, against what a call makes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.comfy


def counted(call):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def split(rows, run):
    from livediffusion.engine.blocks.plan import Split

    rest = [r for r in range(rows) if r not in run]
    order = [[*run, *rest].index(r) for r in range(rows)]
    return Split(*[torch.tensor(v, dtype=torch.int64) for v in (run, rest, order)])


class Kept:
    def __init__(self, depth, rows, whole, shape):
        self.depth, self.whole = depth, torch.tensor(whole, dtype=torch.int64)
        self.rows, self.shape = rows, shape

    def take(self, new):
        return torch.zeros(self.rows, *self.shape)


@pytest.mark.parametrize("layout", ["SD1.5", "SD2.1", "SDXL"])
def test_the_flops_of_any_plan_are_those_of_its_call(layout, comfyui):
    import tiny
    from livediffusion.engine.blocks.plan import BlockPlan
    from livediffusion.host.models.flops import cost_of
    from livediffusion.host.models.walk import bodies, is_inner, walk

    unet = tiny.model(layout=layout).model.diffusion_model
    chance = torch.Generator().manual_seed(1)

    def call(plan, rows, size, tokens):
        given = [torch.randn(rows, *s, generator=chance) for s in ((4, *size), (tokens, 16), (24,))]
        y = given[2] if unet.num_classes else None
        return counted(lambda: walk(unet, plan, given[0], torch.ones(rows), given[1], y))

    for rows, size, tokens in ((1, (8, 8), 8), (5, (8, 16), 77)):
        cost = cost_of(unet, (4, *size), tokens)
        assert call(BlockPlan(), rows, size, tokens) == cost.whole * rows
        assert cost is cost_of(unet, (4, *size), tokens)
        whole = sorted(torch.randperm(rows, generator=chance)[: rows // 2].tolist())
        for kept in (None, Kept(1, rows, whole, (64, *size))):
            splits = {}
            for name in bodies(unet):
                here = len(whole) if kept and is_inner(name, 1, unet) else rows
                count = int(torch.randint(0, here + 1, (), generator=chance))
                if here:
                    run = sorted(torch.randperm(here, generator=chance)[:count].tolist())
                    splits[name] = split(here, run)
            plan = BlockPlan(kept, splits)
            told = cost.of(plan, rows, lambda name: is_inner(name, 1, unet))
            assert call(plan, rows, size, tokens) == told
            assert 0 < told < cost.whole * rows


def on_real_weights(part, put):
    """As a layer of quantised weights, whose code wants them."""
    layer, run = part.emb_layers[1], torch.nn.functional.linear
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    put(layer, "forward", lambda x: run(x, weight, bias))


def a_closure(part, put):
    old = part.forward
    put(part, "forward", lambda *args: old(*args))


def an_odd_error(part, put):
    old = part.forward

    def forward(x, emb):
        if x.is_meta:
            raise KeyError(None)
        return old(x, emb)

    put(part, "forward", forward)


@pytest.mark.parametrize("change", [on_real_weights, a_closure, an_odd_error])
def test_what_cannot_be_counted_runs_all_the_same(change, comfyui, monkeypatch):
    """Live Reuse counts for a word on its node only, and tries it once."""
    import pairs
    import tiny
    from helping import helping
    from livediffusion.host.models import flops, skips
    from livediffusion.host.models.coherence import attach
    from livediffusion.host.sampling.stream import Stream

    said, tried, counting = [], [], flops._counted
    monkeypatch.setattr(flops, "_counted", lambda *args: tried.append(args) or counting(*args))
    base = tiny.model()
    change(base.model.diffusion_model.output_blocks[0][0], monkeypatch.setattr)
    model = helping(base, reuse={"interval": 2})
    model = attach(model, tell_reuse=said.append)
    stream, guider = Stream(1), pairs.guider(model, "off")
    with torch.inference_mode():
        for i in range(12):
            out = stream.run(guider, tiny.latents(1, i), pairs.settings())
    assert out.isfinite().all() and len(tried) == 1
    assert set(said) == {"all of the network for 50% of the rows runs"}
    assert stream.stats()["reuse"] == "all of the network for 50% of the rows"
    with pytest.raises(ValueError, match=r"skip_up_to: .* cannot be counted .* Set it to 0"):
        skips.cost(base, (8, 8), 8)
