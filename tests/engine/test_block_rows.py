"""Kept features lie as the network's own do: a CPU's convolutions would lay others out anew."""

import pytest
import torch
from livediffusion.engine.blocks.reuse import Reusing
from livediffusion.engine.blocks.rows import laid, layout
from livediffusion.engine.blocks.schedule import Guest, Reuse, Spot

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def features(rows, how, seed=0):
    torch.manual_seed(seed)
    return torch.randn(rows, 6, 4, 5).contiguous(memory_format=how)


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("index", [[0], [3, 1], [2, 2, 0, 3], []])
def test_rows_lie_as_they_lay(how, index):
    whole, at = features(4, how), torch.tensor(index, dtype=torch.int64)
    some = laid(whole, at)
    assert torch.equal(some, whole.index_select(0, at))
    assert layout(whole) is how and (not index or layout(some) is how)


def test_what_is_no_picture_is_taken_as_it_is():
    tokens = torch.randn(4, 7, 3).transpose(1, 2)
    assert torch.equal(laid(tokens, torch.tensor([2])), tokens[2:3])


@pytest.mark.parametrize("how", LAYOUTS)
def test_a_bank_lies_as_what_it_keeps_however_it_grows(how):
    reusing = Reusing(torch.device("cpu"))
    reusing.settle(Reuse(4, awake=0.0), 1, 4, "key")
    spots, kept = [Spot(0, 0, k, 0) for k in range(4)], {}
    for beat in range(12):
        there = spots[: 1 + min(beat, 3)]  # slot after slot fills
        reusing.begin()
        reusing.meet({(k, 0): Guest(beat - k, k) for k in range(len(there))}, beat)
        keeping = reusing.planned(there, True).kept
        new = features(len(keeping.rows), how, beat) if keeping.rows else None
        out = keeping.take(new)
        for i, r in enumerate(keeping.rows):
            kept[r] = new[i]
        assert torch.equal(out, torch.stack([kept[r] for r in range(len(there))]))
        assert layout(out) is how and layout(reusing.banks[0].features) is how
        reusing.finish()
    assert len(keeping.rows) == 1
