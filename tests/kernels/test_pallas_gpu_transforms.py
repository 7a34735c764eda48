"""jax's transformations of the ops that Hopper's kernels compute, forward and gradient.

What they are lowered to for CUDA is read, and what they compute is the interpreter's.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import kernels
from kernels import Mask
from kernels.target import use
from tests.kernels.compare import arrays
from tests.kernels.hopper import INTERPRET, no_races  # noqa: F401

CAUSAL = Mask(causal=True)
BY_HEAD = PartitionSpec("batch", None, "heads")


def linear(q, k, v, mask=CAUSAL):
    q, k = (jax.nn.softplus(x) for x in (q, k))
    return kernels.linear_attention(q, k, v, mask=mask, backend="pallas")


def linear_both_ways(q, k, v):
    return linear(q, k, v, Mask())


def gated(q, k, v):
    decay = -jax.nn.softplus(q[..., 0].astype(jnp.float32))
    return kernels.gated_linear_attention(q, k, v, decay, backend="pallas")[0]


def channels(q, k, v):
    decay = -jax.nn.softplus(q.astype(jnp.float32))
    return kernels.gated_linear_attention(q, k, v, decay, backend="pallas")[0]


def delta(q, k, v):
    beta, k = jax.nn.sigmoid(q[..., 0].astype(jnp.float32)), k / 8
    return kernels.gated_delta_rule(q, k, v, beta, backend="pallas")[0]


def favor(q, k, v, mask=CAUSAL):
    weight = jnp.asarray(arrays(3, weight=(128, 64))["weight"])
    return kernels.favor_attention(q, k, v, weight, mask=mask, backend="pallas")


def favor_both_ways(q, k, v):
    return favor(q, k, v, Mask())


def linformer(q, k, v):
    return kernels.linformer_attention(q, k[:, :64], v[:, :64], backend="pallas")


def window(q, k, v):
    made = kernels.window_attention(q, k, v, left=32, right=0, mask=CAUSAL, backend="pallas")
    return made.out + made.lse[..., None]


def softmax(q, k, v):
    return kernels.softmax_attention(q, k, v, mask=CAUSAL, backend="pallas")


OPS = [linear, linear_both_ways, gated, channels, delta]
OPS += [favor, favor_both_ways, linformer, window, softmax]


def given(*shape: int):
    made = arrays(0, **dict.fromkeys("qkv", shape))
    return [jnp.asarray(made[name], jnp.bfloat16) for name in "qkv"]


def graded(op):
    """op -> (a number, gradients)."""

    def loss(*a):
        return jnp.sum(jnp.square(op(*a).astype(jnp.float32)))

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


def spread(function, mesh, over=BY_HEAD):
    """The outputs and gradients of parts of batch and heads, each on a device of its own."""

    def both(*a):
        out, back = jax.vjp(function, *a)
        return out, *back(out)

    return jax.shard_map(both, mesh=mesh, in_specs=over, out_specs=over)


def mesh_of(batch: int, heads: int):
    devices = jax.devices()[: batch * heads]
    kinds = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((batch, heads), ("batch", "heads"), axis_types=kinds, devices=devices)


@pytest.mark.parametrize(
    ("op", "launches"),
    [
        (linear, 5),  # out and, once more for the gradient, dq, dk and dv
        (channels, 9),  # weights and out, twice, weights, four passes of the gradient
        (delta, 9),  # inverses of out and of the gradient, two passes there and four sums
        (favor, 9),  # and twice the scales of q and k
        (linformer, 4),  # out, twice, dq and dkv
        (window, 4),
        (softmax, 4),
    ],
)
def test_all_at_once_launches_each_kernel_once(op, launches):
    """Over batch and heads on four devices, each maps over a further axis, with a checkpoint."""
    mapped = jax.vmap(jax.checkpoint(op))
    over = PartitionSpec(None, *BY_HEAD)
    with use("hopper"):
        made = jax.make_jaxpr(spread(mapped, mesh_of(2, 2), over))(*given(3, 2, 64, 4, 64))
    assert launched(made) == launches


def launched(program) -> int:
    """Kernels in a jaxpr, none in a loop."""
    program, count = getattr(program, "jaxpr", program), 0
    for equation in program.eqns:
        if equation.primitive.name in ("mpmd_map", "core_map", "pallas_call"):
            count += 1
            continue
        inner = [p for p in jax.tree.leaves(equation.params, is_leaf=is_program) if is_program(p)]
        inside = sum(map(launched, inner))
        assert not inside or equation.primitive.name not in ("scan", "while")
        count += inside
    return count


def is_program(x) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def lowered(function, arguments) -> str:
    with use("hopper"):
        traced = jax.jit(function).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def kernels_of(text: str) -> int:
    """How many kernels a program runs; none in a loop, of which it has none."""
    assert "stablehlo.while" not in text
    return len(re.findall(r"custom_call @mosaic_gpu", text))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_vmap_is_lowered_to_as_many_kernels(op):
    plain = kernels_of(lowered(graded(op), given(2, 64, 2, 64)))
    assert plain > 1
    assert kernels_of(lowered(jax.vmap(graded(op)), given(3, 2, 64, 2, 64))) == plain


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_shard_map_is_exported_and_read_again(op):
    pytest.importorskip("flatbuffers", reason="jax.export writes with flatbuffers")
    arguments = given(2, 64, 4, 64)
    with use("hopper"):
        function = jax.jit(spread(jax.checkpoint(op), mesh_of(2, 2)))
        exported = jax.export.export(function, platforms=("cuda",))(*arguments)
    back = jax.export.deserialize(exported.serialize())
    assert back.platforms == ("cuda",) and back.nr_devices == 4
    assert [a.shape for a in back.out_avals[1:]] == [a.shape for a in arguments]


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_vmap_gives_what_each_gives_alone(op):
    """Over an axis in the middle of q, and one of v that is none of q's."""
    q, k, v = given(2, 1, 64, 2, 64)
    axes = jnp.moveaxis(q, 0, 2), k[0], v
    with use("hopper", INTERPRET):
        made = jax.jit(jax.vmap(graded(op), in_axes=(2, None, 0)))(*axes)
        alone = jax.jit(graded(op))
        expected = [alone(q[i], k[0], v[i]) for i in range(2)]
    same(made, jax.tree.map(lambda *a: jnp.stack(a), *expected))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_shard_map_gives_what_the_op_gives(op):
    """On a mesh of one device: the interpreter takes no more, and no checkpoint."""
    arguments = given(1, 64, 2, 64)

    def both(*a):
        out, back = jax.vjp(op, *a)
        return out, *back(out)

    with use("hopper", INTERPRET):
        made = jax.jit(spread(op, mesh_of(1, 1)))(*arguments)
        expected = jax.jit(both)(*arguments)
    same(made, expected)


def same(made, expected):
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
