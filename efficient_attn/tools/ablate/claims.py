"""What papers mostly claim, as predicates for `Claim.holds`.

    Claim("linear attention is worse", below("accuracy", "linear", "softmax"))
    Claim("the gain grows with the length", rises("length", "gain", {"expression": "linear"}))

They raise `Missing` where what they compare has no result.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from efficient_attn.tools.ablate.results import Missing, Results

Predicate = Callable[[Results], bool]
Where = Mapping[str, Any]
"""Options of the rows that make a curve, as in `Results.labels`."""


def below(metric: str, *labels: str) -> Predicate:
    """Whether the mean of each of these rows is below the next one's."""
    return lambda results: all(a < b for a, b in pairwise(_means(results, metric, labels)))


def above(metric: str, *labels: str) -> Predicate:
    """Whether the mean of each of these rows is above the next one's."""
    return lambda results: all(a > b for a, b in pairwise(_means(results, metric, labels)))


def not_below(metric: str, *labels: str) -> Predicate:
    """Whether the mean of each of these rows is at least the next one's."""
    return lambda results: all(a >= b for a, b in pairwise(_means(results, metric, labels)))


def rises(x: str, metric: str, *curves: Where) -> Predicate:
    """Whether the metric rises with the option x from row to row of each of these curves."""

    def holds(results: Results) -> bool:
        found = [_curve(results, x, metric, where) for where in curves]
        return all(a < b for curve in found for a, b in pairwise(curve.values()))

    return holds


def under(x: str, metric: str, *curves: Where) -> Predicate:
    """Whether each of these curves over the option x is below the next wherever both have rows."""

    def holds(results: Results) -> bool:
        found = [_curve(results, x, metric, where) for where in curves]
        return all(low[at] < high[at] for low, high in pairwise(found) for at in _shared(low, high))

    return holds


def _means(results: Results, metric: str, labels: tuple[str, ...]) -> list[float]:
    return [results.mean(label, metric) for label in labels]


def _curve(results: Results, x: str, metric: str, where: Where) -> dict[Any, float]:
    """The metric by x, which rises."""
    return dict(zip(*(side.tolist() for side in results.curve(x, metric, where)), strict=True))


def _shared(low: dict[Any, float], high: dict[Any, float]) -> set[Any]:
    both = low.keys() & high.keys()
    if not both:
        raise Missing("two curves that are compared have no x in common")
    return both
