"""Extended attention, fusion, merging and the bank, each beside a few lines that say what it is."""

import pytest
import torch
import torch.nn.functional as F
from livediffusion.engine.coherence.attention import Read, attend, grouped
from livediffusion.engine.coherence.bank import Bank, Banks, Staged
from livediffusion.engine.coherence.fusion import fuse, unit
from livediffusion.engine.coherence.merge import dealt, merged

CPU = torch.device("cpu")


def plain(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ALIKE = {
    "all": [0, 0, 0, 0],
    "alone": [0, 1, 2, 3],
    "two by two": [0, 1, 0, 1],
    "unequal": [0, 0, 0, 1, 1, 2],
    "negative last": [0, 0, 0, 1],
}


@pytest.mark.parametrize("had", [None, (2, 2, 2, 2, 2, 2), (0, 1, 2, 0, 2, 1)])
@pytest.mark.parametrize("alike", ALIKE.values(), ids=list(ALIKE))
def test_every_row_sees_its_own_kind_and_what_it_remembers(alike, had):
    r = len(alike)
    q, k, v = (random(r, 5, 8, seed=i) for i in range(3))
    bank = random(r, 2 * 7, 8, seed=8), random(r, 2 * 7, 8, seed=9)
    read = None
    if had is not None:
        known = torch.tensor([[i < count for i in range(2)] for count in had[:r]])
        read = Read(*bank, known=None if known.all() else known)
    out = attend(plain, q, k, v, grouped(alike, CPU), read)
    for i in range(r):
        seen = [j for j in range(r) if alike[j] == alike[i]]
        count = 0 if had is None else 7 * had[i]
        keys = torch.cat([*k[seen], bank[0][i, :count]])
        values = torch.cat([*v[seen], bank[1][i, :count]])
        torch.testing.assert_close(out[i], plain(q[i], keys, values, None))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize("alike", ALIKE.values(), ids=list(ALIKE))
def test_a_row_that_is_not_finite_is_not_seen(alike, part, bad):
    r = len(alike)
    q, k, v = (random(r, 5, 8, seed=i) for i in range(3))
    {"k": k, "v": v}[part][0, 2, 3] = bad
    out = attend(plain, q, k, v, grouped(alike, CPU))
    for i in range(1, r):
        seen = [j for j in range(r) if alike[j] == alike[i]]
        seen = [next(j for j in seen if j) if j == 0 else j for j in seen]
        torch.testing.assert_close(out[i], plain(q[i], torch.cat([*k[seen]]),
                                                 torch.cat([*v[seen]]), None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_numbers_are_finite(dtype):
    """Sums over a row go beyond float16 long before its values do."""
    q, k, v = (torch.full((2, 64, 8), 100.0, dtype=dtype) for _ in range(3))
    k[1] = 50.0
    seen = []
    attend(lambda q, k, v, mask: seen.append(k) or q, q, k, v, grouped([0, 0], CPU))
    assert seen[0][0, :64].eq(100).all() and seen[0][0, 64:].eq(50).all()
    long = torch.full((1, 2, 64), torch.finfo(dtype).max / 2, dtype=dtype)
    assert all(part.isfinite().all() for part in unit(long))


def test_fusion_takes_on_what_is_alike_and_nothing_else():
    o, kept = random(2, 6, 8), random(2, 9, 8, seed=1)
    kept[0, 4] = o[0, 2] * 3 + 0.01
    read = Read(kept, kept, *unit(kept))
    out = fuse(o, read, torch.tensor(0.75), torch.tensor(0.98))
    wanted = o.clone()
    wanted[0, 2] = 0.25 * o[0, 2] + 0.75 * kept[0, 4]
    torch.testing.assert_close(out, wanted)
    none = fuse(o, read, torch.tensor(0.0), torch.tensor(0.0))
    assert torch.equal(none, o)
    unknown = read._replace(known=torch.zeros(2, 3, dtype=torch.bool))
    assert torch.equal(fuse(o, unknown, torch.tensor(1.0), torch.tensor(0.0)), o)


def test_merging_loses_no_token():
    """Every token is in one average."""
    n = 32
    order = dealt(n, torch.Generator().manual_seed(3))
    assert sorted(order.tolist()) == list(range(2 * n))
    new, old = random(1, n, 8), random(1, n, 8, seed=1)
    counts = [torch.ones(1, n, 1), torch.ones(1, n, 1)]
    marks = [torch.eye(2 * n)[None, :n], torch.eye(2 * n)[None, n:]]
    _, ones, shares = merged([new, counts[0], marks[0]], [old, counts[1], marks[1]], order)
    torch.testing.assert_close(ones, counts[0])
    torch.testing.assert_close(shares.sum(2), torch.ones(1, n))
    assert (shares > 0).sum() == 2 * n, "each in one"


def staged(rows, seed, tokens=4):
    return {"a": Staged(random(rows, tokens, 8, seed=seed), random(rows, tokens, 8, seed=seed + 1),
                        random(rows, tokens, 8, seed=seed + 2))}  # fmt: skip


def test_a_queue_holds_the_newest_and_no_bad_one():
    bank, kept = Bank(3, "queue"), {0: [], 2: []}
    for i in range(12):
        given = staged(2, 10 * i)
        if i in (2, 7):
            given["a"].k[0, 1, 1] = float("nan")
        if i == 8:
            given["a"].o[1] = float("inf")
        bank.put([2, 0], given)
        for row, place in enumerate((2, 0)):
            if all(t[row].isfinite().all() for t in (given["a"].k, given["a"].o)):
                kept[place] = [*kept[place], given["a"].k[row].clone()][-3:]
        assert bank.filled[:1] == [len(kept[0])] and bank.filled[2] == len(kept[2])
    for place, frames in kept.items():
        held = bank.read("a", torch.tensor([place]), None).k[0].view(3, 4, 8)
        assert {tuple(f.flatten().tolist()) for f in held} == {
            tuple(f.flatten().tolist()) for f in frames
        }
    assert bank.count(1) == 0 and bank.count(7) == 0 and not bank.full([0, 1])


@pytest.mark.parametrize("kind", ["queue", "merged"])
def test_addresses_stay_once_there_is_room(kind):
    bank = Bank(2, kind)
    bank.put([3], staged(1, 0))
    at = [t.data_ptr() for t in bank.layers["a"].all()]
    for i in range(1, 9):
        bank.put([i % 4, (i + 1) % 4], staged(2, i))
    assert at == [t.data_ptr() for t in bank.layers["a"].all()]
    assert bank.size == 4 * bank.frames * 4 * (3 * 8 + 1) * 4


@pytest.mark.parametrize("kind", ["queue", "merged"])
def test_calls_of_other_shapes_leave_each_other_what_they_have(kind):
    """As each alone, at addresses that stay, whichever shapes the calls of a tick have."""
    banks, alone = Banks(2, kind), [Bank(2, kind) for _ in range(3)]
    calls = [([0, 4], 4), ([1, 2], 6), ([3], 4)]
    at = None
    for i in range(6):
        for own, (places, tokens) in zip(alone, calls, strict=True):
            given = staged(len(places), 10 * i + places[0], tokens)
            banks.put(places, given)
            own.put(places, given)
        if i == 1:
            at = [t.data_ptr() for b in banks._banks for t in b.layers["a"].all()]
    assert sorted(at) == sorted(t.data_ptr() for b in banks._banks for t in b.layers["a"].all())
    for own, (places, tokens) in zip(alone, calls, strict=True):
        bank, index = banks.of(places), torch.tensor(places)
        assert bank.full(places) and not bank.full([p for p in range(5) if p not in places][:3])
        held, wanted = bank.read("a", index), own.read("a", index)
        assert held.k.shape[1] == tokens * bank.frames
        if kind == "queue":
            assert all(torch.equal(a, b) for a, b in zip(held[:4], wanted[:4], strict=True))
    assert banks.size == sum(bank.size for bank in banks._banks) and len(banks._banks) == 2


def test_banks_that_are_cleared_have_nothing():
    banks = Banks(2, "queue")
    for i in range(2):
        for place in (0, 1):
            banks.put([place], staged(1, i, tokens=5 + place))
    banks.clear()
    assert not banks.size and not any(banks.of([place]).count(place) for place in (0, 1))
    banks.put([1], staged(1, 7, tokens=6))
    assert banks.of([1]).count(1) == 1 and not banks.of([0]).count(0)


def test_a_place_of_another_shape_begins_anew_and_takes_nothing_with_it():
    banks = Banks(2, "queue")
    for i in range(3):
        banks.put([0, 1], staged(2, i))
    size = banks.size
    bad = staged(1, 9, tokens=6)
    bad["a"].k[0] = float("nan")
    banks.put([0], bad)
    assert banks.of([0]).filled == [2, 2], "a bad frame changes nothing"
    given = [staged(1, 10 + i, tokens=6) for i in range(3)]
    banks.put([0], given[0])
    assert banks.of([0]).filled == [1] and banks.of([1]).filled == [0, 2]
    assert banks.of([0, 1]).count(0) + banks.of([0, 1]).count(1) in (1, 2)
    for i in range(2):
        banks.put([0], staged(1, 20 + i))
        assert banks.of([0]).filled == [i + 1, 2]
        held = banks.of([0]).read("a", torch.tensor([0]), frames=i + 1).k[0, -4:]
        assert torch.equal(held, staged(1, 20 + i)["a"].k[0])
    for i in range(5):
        for place in (0, 1):
            banks.put([place], staged(1, i, tokens=5 + i))
    assert len(banks._banks) == 1 and banks.size < 3 * size
