"""What was tried, as a criterion that ranks points: a Parzen ratio and a Gaussian process by turns.

The Parzen ratio is the criterion of TPE over whole points; the Gaussian process ranks by expected improvement.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from mctune.study.samplers.surrogate import Array, Distances, GaussianProcess, ParzenRatio, Points

_REFIT = 10  # candidates between two fits of the Gaussian process's weights
_MODEL_MOST = 300  # points that a model sees: the cost of a proposal stays bounded in long searches
_FIT_MOST = 64  # points that the weights are fitted to: the expensive step, and small enough for one BLAS thread
_CLIP = 0.75  # slower than this quantile is all the same: a model should resolve the fast end


class Model:
    """Both models over one list of parameters.

    Args:
        sizes: numbers of values.
        ordered: whether neighbouring values are alike.
        start: points before the first fit.
    """

    def __init__(self, sizes: Sequence[int], ordered: Sequence[bool], start: int) -> None:
        distances = Distances(sizes, ordered)
        self._start = start
        self._gp, self._parzen = GaussianProcess(distances), ParzenRatio(distances)
        self._fitted: tuple[Hashable, Array] | None = None

    def learn(self, points: Points, costs: Array, most: int = _MODEL_MOST) -> tuple[Points, Array]:
        """Points and scores for the models: a failure, which costs NaN, scores like the slowest."""
        worst = 0.0 if np.isnan(costs).all() else float(np.nanmax(costs)) + 1e-6
        scores = np.where(np.isnan(costs), worst, costs)
        if len(scores) > most:
            order = np.argsort(scores, kind="stable")
            half = most // 2
            spread = np.linspace(half, len(order) - 1, most - half).astype(np.int64)
            kept = np.sort(np.concatenate([order[:half], order[spread]]))
            points, scores = points[kept], scores[kept]
        return points, scores

    def criterion(
        self, points: Points, scores: Array, early: Callable[[int], tuple[Points, Array]], tried: int, *, parzen: bool
    ) -> Callable[[Points], Array]:
        """What ranks points, higher is better.

        Args:
            points, scores: what :meth:`learn` made of all that was tried.
            early: points and costs of so many that were tried first; weights are fitted to them now and then.
            tried: how many were tried.
            parzen: which of the models.
        """
        if parzen:
            self._parzen.condition(points, scores)
            return self._parzen.gain
        checkpoint = self._start + max(tried - self._start, 0) // _REFIT * _REFIT
        known, costs = early(checkpoint)
        key = known.tobytes(), costs.tobytes()
        if self._fitted is None or self._fitted[0] != key:
            fitted, targets = self.learn(known, costs, _FIT_MOST)
            self._fitted = key, self._gp.fit(fitted, _standard(targets))
        self._gp.condition(points, _standard(scores), self._fitted[1])
        return self._gp.gain


def _standard(scores: Array) -> Array:
    """Scores clipped above at a quantile, with mean 0 and variance 1."""
    clipped = np.minimum(scores, np.quantile(scores, _CLIP))
    return np.asarray((clipped - clipped.mean()) / (clipped.std() + 1e-12))
