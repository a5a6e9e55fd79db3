"""Small tensors reach a GPU without a wait. There is none here: stand-ins tell what is asked."""

import pytest
import torch
from livediffusion.engine import fold, noise, plan, work
from livediffusion.engine.guidance import Guidance
from livediffusion.engine.noise import SlotNoise
from livediffusion.engine.ring import Ring
from livediffusion.engine.upload import uploaded
from rings import SHAPE, Model, Raw, course, frames, run


class Pageable:
    """What torch would be asked for."""

    def __init__(self, pinned=False):
        self.pinned = pinned

    def pin_memory(self):
        return Pageable(True)

    def to(self, device, non_blocking=False):
        return self.pinned, device, non_blocking


def test_cuda_copies_from_pinned_memory_and_does_not_wait():
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert uploaded(Pageable(), cuda) == (True, cuda, True)
    assert uploaded(Pageable(), cpu) == (False, cpu, False)
    values = torch.tensor([1, 2])
    assert uploaded(values, cpu) is values


@pytest.mark.parametrize("kind", [Model, Raw])
def test_everything_that_a_tick_needs_anew_goes_that_way(monkeypatch, kind):
    """cfg, delta, seed and the layout of rows change; what the device gets came by `uploaded`."""
    made = []

    def counted(values, device):
        made.append(values.clone())
        return made[-1]

    for module in (fold, noise, plan, work):
        monkeypatch.setattr(module, "uploaded", counted)
    ring, model = Ring(2), kind()
    c = course("dpmpp_2m", 3)
    for i in range(12):
        guidance, slots = Guidance("onetime-negative", 1.2 + i, 0.1 * i), SlotNoise(i, SHAPE)
        run(ring, model, guidance, frames(1 + i % 2, i), [0.0] * (1 + i % 2), c, slots)
    mine = {id(tensor) for tensor in made}
    known = list(ring._plans.values())
    assert known
    for each in known:
        assert all(id(p.slot(0)) in mine for _, p in each.holds)
        assert isinstance(each.rows, slice) or id(each.rows) in mine
        if kind is Raw:
            assert id(each.fold.dial) in mine
            continue
        columns = [c for c in (*each.after.values(), *each.kept.values()) if c is not None]
        assert columns and all(id(column._base) in mine for column in columns)
    assert any(not isinstance(each.rows, slice) for each in known)
