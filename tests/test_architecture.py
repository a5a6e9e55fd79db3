"""What is left out of a network, searched where the harm of each choice is known."""

import itertools
import os

import analytic
import numpy as np
import pytest
import torch
from livediffusion.engine.step_rules import STEP_RULES
from livediffusion.schedules import architecture
from livediffusion.schedules.architecture import Network, even, pruned
from livediffusion.schedules.axis import Axis
from livediffusion.schedules.pupil import Contest, Pupil, Steps, Teacher

LEVELS = (14.6, 5.0, 1.5, 0.4, 0.0)
SEEDS = range(int(os.environ.get("LIVEDIFFUSION_ARCHITECTURES", "6")))
AXIS = Axis(LEVELS[0], 0.03)


def network(seed, bodies=9):
    """Bodies of costs that differ by ten times, and a part that always runs."""
    costs = np.random.default_rng(seed).integers(10, 100, bodies)
    named = {f"output.{i}.0": int(cost) for i, cost in enumerate(costs)}
    return Network(named, int(costs.sum() * 1.25))


def predicting(net, seed):
    """A clean prediction that each body left out pulls its own way, by its own weight at each
    level; some pull against each other."""
    chance = np.random.default_rng(1000 + seed)
    weights = {name: 10 ** chance.uniform(-3, 0) for name in net.bodies}
    slopes = {name: chance.normal() for name in net.bodies}
    ways = {name: torch.tensor(chance.normal(size=3)) for name in net.bodies}

    def predict(x, sigma, shift=0.0, skipped=frozenset()):
        out = x / (1 + sigma**2)
        for name in sorted(skipped):
            out = out + weights[name] * sigma ** (0.3 * slopes[name]) * ways[name]
        return out

    return predict


def contest(net, seed, share, samples=24):
    predict = predicting(net, seed)
    x = torch.randn(2 * samples, 3, generator=torch.Generator().manual_seed(seed)).double()
    rule, space = STEP_RULES["dpmpp_2m"], analytic.Space("VP")
    steps = Steps(LEVELS)

    def pupil(x):
        ends = Pupil(predict, x, rule, space, Teacher(x)).run(steps).ends
        return Pupil(predict, x, rule, space, Teacher(ends))

    x = LEVELS[0] * x
    hands = {
        name: steps._replace(skips=(skipped,) * 4) for name, skipped in even(net, share).items()
    }
    return Contest(pupil(x[:samples]), pupil(x[samples:]), hands)


def found(seed=0, share=0.3, population=20, generations=8, known=None):
    net = network(seed)
    return list(pruned(contest(net, seed, share), AXIS, net, share, population, generations, seed,
                       known))  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_found_leaves_out_the_share_and_is_never_worse_than_a_rule(seed):
    share = [0.1, 0.25, 0.5, 0.79][seed % 4]
    net, rounds = network(seed), found(seed, share)
    assert [one.done for one in rounds] == list(range(9)) and rounds[-1].total == 8
    dearest = max(net.bodies.values()) / (4 * net.whole)
    for one in rounds[1:]:
        assert one.error <= one.hand_made[1]
        assert net.saved(one.steps.skips) >= share - 1e-9
    errors = [one.error for one in rounds]
    assert errors == sorted(errors, reverse=True)
    if rounds[-1].error < rounds[0].error:
        # no body more than it takes
        assert net.saved(rounds[-1].steps.skips) < share + dearest
        (levels, *_), top = rounds[-1].steps.levels, LEVELS[0]
        assert levels == top and all(a > b for a, b in itertools.pairwise(rounds[-1].steps.levels))


def test_it_finds_much_better_than_the_rules():
    ratios = [found(seed, 0.3)[-1] for seed in SEEDS]
    ratios = [one.error / one.hand_made[1] for one in ratios]
    assert np.exp(np.mean(np.log(ratios))) < 0.6, ratios


def test_chance_is_the_seeds():
    one, again = (found(3)[-1] for _ in range(2))
    assert one.steps == again.steps and one.error == again.error
    net = network(3)

    def other(seed):
        return list(pruned(contest(net, 3, 0.3), AXIS, net, 0.3, 8, 2, seed))[-1].steps

    assert len({other(seed) for seed in range(5)}) > 1


def test_every_body_of_every_step_changes_both_ways():
    """What the authors' code does not do: a body that is left out comes back, and one that runs is
    left out, by mutation alone, in the first generations and in the last."""
    net = network(1)
    search = architecture._Search(contest(net, 1, 0.3), AXIS, net, 0.3, 20, 1)
    search.feel()
    parent = search.first[0]
    before = search.bits(parent.skips)
    for part, times in ((0.0, 60), (1.0, 900)):
        changed = np.zeros(before.shape)
        for _ in range(times):
            changed += search.bits(search._mutated([parent], 0.3, part).skips) != before
        assert (changed > 0).all(), changed
        # and nothing is forced: each is as often as it was, too
        assert (changed < times).all()


def test_crossing_mixes_two():
    net = network(2)
    search = architecture._Search(contest(net, 2, 0.3), AXIS, net, 0.3, 20, 1)
    a, b = (
        architecture._One(0.0, search.lambdas, search.named(np.arange(36).reshape(4, 9) % k == 0))
        for k in (2, 3)
    )
    less = min(net.saved(one.skips) for one in (a, b))
    seen = {search._crossed([a, b], less).skips for _ in range(40)}
    assert len(seen) > 10 and all(net.saved(skips) >= less - 1e-9 for skips in seen)
    rows = [{skips[k] for skips in seen} for k in range(4)]
    assert all(len(row) > 1 for row in rows)


def test_going_on_from_what_was_found_before():
    first = found(4, generations=3)[-1]
    again = found(4, generations=3, known=first.steps)
    assert again[0].error <= first.error * (1 + 1e-12) and again[-1].error <= again[0].error


@pytest.mark.parametrize("seed", SEEDS)
def test_rules_made_by_hand_are_even(seed):
    net = network(seed, 5 + seed)
    names, costs = list(net.bodies), net.bodies
    for share in (0.05, 0.25, 0.5, net.most):
        rules = even(net, share)
        assert 1 <= len(rules) <= 8
        for skipped in rules.values():
            assert net.saved([skipped]) >= share - 1e-9
            at = [i for i, name in enumerate(names) if name in skipped]
            gaps = {(b - a) % len(names) or len(names)
                    for a, b in itertools.pairwise([*at, at[0] + len(names)])}  # fmt: skip
            assert max(gaps) - min(gaps) <= 1
            assert sum(costs[name] for name in skipped) / net.whole == net.saved([skipped])


def test_a_harmless_body_goes_first_and_the_only_one_that_matters_stays():
    net = network(5)

    def predict(x, sigma, shift=0.0, skipped=frozenset()):
        return x / (1 + sigma**2) + 3.0 * ("output.4.0" in skipped)

    x = LEVELS[0] * torch.randn(16, 3).double()
    ends = Pupil(predict, x, STEP_RULES["euler"], analytic.Space("VP"), Teacher(x))
    goal = Teacher(ends.run(Steps(LEVELS)).ends)
    pupil = Pupil(predict, x, STEP_RULES["euler"], analytic.Space("VP"), goal)
    share = net.most - net.bodies["output.4.0"] / net.whole - 1e-6
    hands = {name: Steps(LEVELS, (), (skipped,) * 4)
             for name, skipped in even(net, share).items()}  # fmt: skip
    *_, one = pruned(Contest(pupil, pupil, hands), AXIS, net, share, 8, 4)
    assert not any("output.4.0" in skipped for skipped in one.steps.skips)
    assert one.error == pytest.approx(0.0, abs=1e-9)


def test_skips_that_are_not_one_for_each_call_are_refused():
    net = network(0)
    pupil = contest(net, 0, 0.3).train
    with pytest.raises(ValueError, match="2 choices of bodies for 4 model calls"):
        pupil.run(Steps(LEVELS, (), (frozenset(),) * 2))
    plain = pupil.run(Steps(LEVELS))
    calls = pupil.calls
    # a call that leaves nothing out is the same call
    last = Steps(LEVELS, (), (*(frozenset(),) * 3, frozenset(net.bodies)))
    assert not torch.equal(pupil.run(last, plain).ends, plain.ends)
    assert pupil.calls == calls + 1
