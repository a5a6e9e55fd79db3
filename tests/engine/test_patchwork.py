"""Changed tiles: which they are, where their tokens lie, what is kept of a stream."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from livediffusion.engine.patchwork import kept as keeping
from livediffusion.engine.patchwork.kept import Full, Kept
from livediffusion.engine.patchwork.mask import SIDE, Patchwork, changed, spread
from livediffusion.engine.patchwork.patching import PLACES, Patching
from livediffusion.engine.patchwork.tiles import Tiles

ROWS = 3


def frames(seed=0, rows=ROWS, size=16):
    return torch.randn(rows, 4, size, size, generator=torch.Generator().manual_seed(seed))


def test_only_what_has_changed():
    x = frames()
    other = x.clone()
    other[1, :, 5, 10] += 3
    mask = changed(other, x, Patchwork(0.1, 0))
    wanted = torch.zeros(ROWS, 4, 4, dtype=torch.bool)
    # the blur reaches a position to each side
    wanted[1, 1, 2] = True
    assert torch.equal(mask, wanted | _also(1, (4, 6), (9, 11)))
    assert not changed(x, x, Patchwork(0.0, 3)).any()


def _also(row, ys, xs):
    out = torch.zeros(ROWS, 16, 16, dtype=torch.bool)
    out[row, ys[0] : ys[1] + 1, xs[0] : xs[1] + 1] = True
    return torch.nn.functional.max_pool2d(out.float(), SIDE) > 0


def test_more_threshold_is_fewer_and_more_growth_is_more():
    x, other = frames(), frames(1)
    other[:, :, 4:] = x[:, :, 4:]
    shares = [changed(other, x, Patchwork(t, 1)).float().mean() for t in (0.0, 0.3, 0.6, 1.5, 9.0)]
    assert shares == sorted(shares, reverse=True) and shares[-1] == 0 < shares[0]
    shares = [changed(other, x, Patchwork(0.3, g)).float().mean() for g in (0, 1, 4, 12)]
    assert shares == sorted(shares) and shares[0] < shares[-1] == 1


def test_noise_of_a_camera_is_not_seen():
    """Its blur is a third of it; the same amount in a block is seen."""
    x = frames(size=64)
    noisy = x + 0.05 * frames(1, size=64)
    assert changed(noisy, x, Patchwork(0.1)).float().mean() == 0
    moved = x.clone()
    moved[:, :, 20:30, 20:30] += 0.15
    assert 0 < changed(moved, x, Patchwork(0.1)).float().mean() < 0.1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 0.9))
def test_tokens_lie_where_they_are_said_to(seed, share):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(ROWS, 2, 4, generator=g) < share
    at, places = torch.tensor([4, 0, 2]), 5
    tiles, side = Tiles(mask, at, SIDE), SIDE
    for _ in range(4):
        h, w = tiles.height, tiles.width
        assert tiles.side == max(side, 1) and (h, w) == (2 * side, 4 * side)
        flags = torch.zeros(ROWS, h * w)
        flags.view(-1)[tiles.inputs] = 1
        whole = mask.float().repeat_interleave(side, 1).repeat_interleave(side, 2)
        assert torch.equal(flags.view(ROWS, h, w), whole)
        assert tiles.counts == whole.flatten(1).sum(1).int().tolist()
        kept = torch.randn(places, h + 2, w + 2, generator=g)
        inner = kept[:, 1:-1, 1:-1].contiguous()
        assert torch.equal(kept.flatten()[tiles.padded], inner.flatten()[tiles.tokens])
        windows = kept.flatten()[tiles.halo].view(-1, side + 2, side + 2)
        assert torch.equal(windows[:, 1:-1, 1:-1].flatten(), inner.flatten()[tiles.tokens])
        if side > 1:
            coarse = tiles.coarse
            windows = kept.flatten()[tiles.halving].view(-1, side + 1, side + 1)
            assert torch.equal(windows[:, 1:, 1:].flatten(), inner.flatten()[tiles.tokens])
            below = torch.randn(ROWS, h // 2, w // 2, generator=g)
            doubled = below.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten()
            compact = below.flatten()[coarse.inputs]
            assert torch.equal(compact[tiles.parents], doubled[tiles.inputs])
        if side == 1:
            break
        tiles, side = tiles.coarse, side // 2
    coarse = tiles.coarse
    assert coarse.side == 1 and (coarse.height, coarse.width) == (1, 2)
    wanted = torch.nn.functional.max_pool2d(mask.float(), 2) > 0
    assert coarse.counts == wanted.flatten(1).sum(1).tolist()


class Counting:
    """A network whose output is its input times ten, and which counts."""

    step = 2

    def __init__(self):
        self.rows, self.tokens, self.fails = [], [], None

    def whole(self, kept, at, x, timesteps, context, y):
        kept.room("state", (3,), x).index_fill_(0, at, 1.0)
        if self.fails is not None:
            raise self.fails
        self.rows.append(at.tolist())
        return 10 * x

    def some(self, kept, tiles, x):
        if self.fails is not None:
            raise self.fails
        self.tokens.append(tiles.counts)
        return 10 * x.permute(0, 2, 3, 1).flatten(0, 2)[tiles.inputs]


@pytest.fixture
def net():
    return Counting()


class Stream:
    """Calls of one stream."""

    def __init__(self, net, threshold=0.1):
        self.net, self.patching = net, Patching(torch.device("cpu"))
        self.patching.settle(Patchwork(threshold, 1), "a model")
        self.spots = list(range(ROWS))

    def __call__(self, x, context=None, level=5.0, y=None):
        self.net.rows, self.net.tokens = [], []
        rows = x.shape[0]
        context = torch.ones(1, 2, 3) if context is None else context
        return self.patching.call(self.net, self.spots[:rows], x, torch.full((rows,), level),
                                  context, y)  # fmt: skip


def test_a_row_goes_on_with_what_was_kept_of_its_own(net):
    run, x = Stream(net), frames()
    assert torch.equal(run(x), 10 * x) and net.rows == [[0, 1, 2]]
    again = run(x + 0.01)
    # nothing has moved far enough: not even one tile
    assert torch.equal(again, 10 * x) and not net.rows and not net.tokens
    moved = x.clone()
    moved[1, :, :4, :4] += 1
    moved[2] += 1
    out = run(moved)
    assert net.rows == [[2]] and net.tokens == [[16 * n for n in (4,)]]
    inside = spread(changed(moved, x, Patchwork(0.1, 1)))
    assert torch.equal(out, torch.where(inside, 10 * moved, 10 * x))
    run.spots.reverse()
    assert torch.equal(run(moved.flip(0)), out.flip(0)) and not net.rows and not net.tokens


def test_what_changes_slowly_is_seen_when_it_has_come_far_enough(net):
    run, x = Stream(net), frames()
    run(x)
    worst = 0.0
    for step in range(1, 40):
        now = x + 0.02 * step
        worst = max(worst, float((run(now) - 10 * now).abs().max()))
    assert worst < 10 * 0.13


@pytest.mark.parametrize("what", ["prompt", "tokens", "level", "pooled", "key", "forget"])
def test_another_prompt_or_model_has_all_of_it_computed(net, what):
    run, x, y = Stream(net), frames(), torch.ones(1, 4)
    run(x, y=y)
    asked = {"y": y}
    if what == "prompt":
        asked["context"] = torch.ones(1, 2, 3) * 1.01
    if what == "tokens":
        asked["context"] = torch.ones(1, 4, 3)
    if what == "level":
        asked["level"] = 4.0
    if what == "pooled":
        asked["y"] = y * 1.01
    if what == "key":
        run.patching.settle(Patchwork(0.1, 1), "another")
    if what == "forget":
        run.patching.forget()
    assert torch.equal(run(x, **asked), 10 * x) and net.rows == [[0, 1, 2]]
    run(x, **asked)
    assert not net.rows


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_leaves_nothing_behind(net, value):
    run, x = Stream(net), frames()
    run(x)
    bad = x.clone()
    bad[0, 0, 0, 0] = value
    assert run(bad) is None and "finite" in run.patching.why
    assert torch.equal(run(x), 10 * x) and not net.rows and not net.tokens
    bad = torch.full_like(x, 3e38)
    assert not run(bad).isfinite().all()
    assert torch.equal(run(x), 10 * x) and net.rows == [[0, 1, 2]]


def test_what_breaks_off_leaves_nothing_behind(net):
    run, x = Stream(net), frames()
    run(x)
    for moved in (x + 1, torch.cat([x[:, :, :4] + 1, x[:, :, 4:]], 2)):
        net.fails = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            run(moved)
        net.fails = None
        assert torch.equal(run(x), 10 * x) and net.rows == [[0, 1, 2]]


def bytes_kept(patching):
    return [t.nbytes for store in patching._stores.values() for t in store.kept._of.values()]


def test_what_is_kept_is_bounded(net, monkeypatch):
    run, x = Stream(net), frames()
    run(x)
    sizes = bytes_kept(run.patching)
    assert run.patching.size == sum(sizes) > 0
    for i in range(3 * PLACES):
        run.spots = [3 * i, 3 * i + 1, 3 * i + 2]
        run(x)
    assert run.patching.size <= PLACES * (sum(sizes) / ROWS)
    assert sum(bytes_kept(run.patching)) == run.patching.size
    monkeypatch.setattr(keeping, "MOST", 100)
    run = Stream(net)
    assert run(x) is None and "would have to be kept" in run.patching.why
    assert run.patching.size == 0 and run(x) is None
    run.patching.settle(Patchwork(), "a smaller model")
    monkeypatch.undo()
    assert torch.equal(run(x), 10 * x)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=4, max_size=4), st.integers(0, 2))
def test_calls_of_other_shapes_leave_each_other_what_they_have(tokens, pooled):
    """Prompts of a tick may have unequal lengths, and each is in a call of its own. One that is
    all zeros is no sign that something was kept."""
    net = Counting()
    run, x = Stream(net), frames()
    asked = [
        {"context": torch.zeros(1, 2 + t, 3), "y": torch.zeros(1, 4) if i < pooled else None}
        for i, t in enumerate(tokens)
    ]

    def tick(first):
        for call, what in enumerate(asked):
            run.spots = [(call, r) for r in range(ROWS)]
            assert torch.equal(run(x + call, **what), 10 * (x + call))
            assert bool(net.rows) == first and not net.tokens and run.patching.why == ""

    tick(first=True)
    size = run.patching.size
    assert size == sum(bytes_kept(run.patching)) > 0
    for _ in range(3):
        tick(first=False)
    assert run.patching.size == size
    # a prompt of another length: what was kept of the one before goes with its last row
    asked = [{**what, "context": torch.zeros(1, 9, 3)} for what in asked]
    tick(first=True)
    assert run.patching.size == sum(bytes_kept(run.patching)) <= 2 * size
    tick(first=False)


def test_what_a_prompt_has_left_behind_makes_room(monkeypatch):
    """A prompt of another length comes to slot after slot: what it needs is no more than before."""
    net = Counting()
    run, x, long = Stream(net), frames(), torch.ones(1, 2, 3)
    run(x)
    monkeypatch.setattr(keeping, "MOST", run.patching.size + 8)
    other = torch.ones(1, 1, 3)
    for last in range(ROWS):
        for spots, context in ((range(last + 1), other), (range(last + 1, ROWS), long)):
            run.spots = [*spots]
            if run.spots:
                now = x[run.spots]
                assert torch.equal(run(now, context), 10 * now) and run.patching.why == ""
    assert run.patching.size == sum(bytes_kept(run.patching)) <= keeping.MOST
    run.spots = range(ROWS)
    assert torch.equal(run(x, other), 10 * x) and not net.rows


def test_kept_grows_and_counts():
    kept, like = Kept(), torch.zeros(1)
    kept.grow(2)
    kept.room("a", (3,), like).fill_(1)
    kept.grow(3)
    assert kept["a"].tolist() == [[1] * 3, [1] * 3, [0] * 3] and kept.size == 36
    kept.room("a", (2,), like)
    assert kept.size == 24
    with pytest.raises(Full):
        kept.room("b", (keeping.MOST,), like)
    assert kept.size == 24


def test_odd_sizes_and_twins_are_computed_whole_and_it_is_said(net):
    run = Stream(net)
    assert run(torch.zeros(ROWS, 4, 6, 8)) is None and "multiples of 4" in run.patching.why
    run.spots = [1, 1, 2]
    assert run(frames()) is None and "same place" in run.patching.why
    assert run.patching.share == 1
