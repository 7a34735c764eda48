"""Mixup and CutMix against their definitions, alone and in the step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efficient_attn.data import Augment
from efficient_attn.train import config as configs
from efficient_attn.train import mixing
from efficient_attn.train.program import compile_for
from tests.train.stub import equal, experiment

MIX = jax.jit(mixing.mix, static_argnums=2)


def batch(size=8, side=12):
    """Image i is i everywhere."""
    images = np.broadcast_to(np.arange(size)[:, None, None, None], (size, side, side, 3))
    label = (np.arange(size) % 5).astype(np.int32)
    return {
        "inputs": images.astype(np.float32),
        "label": label,
        "weight": np.ones(size, np.float32),
    }


def test_mixup_is_a_weighted_mean_of_two():
    shares = []
    for seed in range(50):
        found = MIX(batch(), jax.random.key(seed), Augment(mixup=0.8))
        share = np.asarray(found["share"])
        assert np.ptp(share) < 1e-6
        i = np.arange(8)
        expected = share * i + (1 - share) * (7 - i)
        np.testing.assert_allclose(found["inputs"][:, 3, 4, 1], expected, rtol=1e-5)
        np.testing.assert_allclose(np.ptp(found["inputs"], axis=(1, 2, 3)), 0, atol=1e-6)
        np.testing.assert_array_equal(found["partner"], batch()["label"][::-1])
        shares.append(share[0])
    expected = np.random.default_rng(0).beta(0.8, 0.8, 10_000).std()
    assert abs(np.mean(shares) - 0.5) < 0.15 and abs(np.std(shares) - expected) < 0.08


def test_cutmix_puts_in_one_rectangle_and_counts_it():
    areas = []
    for seed in range(50):
        found = MIX(batch(), jax.random.key(seed), Augment(cutmix=1.0))
        other = np.asarray(found["inputs"])[2, ..., 0] == 5
        rows, columns = np.flatnonzero(other.any(1)), np.flatnonzero(other.any(0))
        assert other.sum() == len(rows) * len(columns)
        np.testing.assert_allclose(found["share"], 1 - other.mean(), rtol=1e-5)
        assert (np.asarray(found["inputs"])[2, ..., 0][~other] == 2).all()
        areas.append(other.mean())
    assert max(areas) > 0.5 and np.std(areas) > 0.1


def test_with_both_they_take_turns():
    options = Augment(mixup=0.8, cutmix=1.0)
    found = [MIX(batch(), jax.random.key(s), options)["inputs"][2] for s in range(60)]
    plain = [np.ptp(np.asarray(image)) for image in found]
    assert 15 < sum(x < 1e-6 for x in plain) < 50


def test_an_example_that_does_not_count_is_mixed_with_none():
    data = batch()
    data["weight"][1] = 0
    found = MIX(data, jax.random.key(0), Augment(mixup=0.8))
    np.testing.assert_array_equal(np.asarray(found["inputs"])[[1, 6]], data["inputs"][[1, 6]])
    np.testing.assert_array_equal(np.asarray(found["share"])[[1, 6]], 1)
    assert not np.array_equal(found["inputs"][2], data["inputs"][2])


def test_both_labels_by_share_are_cross_entropy_with_soft_labels():
    found = MIX(batch(), jax.random.key(3), Augment(mixup=0.8))
    logits = jax.random.normal(jax.random.key(1), (8, 5))
    plain = optax.softmax_cross_entropy_with_integer_labels
    soft = found["share"][:, None] * jax.nn.one_hot(found["label"], 5)
    soft += (1 - found["share"][:, None]) * jax.nn.one_hot(found["partner"], 5)
    np.testing.assert_allclose(
        mixing.told(found, lambda label: plain(logits, label)),
        optax.softmax_cross_entropy(logits, soft), rtol=1e-5,
    )  # fmt: skip


class Flat(nnx.Module):
    """[B, 12, 12, 3] -> [B, 5]."""

    def __init__(self, *, rngs):
        self.linear = nnx.Linear(432, 5, rngs=rngs)

    def __call__(self, inputs, *, rngs):
        return self.linear(inputs.reshape(len(inputs), -1))


def run(steps=2, devices=1, **train):
    options = configs.to_dict(experiment(batch_size=8, eval_batch_size=8, **train))
    options["data"]["augment"] |= {"mixup": 0.8, "cutmix": 1.0}
    built = compile_for(lambda rngs: Flat(rngs=rngs), configs.resolve(options), devices=devices)
    state = built.init()
    for _ in range(steps):
        state, _ = built.step(state, batch())
    return state["params"]


def test_mixing_does_not_depend_on_micro_batches_or_devices():
    whole = run()
    equal(run(accumulate=4), whole, rtol=1e-4, atol=1e-6)
    equal(run(devices=8), whole, rtol=1e-4, atol=1e-6)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(whole))


@pytest.mark.parametrize("alpha", [0.8])
def test_the_step_sees_other_mixtures_each_time(alpha):
    keys = [jax.random.fold_in(jax.random.key(0), step) for step in range(2)]
    first, second = (MIX(batch(), key, Augment(mixup=alpha))["share"] for key in keys)
    assert not np.allclose(first, second)
