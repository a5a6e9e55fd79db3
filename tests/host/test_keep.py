"""What is kept from run to run, by itself: against a plain list of what each run did."""

import os
import random

import pytest
import torch
from livediffusion.host.frames.keep import MOST_NAMES, Kept, checked_name

SWEEPS = int(os.environ.get("LIVEDIFFUSION_KEEP", "200"))


class Turn:
    def __init__(self, well=True):
        self.well = well


def image(value, size=4, frames=1):
    return torch.full((frames, size, size, 3), float(value))


def latent(value, size=4, frames=1):
    return {"samples": torch.full((frames, 4, size, size), float(value)), "told": value}


@pytest.mark.parametrize("make", [image, latent])
def test_it_is_a_list_of_what_went_well(make):
    """Any order inside a run, failed runs, runs that leave a node out, sizes that change."""
    for seed in range(SWEEPS):
        rng = random.Random(seed)
        kept, size, first = Kept(), 4, [make(-1, 4), make(-1, 6)]
        told = {"a": None, "b": None}  # of the runs before: value and number
        seen = {}  # by node: the size of its first, and the run it has been that since
        for number in range(1, 40):
            turn, fresh = Turn(rng.random() < 0.8), {}
            if rng.random() < 0.1:
                size = 10 - size
            jobs = [(job, name) for name in told for job in ("keep", "last", "other")
                    if rng.random() < 0.7]  # fmt: skip
            rng.shuffle(jobs)
            for job, name in jobs:
                if job == "keep":
                    fresh[name] = make(number, size), number
                    kept.keep(turn, f"keep {name}", name, fresh[name][0])
                    continue
                # one node's first follows the size, the other's does not
                asked = first[size == 6 and job == "last"]
                got = kept.last(turn, f"{job} {name}", name, asked)
                now = size if job == "last" else 4
                before, since = seen.get((job, name), (now, 0))
                seen[job, name] = now, (since if before == now else number)
                whole = told[name] is not None and told[name][1] >= seen[job, name][1]
                assert got is (told[name][0] if whole else asked), (seed, number, job, name)
            if turn.well:
                told |= fresh


@pytest.mark.parametrize("make", [image, latent])
def test_a_frame_that_is_not_finite_is_the_one_before(make):
    def inside(value):
        return value["samples"] if isinstance(value, dict) else value

    for bad in ("nan", "inf", "-inf"):
        kept = Kept()
        given = make(0.3, frames=3)
        inside(given)[1, 0, 0, 0] = float(bad)
        untouched = inside(given).clone()
        kept.keep(Turn(), "k", "a", given)
        first = inside(kept.last(Turn(), "l", "a", make(9)))
        assert first[1, 0, 0, 0] == 0 and (first.flatten()[1:4] == 0.3).all()
        # what goes on to other nodes is not ours to change
        assert torch.equal(inside(given).nan_to_num(7), untouched.nan_to_num(7))
        kept.keep(Turn(), "k", "a", make(0.5, frames=3))
        given = make(0.7, frames=3)
        inside(given)[2, 0, 0, 0] = float(bad)
        kept.keep(Turn(), "k", "a", given)
        after = inside(kept.last(Turn(), "l", "a", make(9)))
        assert [round(float(row.mean()), 4) for row in after] == [0.7, 0.7, 0.5]


def test_a_latent_is_given_where_the_other_one_is():
    """Stock nodes of latents ask for one device; those of pictures bring them together."""
    for make, follows in ((latent, True), (image, False)):
        kept, value = Kept(), make(1)
        first = make(0)
        if follows:
            first["samples"] = first["samples"].to("meta")
        else:
            first = first.to("meta")
        kept.keep(Turn(), "k", "a", value)
        got = kept.last(Turn(), "l", "a", first)
        if not follows:
            assert got is value
            continue
        assert got["samples"].device.type == "meta" and got["told"] == 1
        assert (first["samples"] + got["samples"]).device.type == "meta"
        assert kept.last(Turn(), "l", "a", make(0)) is value, "what is kept stays where it is"


def test_names_are_bounded_and_one_node_keeps_under_each():
    kept, turn = Kept(), Turn()
    for i in range(MOST_NAMES):
        kept.keep(turn, str(i), f"n{i}", image(i))
    with pytest.raises(ValueError, match=r"^name: 16 names are in use"):
        kept.keep(turn, "more", "more", image(0))
    with pytest.raises(ValueError, match=r"^name: another Live Keep .*'n3'"):
        kept.keep(turn, "other", "n3", image(0))
    # in another run it may be: of two branches one is taken
    kept.keep(Turn(), "other", "n3", image(30))
    # a graph of today does not suffer from the names of yesterday
    for i in range(50):
        kept.keep(Turn(), "k", f"edit {i}", image(i))
        assert len(kept) == MOST_NAMES


def test_what_does_not_belong_is_said():
    kept = Kept()
    kept.keep(Turn(), "k", "a", image(1))
    with pytest.raises(ValueError, match=r"^first: expected an IMAGE.* 'a', got a LATENT"):
        kept.last(Turn(), "l", "a", latent(1))
    kept.keep(Turn(), "k", "b", latent(1))
    with pytest.raises(ValueError, match=r"^first: expected a LATENT.* 'b', got an IMAGE"):
        kept.last(Turn(), "l", "b", image(1))
    for bad in (None, 3, [], torch.zeros(4, 4), {"samples": None}, {}, latent(1, frames=0)):
        with pytest.raises(ValueError, match=r"^value: "):
            kept.keep(Turn(), "k", "c", bad)
        with pytest.raises(ValueError, match=r"^first: "):
            kept.last(Turn(), "l", "c", bad)


@pytest.mark.parametrize("bad", [None, 3, "picture", [], torch.zeros(4, 4), torch.zeros(1, 4, 4)])
def test_what_may_be_wired_is_named_in_full(bad):
    for ask in (Kept().keep, Kept().last):
        with pytest.raises(ValueError, match=r"\. Connect an IMAGE or a LATENT\.$"):
            ask(Turn(), "k", "c", bad)


@pytest.mark.parametrize("bad", [None, 3, 1.5, True, ["a"], {"a": 1}, b"a", torch.ones(1), " "])
def test_a_name_is_a_word(bad):
    with pytest.raises(ValueError, match=r"^name: .*\. Write the same word on Live Keep and Live"):
        checked_name(bad)
