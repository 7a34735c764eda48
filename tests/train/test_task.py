"""Classification: the objective and the metrics against their formulas."""

import jax.numpy as jnp
import numpy as np
import optax

from efficient_attn.train.task import Classification

LOGITS = jnp.array([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0], [1.0, 1.5, -2.0]])
LABEL = jnp.array([0, 2, 1])


def log_softmax():
    x = np.asarray(LOGITS, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_label_smoothing_spreads_over_all_classes():
    target = 0.7 * np.eye(3)[np.asarray(LABEL)] + 0.3 / 3
    expected = -(target * log_softmax()).sum(-1)
    found = Classification(label_smoothing=0.3).objective(LOGITS, LABEL)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_without_smoothing_it_is_optax_cross_entropy():
    expected = optax.softmax_cross_entropy_with_integer_labels(LOGITS, LABEL)
    np.testing.assert_allclose(Classification().objective(LOGITS, LABEL), expected, rtol=1e-6)


def test_metrics_do_without_smoothing():
    found = Classification(label_smoothing=0.3).metrics(LOGITS, LABEL)
    np.testing.assert_allclose(found["loss"], -log_softmax()[np.arange(3), LABEL], rtol=1e-6)
    np.testing.assert_array_equal(found["accuracy"], [1.0, 0.0, 1.0])
