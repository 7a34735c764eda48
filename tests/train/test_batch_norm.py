"""Batch norm in the step: whose statistics, and where they live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn.layers.norm import BatchNorm
from efficient_attn.train.program import compile_for
from tests.train.stub import batch, equal, experiment


class Normed(nnx.Module):
    """[B, 6] -> [B, 3] through batch norm."""

    def __init__(self, *, rngs):
        # Without a bias, whose gradient is 0 but for rounding, which adamw would blow up.
        self.first = nnx.Linear(6, 16, use_bias=False, rngs=rngs)
        self.norm = BatchNorm(16, dtype=jnp.float32, rngs=rngs)
        self.second = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, inputs, *, rngs):
        return self.second(nnx.relu(self.norm(self.first(inputs), rngs=rngs)))


def program(devices=1, **train):
    return compile_for(lambda rngs: Normed(rngs=rngs), experiment(**train), devices=devices)


def train(built, steps=4):
    state = built.init()
    for step in range(steps):
        state, _ = built.step(state, batch(step))
    return state


def statistics(state, name="rest"):
    return state[name]["norm"]["norm"]["mean"], state[name]["norm"]["norm"]["var"]


@pytest.fixture(scope="module")
def one():
    return program()


def test_running_statistics_follow_those_of_the_batches_by_a_tenth(one):
    state, mean, var = one.init(), np.zeros(16), np.ones(16)
    for step in range(3):
        x = batch(step)["inputs"] @ np.asarray(state["params"]["first"]["kernel"])
        mean, var = 0.9 * mean + 0.1 * x.mean(0), 0.9 * var + 0.1 * x.var(0)
        state, _ = one.step(state, batch(step))
        np.testing.assert_allclose(statistics(state)[0], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(statistics(state)[1], var, rtol=1e-4, atol=1e-5)


def test_eight_devices_have_the_statistics_of_the_whole_batch(one):
    alone, eight = train(one), train(program(devices=8))
    equal(eight["rest"], alone["rest"], rtol=1e-4, atol=1e-6)
    equal(eight["params"], alone["params"], rtol=1e-4, atol=1e-6)
    split = train(program(devices=8, sharding="fsdp"))
    equal(split["rest"], alone["rest"], rtol=1e-4, atol=1e-6)


def test_micro_batches_are_each_normalised_by_their_own_and_all_are_followed():
    built = program(accumulate=2)
    state = built.init()
    x = batch()["inputs"] @ np.asarray(state["params"]["first"]["kernel"])
    state, _ = built.step(state, batch())
    mean = np.zeros(16)
    for part in (x[::2], x[1::2]):
        mean = 0.9 * mean + 0.1 * part.mean(0)
    np.testing.assert_allclose(statistics(state)[0], mean, rtol=1e-4, atol=1e-5)


def test_evaluation_normalises_by_the_running_ones_whatever_the_batch(one):
    state = train(one)
    whole = np.asarray(one.predict(state, batch())["loss"])
    turned = {name: value[::-1] for name, value in batch().items()}
    np.testing.assert_allclose(one.predict(state, turned)["loss"][::-1], whole, rtol=1e-6)
    other = state | {"rest": jax.tree.map(lambda x: x + 1, state["rest"])}
    assert not np.allclose(one.predict(other, batch())["loss"], whole)


def test_the_moving_average_has_statistics_of_its_own():
    built = program(ema=0.9)
    state = built.init()
    means = [np.asarray(statistics(state)[0])]
    expected = means[0]
    for step in range(5):
        state, _ = built.step(state, batch(step))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * np.asarray(statistics(state)[0])
    np.testing.assert_allclose(statistics(state, "ema")[0], expected, rtol=1e-5, atol=1e-7)
    used = nnx.to_pure_dict(nnx.state(built.evaluated(state)))
    equal(used["norm"]["norm"]["mean"], statistics(state, "ema")[0])
    equal(used["first"]["kernel"], state["ema"]["first"]["kernel"])


def test_a_loss_that_is_not_finite_leaves_the_statistics(one):
    state = train(one, 2)
    good = jax.tree.map(jnp.copy, state["rest"])
    poisoned = batch()
    poisoned["inputs"][3, 2] = np.nan
    state, _ = one.step(state, poisoned)
    equal(state["rest"], good)


def test_statistics_are_no_parameters(one):
    assert one.parameters == 6 * 16 + 16 * 2 + 16 * 3 + 3
