"""Which parts of a network each step can do without, found by evolution.

After AutoDiffusion (Li et al., ICCV 2023, arXiv 2309.10438), section 3.2: a candidate is steps and,
for each of them, what of the network runs; steps are searched first, then both together, while the
share that is left out rises. What it adds: the first candidates come of the harm that each body
does when it alone is left out. In the authors' published code the mutation of single layers
compares where it should assign, so their layers change by crossing only; here they mutate.
"""

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .axis import Axis
from .pupil import Contest, Found, Run, Skips, Steps
from .searched import moved

# of a population of 50: 10 parents, 25 mutated, 10 crossed (the paper's figures); the rest is fresh
_PARENTS, _MUTATED, _CROSSED = 0.2, 0.5, 0.2
_FLIP = 0.25  # a mutation's probability for each body of each step in the first generation (theirs)
_FEW = 2.0  # bodies that it changes in the last
_RISING = 0.5  # of the generations, in which the share that is left out rises
_WIDE, _NARROW = 0.2, 0.02  # how far steps move, in gaps
_HEAT = 0.5  # how much chance decides what makes up for a change
_ALONE = 4  # populations that finding out each body's harm may cost at each step by itself
_RULES = 8  # rules made by hand that are tried
_LEAST = 1e-9


@dataclass(frozen=True)
class Network:
    """What a network's parts cost.

    Attributes:
        bodies: FLOPs of each part that can be left out, by name, in the order of a call.
        whole: FLOPs of all the network.
    """

    bodies: Mapping[str, int]
    whole: int

    @property
    def most(self) -> float:
        """The largest share that can be left out."""
        return sum(self.bodies.values()) / self.whole

    def saved(self, skips: Collection[Collection[str]]) -> float:
        """The share that is left out of as many calls as there are collections, 0..1."""
        if not skips:
            return 0.0
        left = sum(self.bodies[name] for skipped in skips for name in skipped)
        return left / (self.whole * len(skips))


def even(network: Network, share: float, most: int = _RULES) -> dict[str, frozenset[str]]:
    """Rules made by hand: every k-th body is left out, at every step the same.

    Args:
        share: of the FLOPs, which is left out at least.
        most: rules.

    Returns:
        by name, those that leave out least beyond the share first.
    """
    names = list(network.bodies)
    count = len(names)
    found: dict[frozenset[str], tuple[float, str]] = {}
    for m in range(1, count + 1):
        for first in range(math.ceil(count / m)):
            at = sorted({(first + i * count // m) % count for i in range(m)})
            skipped = frozenset(names[i] for i in at)
            saved = network.saved([skipped])
            if saved >= share * (1 - _LEAST) and skipped not in found:
                found[skipped] = saved, f"one in {count / m:.3g} bodies, from {names[at[0]]}"
    best = sorted(found.items(), key=lambda rule: rule[1][0])[:most]
    return {name: skipped for skipped, (_, name) in best}


class _One(NamedTuple):
    """A candidate.

    Attributes:
        error: on what it is made on; infinite where it is not known yet.
        lambdas: of the steps, see Axis.
        skips: for each call.
    """

    error: float
    lambdas: np.ndarray
    skips: Skips


def pruned(
    contest: Contest,
    axis: Axis,
    network: Network,
    share: float,
    population: int,
    generations: int,
    seed: int = 0,
    known: Steps | None = None,
) -> Iterator[Found]:
    """The best so far that leaves out a share of the FLOPs, after each generation.

    Args:
        contest: rules made by hand, judged, all with the same steps and with `share` left out.
        axis: of the levels.
        share: 0 to network.most.
        population: tried in a generation, at least 4.
        generations: at least 1; before them each body is left out alone.
        seed: of the chances taken.
        known: found before, to go on from; then the share does not rise any more.
    """
    search = _Search(contest, axis, network, share, population, seed)
    if known is not None:
        search.know(known)
    yield contest.found(0, generations)
    search.feel()
    rising = 1 if known is not None else max(1, math.ceil(_RISING * generations))
    for generation in range(generations):
        part = generation / max(generations - 1, 1)
        search.generation(share * min(1.0, (generation + 1) / rising), part)
        search.offer()
        yield contest.found(generation + 1, generations)


class _Search:
    def __init__(
        self, contest: Contest, axis: Axis, network: Network, share: float, population: int,
        seed: int,
    ):  # fmt: skip
        self.contest, self.axis, self.network = contest, axis, network
        self.share, self.population = share, population
        self.chance = np.random.default_rng(seed)
        self.names = list(network.bodies)
        self.costs = np.array([network.bodies[name] for name in self.names], np.float64)
        self.keep = max(2, round(_PARENTS * population))
        base = contest.ranked[0][2]
        self.shifts, self.lambdas = base.shifts, axis.lambdas(base.levels[:-1])
        # those that meet the share from the beginning
        self.first = [_One(e, self.lambdas, s.skips) for e, _, s in contest.ranked]
        self.calls = len(base.skips)
        self.harm = np.ones((self.calls, len(self.names)))
        self.alive: list[_One] = []
        self._like: Run | None = None
        self._known: dict[tuple, float] = {}

    # -- candidates -------------------------------------------------------------------------------

    def steps(self, one: _One) -> Steps:
        same = np.array_equal(one.lambdas, self.lambdas)
        levels = self.contest.ranked[0][2].levels if same else self.axis.levels(one.lambdas)
        return Steps(levels, self.shifts, one.skips)

    def tried(self, one: _One) -> _One:
        """With its error; what was tried before costs nothing."""
        steps = self.steps(one)
        if steps not in self._known:
            run = self.contest.train.run(steps, self._like)
            self._known[steps] = float(self.contest.train.judged(run.ends).mean())
        return one._replace(error=self._known[steps])

    def know(self, steps: Steps) -> None:
        self.first.append(self.tried(_One(0.0, self.axis.lambdas(steps.levels[:-1]), steps.skips)))
        self.contest.offer(steps)

    def offer(self) -> None:
        """The best one, as it is or with more left out."""
        best = self.alive[0]
        fit = best._replace(skips=self.fitted(self.bits(best.skips), self.share, 0.0))
        self.contest.offer(self.steps(self.tried(fit)))

    # -- what a body is worth ---------------------------------------------------------------------

    def feel(self) -> None:
        """The harm that each body does when it is left out alone."""
        nothing = _One(0.0, self.lambdas, (frozenset(),) * self.calls)
        self._like = self.contest.train.run(self.steps(nothing))
        base = float(self.contest.train.judged(self._like.ends).mean())
        together = self.harm.size > _ALONE * self.population
        for i, name in enumerate(self.names):
            alone = frozenset([name])
            for k in (None,) if together else range(self.calls):
                skips = tuple(alone if k in (None, at) else frozenset() for at in range(self.calls))
                harm = self.tried(nothing._replace(skips=skips)).error - base
                self.harm[slice(None) if k is None else k, i] = harm
        finite = self.harm[np.isfinite(self.harm)]
        worst = finite.max() if len(finite) else 1.0
        self.harm = np.where(np.isfinite(self.harm), self.harm, 10 * abs(worst) + 1)
        # what does good when it is left out is taken to do next to no harm
        self.harm = np.maximum(self.harm, 1e-3 * max(abs(worst), _LEAST))

    # -- bits -------------------------------------------------------------------------------------

    def bits(self, skips: Skips) -> np.ndarray:
        """[calls, bodies], True where a body is left out."""
        return np.array([[name in skipped for name in self.names] for skipped in skips])

    def named(self, bits: np.ndarray) -> Skips:
        return tuple(
            frozenset(itertools.compress(self.names, row)) for row in bits.tolist()
        )  # fmt: skip

    def fitted(
        self, bits: np.ndarray, share: float, heat: float, settled: np.ndarray | None = None
    ) -> Skips:
        """With as much more left out as the share asks for, and no body more than that.

        Args:
            heat: how much chance decides, and not harm per FLOP; 0: not at all.
            settled: bodies that are touched last.
        """
        bits, need = bits.copy(), share * self.network.whole * self.calls * (1 - _LEAST)
        costs = np.broadcast_to(self.costs, bits.shape)
        price = np.log(self.harm / np.maximum(costs, 1.0))
        price = price + heat * self.chance.gumbel(size=bits.shape)
        if settled is not None:
            price = np.where(settled, np.where(bits, -np.inf, np.inf), price)
        order = [divmod(int(at), bits.shape[1]) for at in np.argsort(price, axis=None)]
        saved = float(costs[bits].sum())
        for at in order:
            if saved >= need:
                break
            if not bits[at]:
                bits[at], saved = True, saved + costs[at]
        for at in reversed(order):
            if bits[at] and saved - costs[at] >= need:
                bits[at], saved = False, saved - costs[at]
        return self.named(bits)

    # -- a generation -----------------------------------------------------------------------------

    def generation(self, share: float, part: float) -> None:
        """The fittest of those before and of their children.

        Args:
            share: that all of them leave out.
            part: of the search that is over, 0..1.
        """
        before = self.alive
        if not before:
            none = np.zeros(self.harm.shape, bool)
            heats = [0.0, *np.linspace(0.1, 1.5, self.population - 1)]
            children = [self._one(none, share, heat) for heat in heats]
        else:
            counts = [round(p * self.population) for p in (_MUTATED, _CROSSED)]
            fresh = max(self.population - len(before) - sum(counts), 1)
            children = [one._replace(skips=self.fitted(self.bits(one.skips), share, 0.0))
                        for one in before]  # fmt: skip
            children += [self._mutated(before, share, part) for _ in range(counts[0])]
            children += [self._crossed(before, share) for _ in range(counts[1])]
            none = np.zeros(self.harm.shape, bool)
            children += [self._one(none, share, 1.0) for _ in range(fresh)]
        alive = [self.tried(one) for one in children]
        if share >= self.share:
            alive += self.first
        self.alive = self._fittest(alive)

    def _one(self, bits: np.ndarray, share: float, heat: float, lambdas=None) -> _One:
        lambdas = self.lambdas if lambdas is None else lambdas
        return _One(math.inf, lambdas, self.fitted(bits, share, heat))

    def _chosen(self, parents: list[_One]) -> _One:
        """Better ones more often."""
        return parents[int(len(parents) * self.chance.random() ** 2)]

    def _mutated(self, parents: list[_One], share: float, part: float) -> _One:
        parent = self._chosen(parents)
        bits = self.bits(parent.skips)
        few = min(_FLIP, _FEW / bits.size)
        rate = _FLIP * (few / _FLIP) ** part
        # a body changes to what it was not, and the others make up for it
        changed = self.chance.random(bits.shape) < rate
        lambdas = parent.lambdas
        if part > 0 and self.chance.random() < _FLIP:
            width = _WIDE * (_NARROW / _WIDE) ** part
            lambdas = moved(lambdas, self.axis, width, self.chance)
        skips = self.fitted(bits ^ changed, share, _HEAT, changed)
        return _One(math.inf, lambdas, skips)

    def _crossed(self, parents: list[_One], share: float) -> _One:
        """Each step's bodies from either parent, or each body."""
        a, b = self._chosen(parents), self._chosen(parents)
        ours, theirs = self.bits(a.skips), self.bits(b.skips)
        shape = (self.calls, 1) if self.chance.random() < 0.5 else ours.shape
        bits = np.where(self.chance.random(shape) < 0.5, ours, theirs)
        return self._one(bits, share, _HEAT, (a if self.chance.random() < 0.5 else b).lambdas)

    def _fittest(self, alive: Iterable[_One]) -> list[_One]:
        """The best that are not the same."""
        chosen: dict[Steps, _One] = {}
        for one in sorted(alive, key=lambda one: one.error):
            chosen.setdefault(self.steps(one), one)
            if len(chosen) == self.keep:
                break
        return list(chosen.values())
