"""Reversible residuals: the gradient of the plain function, in memory that depth does not move."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn.blocks import Block, Cross, Shape, Stack, reversible
from kernels import Mask
from tests import support
from tests.blocks.test_stack import SITE, SMALL, create, jitted

HARD = {"dropout": 0.3, "drop_path": 0.3}
CASES = [
    ("softmax", HARD, None),
    ("softmax", HARD, Cross("softmax", SITE)),
    ("performer(features=8)", HARD | {"mlp": "geglu", "norm_type": "rmsnorm"}, None),
    ("linformer(rank=4, sharing='layerwise') + lsra(attention=softmax)", {}, None),
]


def plain(layers, weights, common, a, b):
    """`reversible.run`, left to JAX to differentiate."""
    for branches, mine in zip(layers, weights, strict=True):
        for branch in branches:
            a, b = b, a + branch(mine, common, b)
    return a, b


def gradients(stack, given, key):
    graph, params, rest = nnx.split(stack, nnx.Param, ...)

    def loss(params, floats):
        rngs = None if key is None else nnx.Rngs(dropout=key)
        out = nnx.merge(graph, params, rest)(mask=MASK, rngs=rngs, **floats)
        return jnp.sum(jnp.sin(3.0 * out))

    grad = jax.value_and_grad(loss, argnums=(0, 1))
    return jax.jit(grad, compiler_options=support.fast())(params, given)


MASK = Mask(keys=jnp.arange(9)[None] < jnp.asarray([[9], [5]]))


@pytest.mark.parametrize(("expression", "options", "cross"), CASES)
def test_the_gradient_is_that_of_plain_differentiation(expression, options, cross, monkeypatch):
    """With dropout as well, whose masks are drawn once more in the backward pass."""
    stack = create(expression, residual="reversible", depth=3, cross=cross, **options)
    key = jax.random.key(3) if options else None
    given = {"x": jnp.asarray(support.draw((2, 9, 16), seed=0))}
    if cross:
        given["context"] = jnp.asarray(support.draw((2, 9, 16), seed=1))
    found = gradients(stack, given, key)
    monkeypatch.setattr(reversible, "run", plain)
    expected = gradients(stack, given, key)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        # three layers of rounding; a softmax's key bias has no gradient but rounding
        close = np.abs(a - b).max() < 2e-5 * np.abs(b).max() + 1e-5
        assert close, (jax.tree_util.keystr(path), support.relative(a, b))
        assert np.abs(b).max() > 0


def test_it_is_the_reversible_block_of_the_paper():
    """y1 = x1 + mixer(norm(x2)), y2 = x2 + mlp(norm(y1)); the mean of the halves goes on."""
    stack = create(residual="reversible")
    x = jnp.asarray(support.draw((2, 9, 16), seed=0))
    one = two = x
    for block in stack.blocks:
        one = one + block.mixer(block.mixer_norm(two), mask=Mask(), shared={})
        two = two + block.mlp(block.mlp_norm(one), rngs=None)
    expected = stack.norm((one + two) / 2)
    np.testing.assert_allclose(jitted(stack, x, mask=Mask()), expected, rtol=1e-5, atol=1e-5)


def test_the_halves_stay_float32_under_bfloat16(monkeypatch):
    """Taking away what was added is exact to float32, so the gradient is that of plain bfloat16."""
    seen = []

    def branch(weights, common, x):
        seen.append(x.dtype)
        return (x * weights).astype(jnp.bfloat16)

    whole = Block.branch

    def watched(self, name, x, **given):
        seen.append(x.dtype)
        return whole(self, name, x, **given)

    monkeypatch.setattr(Block, "branch", watched)
    shape = Shape(**SMALL, residual="reversible")
    half = replace(SITE, dtype=jnp.bfloat16)
    stack = Stack("softmax", shape, half, needs=(), rngs=nnx.Rngs(0))
    x = jnp.ones((1, 9, 16), jnp.bfloat16)
    assert jax.eval_shape(lambda x: stack(x, mask=Mask(), rngs=None), x).dtype == jnp.bfloat16
    assert len(seen) >= 2 * SMALL["depth"]
    half = jnp.ones((1, 2, 3))
    out = jax.grad(lambda w: reversible.run([[branch, branch]], [w], (), half, half)[1].sum())
    assert np.isfinite(out(jnp.float32(0.3)))
    assert set(seen) == {jnp.dtype("float32")}


@pytest.mark.parametrize("residual", ["add", "reversible"])
def test_memory_grows_with_depth_unless_reversible(residual):
    """XLA's own analysis of a gradient, at depths 2 and 16."""
    # YNNPACK's fusions lay out every bias before the first layer runs.
    options = {"xla_cpu_experimental_ynn_fusion_type": "", "xla_backend_optimization_level": 0}
    held = []
    for depth in (2, 16):
        made = create(depth=depth, residual=residual, mlp_ratio=1.0)
        graph, params = nnx.split(made)

        def loss(params, x, graph=graph):
            return jnp.sum(nnx.merge(graph, params)(x, mask=Mask(), rngs=None) ** 2)

        x = jax.ShapeDtypeStruct((64, 9, 16), jnp.float32)
        lowered = jax.jit(jax.grad(loss)).lower(params, x)
        held.append(lowered.compile(options).memory_analysis().temp_size_in_bytes)
    assert held[1] < 1.1 * held[0] if residual == "reversible" else held[1] > 4 * held[0], held


def test_the_mixer_shared_by_layers_gets_the_gradient_of_all_of_them():
    stack = create("linformer(rank=4, sharing='layerwise')", residual="reversible")
    x = jnp.asarray(support.draw((2, 9, 16), seed=0))
    (_, (grads, _)) = gradients(stack, {"x": x}, None)
    leaves = jax.tree.leaves(grads["shared"])
    assert leaves and all(np.abs(leaf).max() > 0 for leaf in leaves)
