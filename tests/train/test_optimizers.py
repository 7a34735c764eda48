"""Schedules against their formulas, the weight-decay mask, each update by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.train import optimizers
from efficient_attn.train.config import Optimizer


def rates(count, *, steps=100, **options):
    schedule = optimizers.schedule(Optimizer(**options), steps=steps)
    return np.array([float(schedule(i)) for i in range(count)])


def test_cosine():
    t = np.arange(1, 101)
    expected = np.where(t < 10, 0.3 * t / 10, 0.15 * (1 + np.cos(np.pi * (t - 10) / 90)))
    found = rates(100, learning_rate=0.3, warmup=10, schedule="cosine")
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_rsqrt_is_that_of_long_range_arena():
    t = np.arange(1, 201)
    expected = 0.05 * np.minimum(1, t / 50) / np.sqrt(np.maximum(t, 50))
    found = rates(200, learning_rate=0.05, warmup=50, schedule="rsqrt")
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_constant():
    expected = 0.2 * np.minimum(1, np.arange(1, 21) / 8)
    found = rates(20, learning_rate=0.2, warmup=8, schedule="constant")
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "rsqrt", "constant"])
def test_no_warmup_starts_at_the_peak(schedule):
    found = rates(3, learning_rate=0.2, warmup=0, schedule=schedule)
    np.testing.assert_allclose(found[0], 0.2, rtol=1e-3)
    assert np.isfinite(found).all()


def test_a_run_of_one_step_has_a_schedule():
    assert rates(1, steps=1, learning_rate=0.2, warmup=0, schedule="cosine") == pytest.approx(0.2)


PARAMS = {
    "dense": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full((3,), 2.0)},
    "heads": {"kernel": jnp.full((2, 2, 2), 2.0), "bias": jnp.full((2, 2), 2.0)},
    "norm": {"scale": jnp.full((3,), 2.0)},
}


def test_matrices():
    assert optimizers.matrices(PARAMS) == {
        "dense": {"kernel": True, "bias": False},
        "heads": {"kernel": True, "bias": False},
        "norm": {"scale": False},
    }


def test_a_learned_token_is_a_vector():
    """The class token [1, 1, E], unlike a table of positions [1, T, E]."""
    found = optimizers.matrices({"cls": jnp.ones((1, 1, 4)), "table": jnp.ones((1, 5, 4))})
    assert found == {"cls": False, "table": True}


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd"])
def test_weight_decay_takes_its_share_of_matrices_only(name):
    """Without a gradient the update is -rate * decay * parameter on matrices and 0 elsewhere."""
    config = Optimizer(
        name=name, learning_rate=0.5, warmup=0, schedule="constant", weight_decay=0.1
    )
    optimizer = optimizers.create(config, steps=10)
    zeros = {k: {n: jnp.zeros_like(v) for n, v in leaves.items()} for k, leaves in PARAMS.items()}
    updates, _ = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["dense"]["kernel"], -0.5 * 0.1 * 2.0, rtol=1e-6)
    np.testing.assert_allclose(updates["heads"]["kernel"], -0.5 * 0.1 * 2.0, rtol=1e-6)
    for leaves, leaf in (("dense", "bias"), ("heads", "bias"), ("norm", "scale")):
        np.testing.assert_array_equal(updates[leaves][leaf], 0.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("adamw", 1.0), ("lion", 1.0), ("sgd", 0.3), ("adafactor", 2.0)],
)
def test_first_update(name, expected):
    """adam and lion move by the sign, sgd by the gradient, adafactor by the parameter's size."""
    config = Optimizer(
        name=name, learning_rate=0.1, warmup=0, schedule="constant", weight_decay=0.0, clip=0.0
    )
    optimizer = optimizers.create(config, steps=10)
    grads = {"kernel": jnp.full((2, 3), 0.3)}
    params = {"kernel": jnp.full((2, 3), 2.0)}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * expected, rtol=1e-5)


def test_clip_bounds_the_global_norm():
    config = Optimizer(
        name="sgd", learning_rate=1.0, warmup=0, schedule="constant", weight_decay=0.0, clip=0.5
    )
    optimizer = optimizers.create(config, steps=10)
    grads = {"a": jnp.full((4,), 3.0), "b": jnp.full((4,), 4.0)}
    updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
    np.testing.assert_allclose(updates["a"], -3.0 * 0.5 / 10.0, rtol=1e-6)
    np.testing.assert_allclose(updates["b"], -4.0 * 0.5 / 10.0, rtol=1e-6)
