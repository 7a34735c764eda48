"""What is special to the token encoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import attention, backbones
from efficient_attn.errors import UserError
from tests import support
from tests.backbones.test_contract import (
    IMAGE,
    MASKED,
    SMALL,
    TOKENS,
    batch,
    logits,
    model,
    taken,
    train,
)


def create(attention="softmax", source=TOKENS, name="encoder", **options):
    return backbones.create(
        name, SMALL | options, attention=attention, source=source, rngs=nnx.Rngs(0)
    )


@pytest.mark.parametrize("expression", taken("encoder"))
def test_padding_is_of_no_consequence(expression):
    """Neither how much there is of it, nor what stands for it in the embedding.

    Shorter by its padding, a batch gives the same; the learned positions are the first ones.
    """
    made = create(expression, depth=1)
    tokens = np.array(batch(TOKENS)[0])
    tokens[:, 15:] = 0
    graph, state = nnx.split(made)
    call = jax.jit(lambda s, x: nnx.merge(graph, s)(x, rngs=None), compiler_options=support.fast())
    before = np.asarray(call(state, tokens))
    np.testing.assert_allclose(call(state, tokens[:, :15]), before, atol=2e-5)
    table = made.embed.embedding
    table[...] = table[...].at[0].set(1e3)
    np.testing.assert_array_equal(call(nnx.state(made), tokens), before)
    assert np.abs(np.asarray(table[...])).max() == 1e3


def test_estimates_are_watched_through_reversible_residuals_as_well():
    inputs, _ = batch(TOKENS)
    found = {
        residual: attention.diagnose(create("performer(features=8)", residual=residual), inputs)
        for residual in ("add", "reversible")
    }
    assert found["add"].keys() == found["reversible"].keys() != set()


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_text_of_nothing_but_padding_gives_numbers(pool):
    made = model("encoder", "softmax", pool=pool)
    assert np.isfinite(logits(made, jnp.zeros((2, 24), jnp.int32))).all()


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary", "alibi", "none"])
def test_the_order_of_words_matters_where_there_are_positions(positions):
    made = model("encoder", "softmax", positions=positions)
    tokens = np.tile(np.arange(1, 9, dtype=np.int32), (1, 3))
    mixed = np.random.default_rng(0).permutation(tokens[0])[None]
    moved = np.abs(logits(made, jnp.asarray(tokens)) - logits(made, jnp.asarray(mixed))).max()
    assert moved < 1e-5 if positions == "none" else moved > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "linformer(rank=25)"}, "rank=25 exceeds the sequence length 24"),
        ({"attention": "softmax*3"}, "names 3 layers, the model has 2"),
        ({"heads": 3}, "heads=3 does not divide width=16"),
        ({"heads": 16, "positions": "rotary"}, "rotary positions need an even head width, not 1"),
        ({"heads": 16, "attention": "lsra"}, "heads=16 does not divide half of width=16"),
        ({"attention": "performer", "positions": "alibi"}, "performer does not support alibi"),
        ({"attention": "softmax(kv_heads=3)"}, "kv_heads=3 does not divide heads=2"),
        ({"dropout": 1.0}, r"dropout=1.0 is not in \[0, 1\)"),
        ({"depth": 0}, "depth=0 must be positive"),
        ({"pool": "max"}, "pool must be one of 'mean', 'cls', not 'max'"),
        ({"dpeth": 3}, "unknown option of .*'dpeth'; did you mean 'depth'"),
        ({"source": IMAGE}, "reads tokens or masked tokens, not images; use model.name='vit', or"),
        ({"source": MASKED, "pool": "cls"}, "pool='cls' is for classification"),
        ({"drop_path": -0.1}, r"drop_path=-0.1 is not in \[0, 1\)"),
        ({"norm_type": "batch"}, "norm_type must be one of 'layernorm', 'rmsnorm', not 'batch'"),
        ({"name": "encodr"}, "unknown model 'encodr'; did you mean 'encoder'"),
    ],
    ids=str,
)
def test_what_cannot_be_built_says_why(options, message):
    with pytest.raises(UserError, match=message):
        create(**options)


def test_a_text_too_long_is_refused():
    with pytest.raises(ValueError, match="25 tokens, but the encoder was built for 24"):
        model("encoder", "softmax")(jnp.ones((1, 25), jnp.int32), rngs=None)


@pytest.mark.parametrize(("width", "heads"), [(18, 2), (10, 5)])
def test_odd_head_widths_work_without_rotary(width, heads):
    made = create(width=width, heads=heads, positions="sinusoidal")
    assert np.isfinite(logits(made, batch(TOKENS)[0])).all()


@pytest.mark.parametrize(
    "options", [{}, {"residual": "reversible", "mlp": "geglu", "norm_type": "rmsnorm"}], ids=str
)
def test_hidden_tokens_are_told_by_the_head_of_bert(options):
    """Dense, gelu, norm, the embedding's own table, a bias: no second table is learned."""
    made = create(source=MASKED, attention="performer(features=16)", **options)
    inputs, _ = batch(MASKED)
    head, seen = made.head, {}
    made.head = lambda x, table: seen.setdefault("x", x)  # what the head is given
    made(inputs, rngs=None)
    made.head = head
    table = np.asarray(made.embed.embedding[...])
    x = np.asarray(seen["x"] @ head.transform.kernel[...]) + head.transform.bias[...][None, None]
    y = np.asarray(head.norm(nnx.gelu(x)))
    bias = np.linspace(-1, 1, MASKED.vocab).astype(np.float32)
    head.bias[...] = jnp.asarray(bias)
    expected = y @ table.T + bias[None, None]
    np.testing.assert_allclose(logits(made, inputs), expected, rtol=1e-4, atol=1e-5)
    leaves = jax.tree.leaves(nnx.state(made, nnx.Param))
    assert sum(leaf.shape == (MASKED.vocab, 16) for leaf in leaves) == 1

    losses, _ = train(made, MASKED)
    assert losses[-1] < 0.8 * losses[0], losses[[0, -1]]
