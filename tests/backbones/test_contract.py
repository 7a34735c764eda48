"""Every mechanism in every backbone: it learns, or is refused in a sentence that says why.

What is said of one is said of all: saved and loaded, recomputed, dropped out, in bfloat16.
"""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efficient_attn import attention, backbones
from efficient_attn.backbones import Input
from efficient_attn.errors import UserError
from efficient_attn.layers.rngs import make_rngs
from tests import support

TOKENS = Input(kind="tokens", shape=(24,), classes=3, vocab=11)
IMAGE = Input(kind="image", shape=(16, 16, 1), classes=3)
TEXT = Input(kind="text", shape=(24,), classes=11, vocab=11)
PAIR = Input(kind="pair", shape=(24,), classes=2, vocab=11)
MASKED = Input(kind="masked", shape=(24,), classes=11, vocab=11)
TRANSLATION = Input(kind="translation", shape=(12, 24), classes=11, vocab=11)
SMALL = {"depth": 2, "width": 16, "heads": 2, "dropout": 0.0}


class Entry(NamedTuple):
    """A tiny instance of a backbone, what it reads, and what it needs of `config.attention`."""

    options: dict[str, Any]
    source: Input
    needs: frozenset[str]


OPTIONS = {
    "encoder": Entry(SMALL, TOKENS, frozenset({"padding", "bidirectional"})),
    "vit": Entry(SMALL | {"patch": 4}, IMAGE, frozenset({"bidirectional"})),
    "dual_encoder": Entry(SMALL, PAIR, frozenset({"padding", "bidirectional"})),
    "causal_lm": Entry(SMALL, TEXT, frozenset({"padding", "causal"})),
    "encoder_decoder": Entry(
        SMALL, TRANSLATION, frozenset({"padding", "bidirectional", "causal", "decode"})
    ),
}
FIRSTS = list(support.FIRSTS)
HYBRIDS = [
    "performer(features=16)*2 + softmax",
    "lsra(attention=linformer(rank=4))",
    "linformer(rank=4, sharing='layerwise')",
]
CASES = [
    # a dual encoder is the encoder twice: some stand for all
    pytest.param(
        name, text, marks=[pytest.mark.slow] * (name == "dual_encoder" and text in FIRSTS[3:])
    )
    for name in OPTIONS
    for text in FIRSTS + HYBRIDS
]


def lacks(name, expression) -> frozenset[str]:
    """What the backbone needs and the mechanism of some layer has not."""
    return OPTIONS[name].needs - frozenset.intersection(
        *(c.mechanism.capabilities(c.config) for c in attention.pattern(expression, 3))
    )


def taken(name, expressions=FIRSTS):
    return [text for text in expressions if not lacks(name, text)]


def counted(source, size, random):
    """Rows that count up from somewhere and begin anew behind the last id, of uneven lengths."""
    length = source.shape[-1]
    rows = np.arange(length) + random.integers(0, source.vocab, (size, 1))
    tokens = rows % (source.vocab - 1) + 1
    lengths = random.integers(length // 2, length + 1, size)
    lengths[0] = length
    return np.where(np.arange(length) < lengths[:, None], tokens, 0)


def batch(source, size=8):
    """(inputs, labels) of the source's kind."""
    random = np.random.default_rng(0)
    labels = np.arange(size) % source.classes
    if source.kind == "image":
        inputs = random.standard_normal((size, *source.shape)).astype(np.float32)
    elif source.kind == "tokens":
        inputs = random.integers(1, source.vocab, (size, *source.shape))
        lengths = random.integers(4, source.shape[0] + 1, size)
        inputs[np.arange(source.shape[0]) >= lengths[:, None]] = 0
    elif source.kind == "pair":
        inputs = np.stack([counted(source, size, random) for _ in range(2)], axis=1)
    elif source.kind == "text":
        inputs = counted(source, size, random)
        labels = np.pad(inputs[:, 1:], [(0, 0), (0, 1)])
    elif source.kind == "masked":
        labels = counted(source, size, random)
        hidden = (random.random(labels.shape) < 0.3) & (labels > 0)
        inputs = np.where(hidden, source.vocab - 1, labels)
        labels = np.where(hidden, labels, 0)
    else:
        labels = counted(source, size, random)
        inputs = {
            "source": labels[:, : source.shape[0]],
            "target": np.pad(labels[:, :-1], [(0, 0), (1, 0)], constant_values=1),
        }
    fit = lambda x: x if x.dtype == np.float32 else x.astype(np.int32)  # noqa: E731
    return jax.tree.map(lambda x: jnp.asarray(fit(x)), (inputs, labels))


@functools.cache
def model(name, expression, seed=0, **options):
    small, source, _ = OPTIONS[name]
    depth = 3 if "*2" in expression else 2
    return backbones.create(
        name, small | {"depth": depth} | options, attention=expression, source=source,
        rngs=make_rngs(seed),
    )  # fmt: skip


def loss_of(graph, rest, inputs, labels):
    """Mean cross-entropy; where tokens are told, of those that are not padding."""

    def loss(params):
        logits = nnx.merge(graph, params, rest)(inputs, rngs=None)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return each.mean() if labels.ndim == 1 else each.mean(where=labels > 0)

    return loss


def train(made, source, steps=20):
    """(losses of some steps of Adam, the model after them)."""
    graph, params, rest = nnx.split(made, nnx.Param, ...)
    loss = loss_of(graph, rest, *batch(source))
    adam = optax.adam(1e-2)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = adam.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    def run(params):
        return jax.lax.scan(step, (params, adam.init(params)), length=steps)

    (params, _), losses = jax.jit(run, compiler_options=support.fast())(params)
    return np.asarray(losses), nnx.merge(graph, params, rest)


@functools.cache
def trained(name, expression):
    depth = {"depth": 1} if expression in FIRSTS else {}  # compiling is most of the time
    return train(model(name, expression, **depth), OPTIONS[name].source)


def logits(made, inputs):
    graph, state = nnx.split(made)
    call = jax.jit(lambda s, x: nnx.merge(graph, s)(x, rngs=None), compiler_options=support.fast())
    return np.asarray(call(state, inputs))


@pytest.mark.parametrize(("name", "expression"), CASES)
def test_it_learns_or_is_refused_in_a_sentence(name, expression):
    missing = lacks(name, expression)
    if name != "vit" and any(c.mechanism.on_grids for c in attention.pattern(expression, 3)):
        with pytest.raises(UserError, match="mixes the rows and columns of a picture.*model.pool"):
            model(name, expression)
        return
    if missing:
        with pytest.raises(UserError, match="does not support") as refused:
            model(name, expression)
        told = re.search(
            r"support (.*), which this model needs; (?:set .* or )?use one of: (.*)",
            str(refused.value),
        )
        assert told, refused.value
        assert set(told[1].split(", ")) <= missing
        for able in told[2].split(", "):
            cls = attention.MIXERS[able]
            assert cls.capabilities(cls.Config()) >= OPTIONS[name].needs
        return
    losses, _ = trained(name, expression)
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.7 * losses[0], losses[[0, -1]]


SAVED = [(n, e) for n in OPTIONS for e in taken(n, ["softmax", HYBRIDS[0], HYBRIDS[2]])]


@pytest.mark.parametrize(("name", "expression"), SAVED)
def test_saved_and_loaded_into_a_new_model_it_says_the_same(name, expression, tmp_path):
    made = model(name, expression, seed=1)
    inputs, _ = batch(OPTIONS[name].source)
    expected = logits(made, inputs)
    np.savez(tmp_path / "model.npz", *map(np.asarray, jax.tree.leaves(nnx.state(made))))

    other = model(name, expression, seed=7)
    graph, state = nnx.split(other)
    with np.load(tmp_path / "model.npz") as saved:
        leaves = [saved[key] for key in saved.files]
    loaded = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))
    np.testing.assert_array_equal(logits(loaded, inputs), expected)
    assert np.abs(logits(other, inputs) - expected).max() > 1e-3


RECOMPUTED = [e for e in FIRSTS if e.startswith(("performer", "lsra"))] + HYBRIDS[2:]


@pytest.mark.parametrize("expression", RECOMPUTED)
def test_remat_changes_neither_loss_nor_gradient(expression):
    inputs, labels = batch(TOKENS)
    found = []
    for remat in (False, True):
        graph, params, rest = nnx.split(model("encoder", expression, remat=remat), nnx.Param, ...)
        rest = nnx.to_pure_dict(rest)  # as the trainer holds it
        grad = jax.value_and_grad(loss_of(graph, rest, inputs, labels))
        found.append(jax.jit(grad, compiler_options=support.fast())(params))
        recomputed = "remat" in str(jax.make_jaxpr(grad)(params))
        assert recomputed or not remat
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_dropout_follows_the_rngs_of_the_call_alone(name):
    made = model(name, "softmax", dropout=0.5)
    inputs, _ = batch(OPTIONS[name].source)
    graph, state = nnx.split(made)

    def call(state, key):
        return nnx.merge(graph, state)(inputs, rngs=nnx.Rngs(dropout=key))

    call = jax.jit(call, compiler_options=support.fast())
    one, again, other = (np.asarray(call(state, jax.random.key(s))) for s in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3
    np.testing.assert_array_equal(logits(made, inputs), logits(made, inputs))


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("name", OPTIONS)
def test_logits_are_float32_under_bfloat16(name, norm):
    options, source, _ = OPTIONS[name]
    options = options | {"norm": norm}
    if name in ("encoder", "vit"):
        options |= {"pool": "cls" if norm == "pre" else "mean"}
    made = nnx.eval_shape(
        lambda: backbones.create(
            name, options, attention="performer(features=4)", source=source, dtype=jnp.bfloat16,
            rngs=make_rngs(0),
        )
    )  # fmt: skip
    graph, state = nnx.split(made)
    inputs, labels = batch(source)
    out = jax.eval_shape(lambda s: nnx.merge(graph, s)(inputs, rngs=None), state)
    assert (out.shape, out.dtype) == ((*labels.shape, source.classes), jnp.float32)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(nnx.state(made, nnx.Param)))


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("name", ["encoder", "vit"])
def test_layerwise_sharing_holds_one_projection_for_all_layers(name, depth):
    options, source, _ = OPTIONS[name]

    def shapes(expression):
        made = nnx.eval_shape(
            lambda: backbones.create(
                name, options | {"depth": depth}, attention=expression, source=source,
                rngs=make_rngs(0),
            )
        )  # fmt: skip
        return [leaf.shape for leaf in jax.tree.leaves(nnx.state(made, nnx.Param))]

    length = 24 if name == "encoder" else 16
    assert shapes("linformer(rank=4, sharing='layerwise')").count((1, 4, length)) == 1
    assert shapes("linformer(rank=4, sharing='key-value')").count((1, 4, length)) == depth
    assert shapes("linformer(rank=4)").count((1, 4, length)) == 2 * depth


@pytest.mark.parametrize("inner", ["linear", "convolution"])
def test_layerwise_sharing_beside_nested_layerwise_sharing_builds(inner):
    mine = f"linformer(rank=4, sharing='layerwise', projection='{inner}')"
    made = model("encoder", f"{mine} + lsra(attention={mine})")
    inputs, _ = batch(TOKENS)
    assert np.isfinite(logits(made, inputs)).all()


@pytest.mark.parametrize("name", ["encoder", "vit", "causal_lm"])
def test_a_pattern_gives_each_layer_its_mechanism(name):
    made = model(name, "performer(features=16)*2 + softmax")
    kinds = [type(block.mixer.core).__name__ for block in made.stack.blocks]
    assert kinds == ["Performer", "Performer", "Softmax"]
    first, second = (block.mixer.core.projection[...] for block in made.stack.blocks[:2])
    assert np.abs(first - second).max() > 0.1
