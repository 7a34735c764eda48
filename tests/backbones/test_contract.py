"""Every mechanism in every backbone: it learns, it can be saved, and it recomputes faithfully."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efficient_attn import backbones
from efficient_attn.backbones import Input
from tests import support

TOKENS = Input(kind="tokens", shape=(24,), classes=3, vocab=11)
IMAGE = Input(kind="image", shape=(16, 16, 1), classes=3)
SMALL = {"depth": 2, "width": 16, "heads": 2, "dropout": 0.0}
OPTIONS = {
    "encoder": (SMALL, TOKENS),
    "vit": (SMALL | {"patch": 4}, IMAGE),
}
"""A tiny instance of each backbone, and what it reads."""
FIRSTS = [texts[0] for texts in support.VARIANTS.values()]
HYBRIDS = [
    "performer(features=16)*2 + softmax",
    "lsra(attention=linformer(rank=4))",
    "linformer(rank=4, sharing='layerwise')",
]
CASES = [(name, text) for name in OPTIONS for text in FIRSTS + HYBRIDS]


def batch(source, size=8):
    random = np.random.default_rng(0)
    labels = jnp.asarray(np.arange(size) % source.classes)
    if source.kind == "image":
        return jnp.asarray(random.standard_normal((size, *source.shape)), jnp.float32), labels
    tokens = random.integers(1, source.vocab, (size, *source.shape))
    lengths = random.integers(4, source.shape[0] + 1, size)
    tokens[np.arange(source.shape[0]) >= lengths[:, None]] = 0
    return jnp.asarray(tokens, jnp.int32), labels


@functools.cache
def model(name, expression, seed=0, **options):
    small, source = OPTIONS[name]
    depth = 3 if "*2" in expression else 2
    return backbones.create(
        name, small | {"depth": depth} | options, attention=expression, source=source,
        rngs=nnx.Rngs(seed),
    )  # fmt: skip


def loss_of(graph, rest, inputs, labels):
    def loss(params):
        logits = nnx.merge(graph, params, rest)(inputs, rngs=None)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss


@functools.cache
def trained(name, expression):
    """(losses of 30 steps, the model after them)."""
    graph, params, rest = nnx.split(model(name, expression), nnx.Param, ...)
    loss = loss_of(graph, rest, *batch(OPTIONS[name][1]))
    adam = optax.adam(3e-3)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = adam.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    def run(params):
        return jax.lax.scan(step, (params, adam.init(params)), length=30)

    (params, _), losses = jax.jit(run, compiler_options=support.fast())(params)
    return np.asarray(losses), nnx.merge(graph, params, rest)


def logits(made, inputs):
    graph, state = nnx.split(made)
    call = jax.jit(lambda s, x: nnx.merge(graph, s)(x, rngs=None), compiler_options=support.fast())
    return np.asarray(call(state, inputs))


@pytest.mark.parametrize(("name", "expression"), CASES)
def test_thirty_steps_of_adam_lower_the_loss(name, expression):
    losses, _ = trained(name, expression)
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.6 * losses[0], losses[[0, -1]]


@pytest.mark.parametrize(("name", "expression"), CASES)
def test_saved_and_loaded_into_a_new_model_it_says_the_same(name, expression, tmp_path):
    _, made = trained(name, expression)
    inputs, _ = batch(OPTIONS[name][1])
    expected = logits(made, inputs)
    np.savez(tmp_path / "model.npz", *map(np.asarray, jax.tree.leaves(nnx.state(made))))

    other = model(name, expression, seed=7)
    graph, state = nnx.split(other)
    with np.load(tmp_path / "model.npz") as saved:
        leaves = [saved[key] for key in saved.files]
    loaded = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))
    np.testing.assert_array_equal(logits(loaded, inputs), expected)
    assert np.abs(logits(other, inputs) - expected).max() > 1e-3


@pytest.mark.parametrize(("name", "expression"), [("encoder", e) for e in FIRSTS[2:] + HYBRIDS[2:]])
def test_remat_changes_neither_loss_nor_gradient(name, expression):
    inputs, labels = batch(OPTIONS[name][1])
    found = []
    for remat in (False, True):
        graph, params, rest = nnx.split(model(name, expression, remat=remat), nnx.Param, ...)
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
    inputs, _ = batch(OPTIONS[name][1])
    graph, state = nnx.split(made)

    def call(state, key):
        return nnx.merge(graph, state)(inputs, rngs=nnx.Rngs(dropout=key))

    call = jax.jit(call, compiler_options=support.fast())
    one, again, other = (np.asarray(call(state, jax.random.key(s))) for s in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3
    np.testing.assert_array_equal(logits(made, inputs), logits(made, inputs))


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("name", OPTIONS)
def test_logits_are_float32_under_bfloat16(name, pool, norm):
    options, source = OPTIONS[name]
    made = nnx.eval_shape(
        lambda: backbones.create(
            name, options | {"pool": pool, "norm": norm}, attention="performer(features=4)",
            source=source, dtype=jnp.bfloat16, rngs=nnx.Rngs(0),
        )
    )  # fmt: skip
    graph, state = nnx.split(made)
    out = jax.eval_shape(lambda s: nnx.merge(graph, s)(batch(source)[0], rngs=None), state)
    assert (out.shape, out.dtype) == ((8, 3), jnp.float32)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(nnx.state(made, nnx.Param)))


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_layerwise_sharing_holds_one_projection_for_all_layers(name, depth):
    options, source = OPTIONS[name]

    def shapes(expression):
        made = nnx.eval_shape(
            lambda: backbones.create(
                name, options | {"depth": depth}, attention=expression, source=source,
                rngs=nnx.Rngs(0),
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


@pytest.mark.parametrize("name", OPTIONS)
def test_a_pattern_gives_each_layer_its_mechanism(name):
    made = model(name, "performer(features=16)*2 + softmax")
    kinds = [type(block.mixer.core).__name__ for block in made.stack.blocks]
    assert kinds == ["Performer", "Performer", "Softmax"]
    first, second = (block.mixer.core.projection[...] for block in made.stack.blocks[:2])
    assert np.abs(first - second).max() > 0.1
