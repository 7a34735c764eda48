"""Mean squared errors of FAVOR+'s estimates of the softmax kernel, in closed form.

SM(x, y) = exp(<x, y>) is estimated with m rows w of a projection, each N(0, I) in D dimensions:
independent ("iid"), or in blocks of D orthogonal ones ("orthogonal"). Choromanski et al. 2021,
arXiv 2009.14794, lemma 2 and theorem 2; the exact error of orthogonal rows, which theorem 2 bounds,
is derived at `covariance`.
"""

import math
from typing import Literal

import numpy as np

from kernels.favor_attention import FavorMap

Rows = Literal["iid", "orthogonal"]


def mean_squared_error(
    x: np.ndarray, y: np.ndarray, *, features: int, feature_map: FavorMap, projection: Rows
) -> float:
    """E (estimate - SM(x, y))^2 with m = `features` rows.

    For "iid" lemma 2, and a half of its (1 - exp(-|x+y|^2)) for "hyperbolic" (lemma 2, the last
    line). Orthogonal rows add the covariance of each pair of rows of one block.
    """
    scale, square = _parts(x, y, feature_map)
    error = scale**2 * variance(square, feature_map) / features
    if projection == "iid":
        return error
    alternating = feature_map == "trigonometric"
    shared = covariance(square, len(x), alternating=alternating)
    whole, rest = divmod(features, len(x))
    pairs = whole * len(x) * (len(x) - 1) + rest * (rest - 1)
    return error + scale**2 * pairs * shared / features**2


def variance(square: float, feature_map: FavorMap) -> float:
    """Of f(w), w one row of N(0, I) and |z|^2 = `square`.

    f(w) = exp(<w, z>) with z = x + y, cosh(<w, z>) with the same z, cos(<w, z>) with z = x - y.
    """
    if feature_map == "trigonometric":
        return (1 - math.exp(-square)) ** 2 / 2
    whole = math.exp(2 * square) * (1 - math.exp(-square))
    return whole if feature_map == "positive" else whole * (1 - math.exp(-square)) / 2


def covariance(square: float, dim: int, *, alternating: bool) -> float:
    """Of f(w), f(w') for two rows of one orthogonal block, at most 0.

    Their components along z are those of a random unit vector, times independent norms:

        sum over a, b >= 1 of (s/2)^(a+b) / (a! b!) (B_ab - 1),
        B_ab = (D/2)_a (D/2)_b / (D/2)_(a+b),    s = |z|^2, -|z|^2 for cos

    with (c)_n rising factorials, from the moments of the norm and of the Dirichlet distribution.
    The term a = b = 1 is what theorem 2 bounds with. Odd powers vanish, so that exp and cosh agree.
    """
    half, terms = dim / 2, range(1, 40 + int(4 * square))
    sign = -1.0 if alternating else 1.0
    total = 0.0
    for a in terms:
        for b in terms:
            ratio = math.exp(
                2 * -math.lgamma(half) + math.lgamma(half + a) + math.lgamma(half + b)
                + math.lgamma(half) - math.lgamma(half + a + b)
            )  # fmt: skip
            size = (a + b) * math.log(square / 2) if square else -math.inf
            size -= math.lgamma(a + 1) + math.lgamma(b + 1)
            total += sign ** (a + b) * math.exp(size) * (ratio - 1)
    return total


def orthogonal_bound(x: np.ndarray, y: np.ndarray, *, features: int) -> float:
    """Theorem 2: what the error of positive orthogonal features is at most, m <= D.

    MSE(iid) - 2 (m - 1) / (m (D + 2)) (SM(x, y) - exp(-(|x|^2 + |y|^2) / 2))^2.
    """
    assert features <= len(x)
    independent = mean_squared_error(
        x, y, features=features, feature_map="positive", projection="iid"
    )
    kernel, squares = math.exp(float(x @ y)), float(x @ x + y @ y)
    gap = 2 * (features - 1) / (features * (len(x) + 2))
    return independent - gap * (kernel - math.exp(-squares / 2)) ** 2


def _parts(x: np.ndarray, y: np.ndarray, feature_map: FavorMap) -> tuple[float, float]:
    """What multiplies the mean of f(w), and |z|^2."""
    squares = float(x @ x + y @ y)
    if feature_map == "trigonometric":
        return math.exp(squares / 2), float(np.sum((x - y) ** 2))
    return math.exp(-squares / 2), float(np.sum((x + y) ** 2))
