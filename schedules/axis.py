"""Where a noise level lies: lambda, the logarithm of the signal-to-noise ratio's root."""

from dataclasses import dataclass

import numpy as np

_NOISIEST = 0.999  # of a flow model: pure noise has no logarithm
# a gap below this part of an even one is none: steps stay apart
_FLOOR = 1e-3


@dataclass(frozen=True)
class Axis:
    """Noise levels between two ends, as lambda = log(alpha / sigma), and as shares of the way.

    Args:
        top: the first level, which stays where it is.
        bottom: the lowest level that a step may begin at.
        flow: levels are a flow model's, whose signal is 1 - sigma; else sigma is the ratio itself.
    """

    top: float
    bottom: float
    flow: bool = False

    def lambdas(self, levels) -> np.ndarray:
        """Of levels above 0; a flow model's are taken as 0.999 at most."""
        ratio = np.asarray(levels, np.float64)
        if self.flow:
            ratio = np.minimum(ratio, _NOISIEST)
            ratio = ratio / (1 - ratio)
        return -np.log(ratio)

    def levels(self, lambdas: np.ndarray) -> tuple[float, ...]:
        """n + 1 descending levels of n rising lambdas: from the top, to 0."""
        ratio = np.exp(-np.asarray(lambdas, np.float64))
        if self.flow:
            ratio = ratio / (1 + ratio)
        return (self.top, *ratio[1:].tolist(), 0.0)

    def shares(self, levels) -> np.ndarray:
        """Of n + 1 levels, such that `placed` puts them back: the logarithms of the n gaps from
        level to level and to the bottom. A gap below a tenth of an even one becomes that."""
        lambdas = self.lambdas(levels[:-1])
        gaps = np.diff([*lambdas, max(self._end, lambdas[-1])])
        gaps = np.maximum(gaps / gaps.sum(), 0.1 / len(gaps))
        return np.log(gaps) - np.log(gaps).mean()

    def placed(self, shares: np.ndarray) -> np.ndarray:
        """n rising lambdas whose gaps are softmax(shares) of the way from top to bottom."""
        low = self.lambdas([self.top])[0]
        gaps = (_softmax(shares) + _FLOOR / len(shares)) / (1 + _FLOOR)
        return low + (self._end - low) * np.concatenate([[0], np.cumsum(gaps)[:-1]])

    def slopes(self, shares: np.ndarray) -> np.ndarray:
        """d placed / d shares, [n, n]."""
        low, n = self.lambdas([self.top])[0], len(shares)
        gaps = _softmax(shares)
        moved = (np.diag(gaps) - np.outer(gaps, gaps)) / (1 + _FLOOR)
        # a level lies at the sum of the gaps before it
        return (self._end - low) * np.tril(np.ones((n, n)), -1) @ moved

    @property
    def _end(self) -> float:
        return self.lambdas([self.bottom])[0]


def _softmax(shares: np.ndarray) -> np.ndarray:
    parts = np.exp(shares - shares.max())
    return parts / parts.sum()
