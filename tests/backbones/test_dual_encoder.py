"""What is special to the two-tower encoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import backbones
from efficient_attn.errors import UserError
from tests.backbones.test_contract import OPTIONS, SMALL, TOKENS, batch, logits, model

PAIR = OPTIONS["dual_encoder"].source


def linear(layer, x):
    return x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...], np.float64)


def tower(made, tokens):
    """What one text is pooled to, by the formula."""
    x, valid = (np.asarray(out, np.float64) for out in made.read(jnp.asarray(tokens), rngs=None))
    if made.config.pool == "cls":
        return x[:, 0]
    return (x * valid[..., None]).sum(1) / np.maximum(valid.sum(1, keepdims=True), 1)


@pytest.mark.parametrize(
    ("interaction", "pool"), [("nli", "mean"), ("concat", "mean"), ("nli", "cls")]
)
def test_it_is_its_formula_on_two_towers_of_the_same_weights(interaction, pool):
    made = model("dual_encoder", "softmax", interaction=interaction, pool=pool)
    pairs = np.asarray(batch(PAIR)[0])
    a, b = (tower(made, pairs[:, i]) for i in range(2))
    features = [a, b, a * b, a - b] if interaction == "nli" else [a, b]
    hidden = np.maximum(linear(made.first, np.concatenate(features, axis=1)), 0)
    expected = linear(made.last, np.maximum(linear(made.second, hidden), 0))
    assert hidden.shape[1] == 64 and made.second.kernel[...].shape == (64, 32)
    np.testing.assert_allclose(logits(made, jnp.asarray(pairs)), expected, rtol=1e-4, atol=1e-5)


def test_the_towers_are_an_encoder_and_hold_its_weights_once():
    """The encoder of the same seed has the same embedding, positions and blocks."""
    dual, single = model("dual_encoder", "softmax"), model("encoder", "softmax")
    for name in ("embed", "place", "stack"):
        ours, theirs = (jax.tree.leaves(nnx.state(getattr(made, name))) for made in (dual, single))
        assert ours
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(x, y)

    def size(made):
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(made, nnx.Param)))

    head = (64 * 64 + 64) + (64 * 32 + 32) + (32 * 2 + 2)
    classifier = 16 * TOKENS.classes + TOKENS.classes
    assert size(dual) - size(single) == head - classifier


def test_a_text_does_not_change_what_is_read_of_the_other():
    made = model("dual_encoder", "softmax", interaction="concat")
    pairs = np.array(batch(PAIR)[0])
    before = made.read(jnp.asarray(pairs.reshape(-1, 24)), rngs=None)[0]
    pairs[:, 1] = pairs[:, 1] % 10 + 1
    after = made.read(jnp.asarray(pairs.reshape(-1, 24)), rngs=None)[0]
    np.testing.assert_array_equal(before[::2], after[::2])
    assert np.abs(before[1::2] - after[1::2]).max() > 0.1


def test_padding_is_of_no_consequence_and_a_text_of_nothing_else_gives_numbers():
    made = model("dual_encoder", "softmax")
    pairs = np.array(batch(PAIR)[0])
    pairs[..., 15:] = 0
    short = logits(made, jnp.asarray(pairs[..., :15]))
    np.testing.assert_allclose(logits(made, jnp.asarray(pairs)), short, atol=2e-5)
    pairs[0, 1] = 0
    pairs[1] = 0
    assert np.isfinite(logits(made, jnp.asarray(pairs))).all()


def test_what_it_cannot_read_is_refused():
    create = lambda source, **options: backbones.create(  # noqa: E731
        "dual_encoder", SMALL | options, attention="softmax", source=source, rngs=nnx.Rngs(0)
    )
    with pytest.raises(UserError, match="reads pairs of texts, not tokens; .*'encoder'"):
        create(TOKENS)
    with pytest.raises(UserError, match="interaction must be one of 'nli', 'concat', not 'max'"):
        create(PAIR, interaction="max")
    with pytest.raises(ValueError, match="25 tokens, but the encoder was built for 24"):
        model("dual_encoder", "softmax")(jnp.ones((1, 2, 25), jnp.int32), rngs=None)
