"""Which places run whole, and whose features are kept: numbers alone."""

import itertools

import pytest
import torch
from livediffusion.engine.blocks import reuse
from livediffusion.engine.blocks.reuse import Reusing
from livediffusion.engine.blocks.schedule import Guest, Reuse, Schedule, Spot, due
from livediffusion.engine.similarity import correlation, sketch
from waiting import Device


@pytest.mark.parametrize("interval", range(1, 17))
def test_every_place_comes_round_and_every_tick_costs_the_same(interval):
    for n, f in itertools.product(range(1, 9), range(1, 5)):
        places = list(itertools.product(range(n), range(f)))
        ticks = [{p for p in places if due(beat, *p, n, interval)} for beat in range(2 * interval)]
        for start in range(interval):
            came = [place for tick in ticks[start : start + interval] for place in tick]
            assert sorted(came) == places
        counts = {len(tick) for tick in ticks}
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    "interval, levels", [(2, [4, 0]), (3, [2, 1, 1]), (4, [2, 0, 2, 0]), (5, [1, 1, 1, 0, 1])]
)
def test_at_how_many_of_its_levels_a_frame_is_whole(interval, levels):
    """Of frames that go through four steps, one after another: see docs/reuse.md, interval."""
    came = [sum(due(frame + k, k, 0, 4, interval) for k in range(4)) for frame in range(interval)]
    assert sorted(came) == sorted(levels)


def test_sides_of_a_frame_run_together():
    schedule, reuse = Schedule(), Reuse(100, awake=0.0)
    guests = {(k, 0): Guest(k, "key") for k in range(3)}
    schedule.meet(reuse, guests, 1, 3)
    sides = [Spot(0, side, k, 0) for side in (1, 0) for k in range(3)]
    schedule.keep([spot for spot in sides if (spot.side, spot.slot) != (1, 2)])
    assert schedule.whole(sides) == [False, False, True] * 2
    assert schedule.whole([*sides[3:], None]) == [False, False, False, True]


def test_another_key_is_another_feature():
    schedule, spot = Schedule(), Spot(0, 0, 0, 0)
    for key, whole in (("a", True), ("a", False), ("b", True), ("b", False), ("a", True)):
        schedule.meet(Reuse(100, awake=0.0), {(0, 0): Guest(0, key)}, 1, 1)
        assert schedule.whole([spot]) == [whole], key
        schedule.keep([spot])


def spots(count):
    return [Spot(0, 0, k, 0) for k in range(count)]


def tick(reusing, beat, features, key="key", taken=True):
    """One tick of a row for each feature; gives what all rows go on with and those that ran."""
    guests = {(k, 0): Guest(beat, key) for k in range(len(features))}
    reusing.begin()
    reusing.meet(guests, beat)
    kept = reusing.planned(spots(len(features)), True).kept
    if not taken:
        return None, kept.rows
    out = kept.take(features[kept.rows] if kept.rows else None)
    reusing.finish()
    return out, kept.rows


def numbered(beat, count):
    """Features that tell their tick and their place."""
    out = torch.tensor([[100.0 * beat + k] for k in range(count)])
    return out.view(count, 1, 1, 1).expand(count, 2, 3, 3).clone()


def test_rows_go_on_with_the_last_feature_of_their_place():
    reusing, last = Reusing(torch.device("cpu")), {}
    reusing.settle(Reuse(3, awake=0.0), 0, 4, "key")
    for beat in range(9):
        features = numbered(beat, 4)
        out, rows = tick(reusing, beat, features)
        last |= {k: features[k] for k in rows}
        assert torch.equal(out, torch.stack([last[k] for k in range(4)]))
        out.zero_()  # memory that may be written to
    later = sum(due(beat, k, 0, 4, 3) for beat in range(1, 9) for k in range(4))
    assert reusing.looked() == (36, 4 + later)


def test_addresses_stay():
    reusing, seen = Reusing(torch.device("cpu")), {}
    reusing.settle(Reuse(2, awake=0.0), 0, 4, "key")
    for beat in range(12):
        guests = {(k, 0): Guest(beat, "key") for k in range(4)}
        reusing.begin()
        reusing.meet(guests, beat)
        kept = reusing.planned(spots(4), True).kept
        assert (reusing.key() is None) == (beat == 0), "there is no room yet"
        seen.setdefault(len(kept.rows), set()).add(reusing.key())
        kept.take(numbered(beat, 4)[kept.rows])
        reusing.finish()
    assert [len(keys) for keys in seen.values()] == [1, 1]


def test_what_is_not_finite_is_not_kept():
    reusing = Reusing(torch.device("cpu"))
    reusing.settle(Reuse(2, awake=0.0), 0, 2, "key")
    bad = numbered(0, 2)
    bad[1, 0, 0, 0] = float("nan")
    assert tick(reusing, 0, bad)[1] == [0, 1]
    assert reusing.banks[0].features.isfinite().all()
    out, rows = tick(reusing, 2, numbered(2, 2))
    assert rows == [0, 1], "one is due, and of the other nothing was kept"
    bad = numbered(4, 2)
    bad[0] = float("inf")
    out, rows = tick(reusing, 4, bad)
    assert rows == [0] and out[0].isinf().all(), "its own row is as it is"
    out, rows = tick(reusing, 5, numbered(5, 2))
    assert rows == [1] and torch.equal(out[0], numbered(2, 2)[0]), "the one before"


@pytest.mark.parametrize(("bad", "left"), [((2,), 3), ((2, 3), 1), ((3,), 2)])
def test_what_the_host_learns_late_puts_back_nothing_newer(monkeypatch, bad, left):
    """On a GPU it learns of a tick when another one has been launched behind it."""
    device, reusing = Device(monkeypatch, reuse), Reusing(torch.device("cpu"))
    reusing.settle(Reuse(100, awake=0.5), 0, 2, "key")  # nobody looks: all run whole
    for beat in range(1, 4):
        features = numbered(beat, 2)
        features[1] = torch.where(torch.tensor(beat in bad), float("nan"), features[1])
        with device.ticking(waits=beat == 1):
            assert tick(reusing, beat, features)[1] == [0, 1]
    for _ in range(2):
        device.tick += 1
        reusing.meet({}, 4)
    assert [reusing._schedule.kept[spot].frame for spot in spots(2)] == [3, left]
    assert (reusing.banks[0].features[1:, 0, 0, 0] // 100).tolist() == [3, left]


def test_a_tick_that_broke_off_is_forgotten_with_what_it_wrote():
    reusing = Reusing(torch.device("cpu"))
    reusing.settle(Reuse(4, awake=0.0), 0, 2, "key")
    tick(reusing, 0, numbered(0, 2))
    reusing.begin()
    reusing.meet({(k, 0): Guest(4, "key") for k in range(2)}, 4)
    kept = reusing.planned(spots(2), True).kept
    kept.take(numbered(4, 2)[kept.rows])
    assert kept.rows == [0]
    assert tick(reusing, 5, numbered(5, 2))[1] == [0], "which would not have been due"
    assert tick(reusing, 6, numbered(6, 2), taken=False)[1] == []
    assert tick(reusing, 6, numbered(6, 2))[1] == [], "a call that was not made wrote nothing"


def test_features_of_another_size_are_no_features():
    reusing = Reusing(torch.device("cpu"))
    reusing.settle(Reuse(8, awake=0.0), 0, 2, "key")
    tick(reusing, 1, numbered(1, 2))
    reusing.begin()
    reusing.meet({(k, 0): Guest(7, "key") for k in range(2)}, 7)
    kept = reusing.planned(spots(2), True).kept
    with pytest.raises(RuntimeError, match="interval to 1"):
        kept.take(torch.zeros(len(kept.rows), 2, 5, 5))
    reusing.settle(Reuse(8, awake=0.0), 0, 2, "other")
    assert tick(reusing, 9, torch.zeros(2, 2, 5, 5))[1] == [0, 1]


def sized(beat, slot, size):
    """Features of one row that tell their tick and their place."""
    return numbered(beat, slot + 1)[slot:, :, :1, :1].expand(1, 2, size, size).clone()


def sized_tick(reusing, beat, sizes, interval):
    """One tick of a call for each slot; gives what each goes on with, and those that ran."""
    reusing.settle(Reuse(interval, awake=0.0), 0, len(sizes), "key")
    reusing.begin()
    reusing.meet({(k, 0): Guest(beat, "key") for k in range(len(sizes))}, beat)
    outs, ran = [], []
    for k, size in enumerate(sizes):
        kept = reusing.planned([Spot(0, 0, k, 0)], False).kept
        ran += [k] * len(kept.rows)
        value = size if torch.is_tensor(size) else sized(beat, k, size)
        outs.append(kept.take(value if kept.rows else None))
    reusing.finish()
    return outs, ran


def test_calls_of_other_shapes_leave_each_other_what_they_have():
    """As each alone, at addresses that stay, whichever shapes the calls of a tick have."""
    reusing, last, sizes, at = Reusing(torch.device("cpu")), {}, (3, 5, 3, 7), set()
    for beat in range(16):
        outs, ran = sized_tick(reusing, beat, sizes, 4)
        assert ran == (list(range(4)) if beat == 0 else [(-beat) % 4])
        last |= {k: sized(beat, k, sizes[k]) for k in ran}
        assert all(torch.equal(out, last[k]) for k, out in enumerate(outs))
        at.add(tuple(bank.features.data_ptr() for bank in reusing.banks))
    assert len(reusing.banks) == 3 and len(at) <= 2
    assert reusing.size == sum(bank.features.nbytes for bank in reusing.banks)


def test_a_place_that_moves_to_another_shape_has_only_what_is_there():
    reusing = Reusing(torch.device("cpu"))
    assert sized_tick(reusing, 0, (3, 5), 4)[1] == [0, 1]
    # slot 0 is due, and comes out as another, which is not finite
    assert sized_tick(reusing, 4, (torch.full((1, 2, 5, 5), float("nan")), 5), 4)[1] == [0]
    assert len(reusing.banks) == 1, "nobody is at home in the other one"
    outs, ran = sized_tick(reusing, 5, (5, 5), 4)
    assert ran == [0], "what it had before is gone, and nothing came"
    assert torch.equal(outs[1], sized(0, 1, 5)) and torch.equal(outs[0], sized(5, 0, 5))
    for size in (6, 7, 6, 9):  # and on
        for beat in (8, 9):
            outs, ran = sized_tick(reusing, beat, (size, 5), 4)
            assert ran == [0] * (beat == 8) and torch.equal(outs[0], sized(8, 0, size))
        assert len(reusing.banks) == 2
    reusing.settle(Reuse(4, awake=0.0), 0, 2, "other")
    assert not reusing.banks and not reusing.size


def test_a_call_of_places_of_several_shapes_runs_whole():
    reusing = Reusing(torch.device("cpu"))
    sized_tick(reusing, 1, (3, 5), 100)
    for beat, whole in ((2, [0, 1]), (3, [])):
        reusing.begin()
        reusing.meet({(k, 0): Guest(beat, "key") for k in range(2)}, beat)
        kept = reusing.planned(spots(2), True).kept
        assert kept.rows == whole and (reusing.key() is None) == bool(whole)
        out = kept.take(numbered(beat, 2) if whole else None)
        assert torch.equal(out, numbered(2, 2))
        reusing.finish()


def test_calls_to_try_leave_every_bank_and_home_as_it_was():
    reusing = Reusing(torch.device("cpu"))
    sized_tick(reusing, 0, (3, 5), 4)
    before = [(bank, bank.features.clone()) for bank in reusing.banks]
    with reusing.untouched():
        sized_tick(reusing, 4, (5, 5), 4)
        sized_tick(reusing, 7, (5, 9), 4)
    assert reusing.banks == [bank for bank, _ in before]
    assert all(torch.equal(bank.features, was) for bank, was in before)
    outs, _ = sized_tick(reusing, 9, (3, 5), 4)
    assert [out.shape[-1] for out in outs] == [3, 5]


def scene(seed, shift=0):
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(1, 3, 10, 10, generator=g)
    return torch.nn.functional.interpolate(low, (96, 96), mode="bicubic")[0].movedim(0, -1).roll(
        shift, 1
    )


def test_correlation_falls_slowly_with_motion_and_at_once_with_a_cut():
    now = sketch(scene(0))
    alike = [correlation(now, sketch(scene(0, shift))) for shift in (0, 1, 2, 4)]
    assert alike[0] == pytest.approx(1) and sorted(alike, reverse=True) == alike
    assert alike[-1] > 0.4
    assert max(correlation(now, sketch(scene(seed))) for seed in range(1, 6)) < 0.4
    assert correlation(now, sketch(scene(0) + 0.2)) == -1, "a light is on"
    assert correlation(now, sketch(scene(0)[:48])) == -1
