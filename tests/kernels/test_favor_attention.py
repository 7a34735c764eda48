"""FAVOR+ in one op is its features in linear attention; what it estimates is tested with Performer.

`tests/attention/test_performer.py` has the closed forms of lemma 2 and theorem 2.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import (
    Mask,
    causal_favor_attention,
    favor_attention,
    favor_features,
    linear_attention_init,
    linear_attention_step,
    reference,
)
from tests.kernels.compare import MASKS, agree, arrays, both, mask_of

LENGTH, HEADS, DIM, ROWS = 37, 2, 8, 12
W = arrays(seed=3, w=(ROWS, DIM))["w"]
KINDS = ("positive", "hyperbolic", "trigonometric")


def problem(scale=1.0):
    shape = (4, LENGTH, HEADS, DIM)
    given = arrays(q=shape, k=shape, v=shape)
    return {name: x * (1.0 if name == "v" else scale) for name, x in given.items()}


def by_features(q, k, v, *, mask, kind):
    """The formula: features of everything, written out, exponents as they are."""
    w = jnp.asarray(W, q.dtype)

    def phi(x):
        x = x * DIM**-0.25
        logits, offset = x @ w.T, jnp.sum(x * x, -1, keepdims=True) / 2
        if kind == "trigonometric":
            return jnp.concatenate([jnp.sin(logits), jnp.cos(logits)], -1) * jnp.exp(offset)
        if kind == "hyperbolic":
            logits = jnp.concatenate([logits, -logits], -1)
        return jnp.exp(logits - offset)

    return reference.linear_attention(phi(q), phi(k), v, mask=mask)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", ["positive", "hyperbolic"])
def test_outputs_and_gradients_are_the_formula_s(name, kind):
    op = lambda q, k, v, **rest: favor_attention(  # noqa: E731
        q, k, v, jnp.asarray(W), feature_map=kind, chunk=8, **rest
    )
    expected = lambda q, k, v, mask: by_features(q, k, v, mask=mask, kind=kind)  # noqa: E731
    agree(both(op, expected, problem(), mask_of(name, LENGTH)))


def test_trigonometric_features_of_like_queries_and_keys():
    """Where queries equal keys the estimate is of one sign; elsewhere its normaliser can vanish."""
    given = problem(0.3)
    given["k"] = given["q"]
    op = lambda q, k, v, **rest: favor_attention(  # noqa: E731
        q, k, v, jnp.asarray(W), feature_map="trigonometric", chunk=8, **rest
    )
    expected = lambda q, k, v, mask: by_features(q, k, v, mask=mask, kind="trigonometric")  # noqa: E731
    agree(both(op, expected, given, mask_of("causal", LENGTH)), forward=1e-4, backward=1e-3)


def test_only_a_learned_projection_has_a_gradient():
    given = {name: jnp.asarray(x) for name, x in problem().items()}

    def loss(w, learn):
        out = favor_attention(**given, projection=w, learn_projection=learn)
        return jnp.sum(jnp.sin(out))

    gradient = jax.grad(loss)
    assert (gradient(jnp.asarray(W), False) == 0).all()
    learned = gradient(jnp.asarray(W), True)
    step = 1e-2 * arrays(seed=5, w=W.shape)["w"]
    slope = (loss(jnp.asarray(W + step), True) - loss(jnp.asarray(W - step), True)) / 2
    np.testing.assert_allclose(np.sum(learned * step), slope, rtol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_in_two_parts_and_token_by_token(kind):
    q, k, v = (jnp.asarray(x) for x in problem().values())
    made = {"projection": jnp.asarray(W), "feature_map": kind}
    rows = ROWS * (1 if kind == "positive" else 2)
    empty = linear_attention_init(len(q), HEADS, rows, DIM)
    whole, last = causal_favor_attention(q, k, v, state=empty, chunk=8, **made)
    np.testing.assert_allclose(
        favor_attention(q, k, v, mask=Mask(causal=True), **made), whole, rtol=1e-3, atol=1e-4
    )
    state, parts = empty, []
    for a, b in ((0, 10), (10, 30)):
        part, state = causal_favor_attention(q[:, a:b], k[:, a:b], v[:, a:b], state=state, **made)
        parts.append(part)
    phi = lambda x: favor_features(x, jnp.asarray(W), feature_map=kind)  # noqa: E731
    for t in range(30, LENGTH):
        (keys, scale), (queries, _) = phi(k[:, t : t + 1]), phi(q[:, t : t + 1])
        part, state = linear_attention_step(queries, keys, v[:, t : t + 1], state, log_scale=scale)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(state.sums, last.sums, rtol=1e-3, atol=1e-4)


def test_a_mask_that_looks_ahead_is_refused():
    q, k, v = (jnp.asarray(x) for x in problem().values())
    state = linear_attention_init(len(q), HEADS, ROWS, DIM)
    with pytest.raises(ValueError, match="takes a causal mask"):
        causal_favor_attention(q, k, v, jnp.asarray(W), state, mask=Mask())
