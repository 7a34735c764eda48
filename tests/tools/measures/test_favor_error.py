"""FAVOR+'s errors against their closed forms, and the closed forms against integrals."""

import math

import numpy as np
import pytest

from efficient_attn.tools.measures import favor_theory as theory
from efficient_attn.tools.measures.favor_error import measure, pair

MAPS = ("positive", "hyperbolic", "trigonometric")
FUNCTIONS = {"positive": np.exp, "hyperbolic": np.cosh, "trigonometric": np.cos}


@pytest.mark.parametrize("kind", MAPS)
def test_the_variance_is_that_of_an_integral(kind):
    at, weights = np.polynomial.hermite_e.hermegauss(80)
    weights, f = weights / weights.sum(), FUNCTIONS[kind](0.7 * at)
    expected = weights @ f**2 - (weights @ f) ** 2
    assert theory.variance(0.49, kind) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", MAPS)
def test_the_covariance_of_orthogonal_rows_is_that_of_an_integral(kind):
    """In two dimensions: (r cos t, r' sin t), t uniform, r and r' Rayleigh."""
    r = np.linspace(0, 12, 8001)
    density = r * np.exp(-(r**2) / 2) * (r[1] - r[0])
    t = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    means = [
        (FUNCTIONS[kind](0.7 * np.outer(u, r)) * density).sum(1) for u in (np.cos(t), np.sin(t))
    ]
    mean = math.exp(0.49 / 2 * (-1 if kind == "trigonometric" else 1))
    expected = np.mean(means[0] * means[1]) - mean**2
    found = theory.covariance(0.49, 2, alternating=kind == "trigonometric")
    assert found == pytest.approx(expected, rel=1e-4)


def test_lemma_2_as_printed():
    x, y = pair(5, 0.8, 0.3)
    kernel, plus, minus = math.exp(x @ y), np.sum((x + y) ** 2), np.sum((x - y) ** 2)
    positive = math.exp(plus) * kernel**2 * (1 - math.exp(-plus)) / 7
    printed = {
        "positive": positive,
        "hyperbolic": (1 - math.exp(-plus)) / 2 * positive,
        "trigonometric": math.exp(plus) * kernel**-2 * (1 - math.exp(-minus)) ** 2 / 14,
    }
    for kind, value in printed.items():
        found = theory.mean_squared_error(x, y, features=7, feature_map=kind, projection="iid")
        assert found == pytest.approx(value)


def test_theorem_2_bounds_the_exact_error_and_is_nearly_it_for_short_vectors():
    for norm, least in ((1.0, 0.3), (0.1, 0.97)):
        x, y = pair(16, norm, 0.5)
        how = {"features": 16, "feature_map": "positive"}
        iid, exact = (
            theory.mean_squared_error(x, y, projection=rows, **how)
            for rows in ("iid", "orthogonal")
        )
        bound = theory.orthogonal_bound(x, y, features=16)
        assert exact <= bound < iid
        assert (iid - bound) / (iid - exact) > least


def test_one_orthogonal_row_is_an_independent_one():
    x, y = pair(4, 1.0, 0.0)
    for features, equal in ((1, True), (2, False)):
        both = [
            theory.mean_squared_error(
                x, y, features=features, feature_map="positive", projection=rows
            )
            for rows in ("iid", "orthogonal")
        ]
        assert (both[0] == pytest.approx(both[1])) is equal


@pytest.mark.slow
@pytest.mark.parametrize("projection", ["iid", "orthogonal"])
@pytest.mark.parametrize("kind", MAPS)
def test_what_is_drawn_agrees_with_the_closed_form(kind, projection):
    found = measure(
        seed=1, features=6, feature_map=kind, projection=projection, dim=4, length=32, samples=2,
        scale=1.0, norm=0.8, cosine=-0.5, rows=120_000,
    )  # fmt: skip
    assert abs(found["z"]) < 4
    assert found["output_error"] > 0
    assert found["kernel_deviation"] < 0.05 * found["kernel_error"]


def test_one_call_has_all_the_numbers():
    found = measure(
        seed=1, features=3, feature_map="positive", projection="orthogonal", dim=4, length=16,
        samples=2, scale=1.0, norm=0.5, cosine=0.0, rows=1200,
    )  # fmt: skip
    assert abs(found["z"]) < 4 and found["theorem_2"] >= found["closed_form"]
