"""A stack by its formulas: norms, feed-forward kinds, stochastic depth, cross-attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn.attention import Site
from efficient_attn.blocks import Cross, Shape, Stack
from efficient_attn.errors import UserError
from kernels import Mask
from tests import support

SMALL = {"depth": 2, "width": 16, "heads": 2, "dropout": 0.0}
SITE = Site(width=16, heads=2, seq=9)


def create(expression="softmax", *, needs=(), cross=None, **options):
    return Stack(
        expression, Shape(**SMALL | options), SITE, needs=needs, rngs=nnx.Rngs(0), cross=cross
    )


def jitted(stack, x, *, key=None, **given):
    """Output of the stack, with dropout from `key` if there is one."""
    graph, state = nnx.split(stack)

    def call(state, x, key, given):
        rngs = None if key is None else nnx.Rngs(dropout=key)
        return nnx.merge(graph, state)(x, rngs=rngs, **given)

    return np.asarray(jax.jit(call, compiler_options=support.fast())(state, x, key, given))


@pytest.mark.parametrize("norm_type", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_block_normalises_before_the_branch_or_after_the_sum(norm, norm_type):
    stack = create(norm=norm, norm_type=norm_type)
    x = 3.0 + jnp.asarray(support.draw((2, 5, 16), seed=0))
    y = x
    for block in stack.blocks:
        for name in ("mixer", "mlp"):
            normalise = getattr(block, f"{name}_norm")
            given = normalise(y) if norm == "pre" else y
            if name == "mixer":
                branch = block.mixer(given, mask=Mask(), shared={})
            else:
                branch = block.mlp(given, rngs=None)
            y = y + branch if norm == "pre" else normalise(y + branch)
    expected = stack.norm(y) if norm == "pre" else y
    got = jitted(stack, x, mask=Mask())
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    mean = np.abs(np.mean(got[..., :], axis=-1)).max()
    assert mean < 1e-5 if norm_type == "layernorm" else mean > 1e-2


def test_cross_attention_stands_between_the_mixer_and_the_feed_forward_layer():
    where = Site(width=16, heads=2, seq=7)
    stack = create(norm="post", depth=1, cross=Cross("performer(features=64)", where))
    x, context = support.draw((2, 5, 16), seed=0), support.draw((2, 7, 16), seed=1)
    keys = jnp.arange(7)[None] < jnp.asarray([[7], [3]])
    given = {"context": jnp.asarray(context), "context_mask": Mask(keys=keys)}
    got = jitted(stack, jnp.asarray(x), mask=Mask(causal=True), **given)

    (block,) = stack.blocks
    y = block.mixer_norm(x + block.mixer(jnp.asarray(x), mask=Mask(causal=True), shared={}))
    look = block.cross(y, given["context"], mask=Mask(keys=keys), shared={})
    y = block.cross_norm(y + look)
    y = block.mlp_norm(y + block.mlp(y, rngs=None))
    np.testing.assert_allclose(got, y, rtol=1e-5, atol=1e-5)

    context[1, 3:] = 1e3
    hidden = jitted(
        stack, jnp.asarray(x), mask=Mask(causal=True), **given | {"context": jnp.asarray(context)}
    )
    np.testing.assert_allclose(hidden, got, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residual", ["add", "reversible"])
def test_decoding_with_cross_attention_equals_the_causal_pass(residual):
    """Token by token, the second row a place behind the first."""
    where = Site(width=16, heads=2, seq=7)
    stack = create(residual=residual, cross=Cross("softmax", where), needs={"causal", "decode"})
    x, context = support.draw((2, 9, 16), seed=0), support.draw((2, 7, 16), seed=1)
    seen = Mask(keys=jnp.arange(7)[None] < jnp.asarray([[7], [3]]))
    whole = jitted(
        stack, jnp.asarray(x), mask=Mask(causal=True), context=jnp.asarray(context),
        context_mask=seen,
    )  # fmt: skip
    graph, numbers = nnx.split(stack)

    def call(numbers, x, context):
        stack = nnx.merge(graph, numbers)
        memory = stack.init_cross(context, mask=seen)
        state, outs = stack.init_state(2, jnp.float32), []
        for t in range(9):
            at = jnp.asarray([t, max(t - 1, 0)])
            token = x[np.arange(2), at][:, None]
            one, state = stack.step(token, state, position=at, memory=memory)
            outs.append(one[:, 0])
        return jnp.stack(outs, axis=1)

    outs = jax.jit(call, compiler_options=support.fast())(numbers, x, context)
    np.testing.assert_allclose(outs[0], whole[0], rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(outs[1, 1:], whole[1, :8], rtol=1e-5, atol=2e-5)


def test_stochastic_depth_skips_whole_branches_of_an_example_more_often_with_depth():
    """Rates l / L * 0.6 of layer l; what is kept is divided by the rate of keeping."""
    stack = create(depth=3, drop_path=0.6)
    graph, state = nnx.split(stack)
    x = jnp.asarray(support.draw((1000, 2, 16), seed=0))

    @jax.jit
    def call(state, key):
        block = nnx.merge(graph, state).blocks
        given = {"mask": Mask(), "positions": None, "shared": {}}
        names = [(layer, name) for layer in range(3) for name in ("mixer", "mlp")]
        runs = [nnx.Rngs(dropout=k) for k in jax.random.split(key, 6)]
        dropped = [
            block[i].branch(n, x, rngs=r, **given) for (i, n), r in zip(names, runs, strict=True)
        ]
        whole = [block[i].branch(n, x, rngs=None, **given) for i, n in names]
        return dropped, whole

    dropped, whole = call(state, jax.random.key(0))
    for at, (some, all_) in enumerate(zip(dropped, whole, strict=True)):
        rate = 0.2 * (at // 2 + 1)
        kept = np.any(np.asarray(some) != 0, axis=(1, 2))
        assert abs((1 - kept.mean()) - rate) < 0.06  # 4 standard deviations of 1000 draws
        np.testing.assert_allclose(some[kept], all_[kept] / (1 - rate), rtol=1e-5, atol=1e-6)
    assert not np.array_equal(np.any(dropped[0] != 0, (1, 2)), np.any(dropped[1] != 0, (1, 2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": "reversible", "norm": "post"}, "needs norm='pre', not 'post'"),
        ({"residual": "reversible", "remat": True}, "recomputes every block already"),
        ({"drop_path": 1.0}, r"drop_path=1.0 is not in \[0, 1\)"),
        ({"cross": Cross("lsra", SITE)}, "lsra does not support cross"),
        ({"mlp_ratio": 0.0}, "mlp_ratio=0.0 must be positive"),
        ({"mlp_ratio": 0.01}, "mlp_ratio=0.01 of width=16 leaves .* no hidden width; raise it"),
    ],
    ids=str,
)
def test_what_cannot_be_built_says_why(options, message):
    with pytest.raises(UserError, match=message):
        create(**options)
