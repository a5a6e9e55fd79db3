"""Weighted sums of named terms: what a step, a guide and a model make of what lies there.

A formula that is linear in its tensors is written once, for tensors or for numbers. Handed sums in
their place it gives the weights of its result, in double precision:

    guided(Sum(output=0.5), Sum(x=1.0), 3.0) == Sum(x=-2.0, output=1.5)
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class Sum(dict[str, float]):
    """A linear combination: the weight of each term by its name. A term left out weighs 0."""

    def __add__(self, other: "Sum") -> "Sum":
        names = dict.fromkeys([*self, *other])
        return Sum({name: self.get(name, 0.0) + other.get(name, 0.0) for name in names})

    def __mul__(self, factor: float) -> "Sum":
        return Sum({name: weight * factor for name, weight in self.items()})

    __rmul__ = __mul__

    def __sub__(self, other: "Sum") -> "Sum":
        return self + other * -1.0

    def put(self, name: str, meaning: "Sum") -> "Sum":
        """The same with a term replaced by what it is a sum of."""
        others = Sum({other: weight for other, weight in self.items() if other != name})
        return others + meaning * self.get(name, 0.0)


def weighted(
    weights: Mapping[str, float | Tensor | None],
    terms: Mapping[str, Tensor],
    onto: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The sum of terms, each times its weight.

    Args:
        weights: numbers, or columns [R, 1, 1, 1]; None is 1. A term that weighs the number 0 is
            left out and need not be there; one is left at least.
        terms: tensors of one shape [R, C, H, W], by name; others than these are not looked at.
        onto: a tensor that the sum is added to, in place.
        out: where the sum is written to; only with columns.

    Returns:
        `onto`, `out`, or a new tensor; the term itself where it is the only one and weighs None.
    """
    total, mine = onto, onto is not None
    for name, weight in weights.items():
        if not isinstance(weight, Tensor) and weight == 0:
            continue
        term = terms[name]
        if total is None:
            total = term if weight is None else torch.mul(term, weight, out=out)
            mine = weight is not None
        elif not isinstance(weight, Tensor):
            total = torch.add(total, term, alpha=1 if weight is None else weight, out=onto)
            mine = True
        elif mine:
            total.addcmul_(term, weight)
        else:
            total, mine = torch.addcmul(total, term, weight), True
    return total
