"""The UNet by a plan of blocks per row, against ComfyUI's own, a row at a time."""

import contextlib
import functools
import inspect
from unittest import mock

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.comfy

ROWS = 5
SIZE = (9, 7)  # odd, so that what is upsampled has to be told its size
LAYOUTS = ["SD1.5", "SD2.1", "SDXL"]
NEAR = 1e-5  # of the largest value


@functools.cache
def unet(layout="SD1.5"):
    found = tiny.model(layout=layout, prompt=1.0).model.diffusion_model
    assert len(found.input_blocks) == 4
    return found


@pytest.fixture(scope="module", autouse=True)
def _forget():
    yield
    unet.cache_clear()


def call(layout="SD1.5", rows=ROWS, seed=3, residuals=True):
    """Tensors of a call by argument."""
    g = torch.Generator().manual_seed(seed)

    def some(*shape):
        return torch.randn(rows, *shape, generator=g)

    told = {"x": some(4, *SIZE), "timesteps": torch.linspace(900, 30, rows), "context": some(6, 16)}
    if layout == "SDXL":
        told["y"] = some(24)
    if residuals:
        half = tuple(-(-side // 2) for side in SIZE)
        sizes = [(32, *SIZE), (32, *SIZE), (32, *half), (64, *half)]
        told["control"] = {
            "input": [some(*size) for size in reversed(sizes)],
            "middle": [some(64, *half)],
            "output": [some(*size) for size in sizes],
        }
    return told


def row(told, r):
    """The same call of one row."""
    control = told.get("control")
    one = {name: t[r : r + 1] for name, t in told.items() if name != "control"}
    if control is not None:
        one["control"] = {side: [t[r : r + 1] for t in ts] for side, ts in control.items()}
    return one


def own(told):
    """A copy whose lists may be consumed."""
    control = told.get("control")
    return told if control is None else {**told, "control": {s: [*c] for s, c in control.items()}}


def patches():
    """One of each kind, each row treated by itself, and alike in every call."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    def of_block(h, options):
        side, number = options["block"]
        return h * (1 + 0.01 * (number + 1)) + 0.01 * len(side)

    def both(h, skip, options):
        return of_block(h, options), skip * 0.9

    def after(told):
        assert told["h"].shape[0] == told["x"].shape[0] == told["emb"].shape[0]
        assert told["context"].shape[0] == told["timesteps"].shape[0] == told["x"].shape[0]
        return {"h": told["h"] * 1.1 + 0.01 * told["x"].mean((1, 2, 3), True)}

    def attn(q, context_attn2, value, extra):
        assert extra["original_shape"][0] == q.shape[0]
        return q * (1 + 0.1 * extra["transformer_index"]), context_attn2, value

    after_middle = {"middle_block_after_patch": [after]}
    if "middle_block_after_patch" not in inspect.getsource(UNetModel):  # ComfyUI 0.8.0
        after_middle = {}
    return {"patches": {
        **after_middle,
        "emb_patch": [lambda emb, channels, options: emb * 1.05],
        "input_block_patch": [of_block],
        "input_block_patch_after_skip": [of_block],
        "output_block_patch": [both],
        "attn2_patch": [attn],
    }}  # fmt: skip


def alone(net, told, options, feature=None, at=None, keeps=None):
    """ComfyUI's own output, with `feature` in the place of what comes into output block `at`."""
    options = {**options, "patches": dict(options.get("patches", {}))}
    seen = {} if keeps is None else keeps

    def patch(h, skip, extra):
        if extra["block"] == ("output", at):
            seen["h"] = h.clone()
            h = h if feature is None else feature.clone()
        return h, skip

    before = options["patches"].get("output_block_patch", [])
    options["patches"]["output_block_patch"] = [patch, *before]
    with torch.inference_mode():
        return net(**own(told), transformer_options=options)


def near(ours, wanted):
    torch.testing.assert_close(ours, wanted, rtol=0, atol=NEAR * float(wanted.abs().max()))


class Bank:
    """Features of all rows: given, or what a row that ran whole gave."""

    def __init__(self, depth, whole, features):
        self.depth, self.whole = depth, torch.tensor(whole, dtype=torch.int64)
        self.features = features

    def take(self, new):
        if new is not None:
            self.features[self.whole] = new
        else:
            assert len(self.whole) == 0
        return self.features.clone()


def walked(net, plan, told, options):
    from livediffusion.host.models.walk import walk

    with torch.inference_mode():
        return walk(net, plan, **own(told), options=options)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_plan_is_the_network_itself(layout, patched):
    from livediffusion.engine.blocks.plan import BlockPlan
    from livediffusion.host.models.walk import why_not

    net, told = unet(layout), call(layout)
    options = patches() if patched else {}
    assert why_not(net) == "" and not BlockPlan()
    with torch.inference_mode():
        expected = net(**own(told), transformer_options=dict(options))
    assert torch.equal(walked(net, BlockPlan(), told, dict(options)), expected)


@pytest.mark.parametrize("depth", range(4))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_go_on_with_what_was_kept(layout, depth):
    from livediffusion.engine.blocks.plan import BlockPlan

    net, told, other = unet(layout), call(layout), call(layout, seed=8)
    options, at = patches(), 3 - depth
    before = {}
    alone(net, other, options, at=at, keeps=before)
    for whole in ([], [1, 3], [0, 1, 2, 3, 4]):
        bank = Bank(depth, whole, before["h"].clone())
        out = walked(net, BlockPlan(bank), told, patches())
        for r in range(ROWS):
            mine = {}
            feature = None if r in whole else before["h"][r : r + 1]
            expected = alone(net, row(told, r), options, feature, at, mine)
            near(out[r : r + 1], expected)
            kept = mine["h"] if r in whole else feature
            near(bank.features[r : r + 1], kept)


@contextlib.contextmanager
def passed_by(net, names):
    """While this lasts, the network has not these bodies."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
    from livediffusion.host.models.walk import bodies

    with contextlib.ExitStack() as open_:
        for name in names:
            part = bodies(net)[name]
            past = (
                (lambda x, emb, part=part: part.skip_connection(part.x_upd(x)))
                if isinstance(part, ResBlock)
                else (lambda x, *rest: x)
            )
            open_.enter_context(mock.patch.object(part, "forward", past))
        yield


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_rows_pass_bodies_by(data):
    from livediffusion.engine.blocks.plan import BlockPlan, Split
    from livediffusion.host.models.walk import bodies, is_inner

    layout = data.draw(st.sampled_from(LAYOUTS))
    depth = data.draw(st.sampled_from([None, 0, 1, 2, 3]))
    net, told = unet(layout), call(layout)
    whole = data.draw(st.lists(st.sampled_from(range(ROWS)), unique=True).map(sorted))
    passing = {
        name: data.draw(st.sets(st.sampled_from(range(ROWS))))
        for name in data.draw(st.sets(st.sampled_from(list(bodies(net)))))
    }
    splits = {}
    for name, out in passing.items():
        here = whole if depth is not None and is_inner(name, depth, net) else range(ROWS)
        run = [i for i, r in enumerate(here) if r not in out]
        rest = [i for i, r in enumerate(here) if r in out]
        order = [(run + rest).index(i) for i in range(len(here))]
        splits[name] = Split(*(torch.tensor(t, dtype=torch.int64) for t in (run, rest, order)))
    bank = before = None
    if depth is not None:
        before = {}
        alone(net, call(layout, seed=8), patches(), at=3 - depth, keeps=before)
        bank = Bank(depth, whole, before["h"].clone())
    out = walked(net, BlockPlan(bank, splits), told, patches())
    for r in range(ROWS):
        feature = None if depth is None or r in whole else before["h"][r : r + 1]
        with passed_by(net, [name for name, rows in passing.items() if r in rows]):
            at = None if depth is None else 3 - depth
            expected = alone(net, row(told, r), patches(), feature, at)
        near(out[r : r + 1], expected)


def test_what_cannot_be_walked_says_why():
    import families
    from livediffusion.host.models.walk import why_not

    assert "no UNet" in why_not(families.model("Flux").model.diffusion_model)
    net = unet()
    with mock.patch.object(net, "_forward", lambda *args, **kwargs: None):
        assert "a pack has replaced" in why_not(net)
    with mock.patch.object(type(net), "_forward", lambda *args, **kwargs: None):
        assert "a pack has replaced" in why_not(net)
    assert why_not(net) == ""
