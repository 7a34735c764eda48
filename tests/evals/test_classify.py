"""Metrics of a split: over the real examples only, whatever the batch size."""

import jax
import numpy as np
import pytest

from efficient_attn.data.sources import Arrays
from efficient_attn.evals import classify
from tests.train.stub import batch, experiment, program


@pytest.fixture(scope="module")
def source():
    data = batch(size=45)
    return Arrays(data["inputs"], data["label"], lambda x: x)


def by_hand(state, data):
    x = np.asarray(data["inputs"], np.float64)
    first, second = (jax.tree.map(np.float64, state["params"]["layers"][i]) for i in (0, 1))
    hidden = np.asarray(jax.nn.gelu(x @ first["kernel"] + first["bias"]))
    logits = hidden @ second["kernel"] + second["bias"]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = -log_p[np.arange(len(x)), data["label"]]
    return {
        "accuracy": np.mean(logits.argmax(-1) == data["label"]),
        "loss": loss.mean(),
        "probability": np.exp(log_p).max(-1),
    }


@pytest.mark.parametrize("size", [1, 7, 16, 45, 64])
def test_the_batch_size_does_not_matter(source, size):
    built = program(experiment(eval_batch_size=size))
    state = built.init()
    found = classify.predict(built, state, source, batch_size=size)
    expected = by_hand(state, batch(size=45))
    assert {len(values) for values in found.values()} == {45}
    np.testing.assert_array_equal(found["label"], batch(size=45)["label"])
    np.testing.assert_allclose(found["probability"], expected["probability"], rtol=1e-5)
    metrics = classify.summarize(found)
    assert metrics["accuracy"] == expected["accuracy"]
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)


def test_limit_takes_the_first(source):
    built = program(experiment())
    state = built.init()
    whole = classify.predict(built, state, source, batch_size=16)
    part = classify.predict(built, state, source, batch_size=16, limit=20)
    np.testing.assert_array_equal(part["loss"], whole["loss"][:20])
    assert classify.summarize(part)["loss"] == np.mean(whole["loss"][:20], dtype=np.float64)


def test_sums_are_in_float64():
    outputs = {"loss": np.float32([1e8, 1.0, 1.0, 1.0]), "accuracy": np.ones(4, np.float32)}
    assert classify.summarize(outputs) == {"accuracy": 1.0, "loss": (1e8 + 3) / 4}
