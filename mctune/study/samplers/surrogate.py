"""Two models of a search's history, both over index points and both plain numpy: a Gaussian process and a Parzen ratio.

A point is one index per parameter. Two points differ, parameter by parameter, by the distance of their indices as a
share of the list (ordered parameters) or by 0 or 1 (unordered ones). Scores are log milliseconds: lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Points = NDArray[np.int64]

_FIT_STEPS = 25
_STEP_SIZE = 0.2
_NOISE = 1e-2  # prior median of the noise variance; scores have variance 1
_WEIGHT_SPREAD = 1.5  # prior standard deviations, in logarithms
_NOISE_SPREAD = 2.0
_JITTER = 1e-6
_GOOD_SHARE = 0.15
_GOOD_MOST = 25
_BANDWIDTH = 0.15


class Distances:
    """Distances between points, one plane a parameter."""

    def __init__(self, sizes: Sequence[int], ordered: Sequence[bool]) -> None:
        self.sizes = tuple(sizes)
        self.ordered = np.array(ordered, dtype=bool)
        self._scale = np.array([1.0 / max(n - 1, 1) for n in sizes])

    def between(self, a: Points, b: Points) -> Array:
        """``[parameters, len(a), len(b)]``, each in 0..1."""
        apart = np.abs(a.T[:, :, None] - b.T[:, None, :]).astype(np.float64)
        flat = ~self.ordered
        apart[flat] = apart[flat] > 0
        apart[self.ordered] *= self._scale[self.ordered][:, None, None]
        return np.asarray(apart)


def _matern(weighted: Array) -> Array:
    """Matern 5/2 of the root of the weighted distance: continuous, but rough enough for kernels' cliffs."""
    r = np.sqrt(5.0 * np.maximum(weighted, 1e-12))
    return np.asarray((1.0 + r + r * r / 3.0) * np.exp(-r))


def _matern_slope(weighted: Array) -> Array:
    """The derivative of :func:`_matern` by the weighted distance."""
    r = np.sqrt(5.0 * np.maximum(weighted, 1e-12))
    return np.asarray(-(5.0 / 6.0) * (1.0 + r) * np.exp(-r))


class GaussianProcess:
    """Scores as a Gaussian process with one weight a parameter; the amplitude is profiled out."""

    def __init__(self, distances: Distances) -> None:
        self._distances = distances

    def fit(self, points: Points, scores: Array) -> Array:
        """Log weights and, last, log noise: a few steps of Adam on the posterior density, from the prior mode."""
        apart = self._distances.between(points, points)
        count, eye = len(scores), np.eye(len(scores))
        prior = np.append(np.zeros(len(apart)), math.log(_NOISE))
        spread = np.append(np.full(len(apart), _WEIGHT_SPREAD), _NOISE_SPREAD)
        theta, best, best_loss = prior.copy(), prior.copy(), math.inf
        mean, square = np.zeros_like(theta), np.zeros_like(theta)
        for step in range(1, _FIT_STEPS + 1):
            weights, noise = np.exp(theta[:-1]), math.exp(theta[-1])
            weighted = np.tensordot(weights, apart, 1)
            inverse, log_det = _inverse(_matern(weighted) + (noise + _JITTER) * eye)
            alpha = inverse @ scores
            amplitude = max(float(scores @ alpha) / count, 1e-12)
            off = (theta - prior) / spread
            loss = 0.5 * (count * math.log(amplitude) + log_det + float(off @ off))
            if loss < best_loss:
                best_loss, best = loss, theta.copy()
            by_kernel = 0.5 * (inverse - np.outer(alpha, alpha) / amplitude)
            slope = np.append(
                np.tensordot(apart, by_kernel * _matern_slope(weighted), 2) * weights, np.trace(by_kernel) * noise
            )
            slope += off / spread
            mean = 0.9 * mean + 0.1 * slope
            square = 0.99 * square + 0.01 * slope * slope
            theta -= _STEP_SIZE * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.99**step)) + 1e-8)
        return best

    def condition(self, points: Points, scores: Array, theta: Array) -> None:
        """Take ``scores`` (mean 0, variance 1) at ``points`` as known."""
        self._points, self._weights = points, np.exp(theta[:-1])
        covariance = _matern(np.tensordot(self._weights, self._distances.between(points, points), 1))
        covariance += (math.exp(theta[-1]) + _JITTER) * np.eye(len(scores))
        self._root = np.linalg.inv(np.linalg.cholesky(covariance))
        self._alpha = self._root.T @ (self._root @ scores)
        self._amplitude = max(float(scores @ self._alpha) / len(scores), 1e-12)
        self._best = float(scores.min())

    def gain(self, candidates: Points) -> Array:
        """Logarithm of the expected improvement over the best score so far, one a candidate."""
        cross = _matern(np.tensordot(self._weights, self._distances.between(candidates, self._points), 1))
        explained = cross @ self._root.T
        deviation = np.sqrt(self._amplitude * np.maximum(1.0 - (explained * explained).sum(1), 1e-9))
        z = (self._best - cross @ self._alpha) / deviation
        return np.asarray(np.log(deviation) + np.array([_log_gain(x) for x in z.tolist()]))


def _inverse(matrix: Array) -> tuple[Array, float]:
    """Inverse and log determinant of a positive definite matrix."""
    root = np.linalg.inv(np.linalg.cholesky(matrix))
    return root.T @ root, -2.0 * float(np.log(np.diag(root)).sum())


def _log_gain(z: float) -> float:
    """log(z Phi(z) + phi(z)); below -6, where the sum cancels, its asymptote phi(z) / z^2."""
    log_density = -0.5 * z * z - 0.5 * math.log(2.0 * math.pi)
    if z < -6.0:
        return log_density - 2.0 * math.log(-z)
    return math.log(z * 0.5 * math.erfc(-z / math.sqrt(2.0)) + math.exp(log_density))


class ParzenRatio:
    """The tree-structured Parzen estimator's criterion: log density among the good points less that among the rest.

    Both densities are mixtures over whole points (multivariate), with a uniform component as heavy as one point.
    """

    def __init__(self, distances: Distances) -> None:
        self._kernels = [
            _kernel(size, bool(ordered))
            for size, ordered in zip(distances.sizes, distances.ordered.tolist(), strict=True)
        ]
        self._uniform = -sum(math.log(size) for size in distances.sizes)

    def condition(self, points: Points, scores: Array) -> None:
        """Take the best 15% of ``points``, at least 2 and at most 25, as the good ones."""
        order = np.argsort(scores, kind="stable")
        good = min(max(2, math.ceil(_GOOD_SHARE * len(scores))), _GOOD_MOST)
        self._good, self._rest = points[order[:good]], points[order[good:]]

    def gain(self, candidates: Points) -> Array:
        """The criterion, one a candidate: higher is better."""
        return self._density(candidates, self._good) - self._density(candidates, self._rest)

    def _density(self, candidates: Points, centres: Points) -> Array:
        terms = np.full((len(candidates), len(centres) + 1), self._uniform)
        terms[:, 1:] = 0.0
        for p, kernel in enumerate(self._kernels):
            terms[:, 1:] += kernel[centres[:, p]][:, candidates[:, p]].T
        top = terms.max(1)
        return np.asarray(top + np.log(np.exp(terms - top[:, None]).sum(1) / (len(centres) + 1)))


def _kernel(size: int, ordered: bool) -> Array:
    """Log probabilities ``[centre, value]`` of one parameter; each row sums to 1 before the logarithm."""
    if ordered and size > 1:
        grid = np.arange(size) / (size - 1)
        near = np.exp(-np.abs(grid[:, None] - grid[None, :]) / max(_BANDWIDTH, 0.5 / (size - 1)))
        near /= near.sum(1, keepdims=True)
    else:
        near = 0.7 * np.eye(size) + 0.3 / size
    return np.asarray(np.log(0.9 * near + 0.1 / size))
