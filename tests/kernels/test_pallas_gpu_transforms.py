"""jax's transformations of the ops that Hopper's kernels compute, forward and gradient.

What they are lowered to for CUDA is read, and what they compute is the interpreter's.
"""

import functools
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
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def linear(q, k, v, mask=CAUSAL):
    q, k = (jax.nn.softplus(x) for x in (q, k))
    return kernels.linear_attention(q, k, v, mask=mask, backend="pallas")


def linear_both_ways(q, k, v):
    return linear(q, k, v, Mask())


def gated(q, k, v):
    decay = -jax.nn.softplus(q[..., 0].astype(jnp.float32))
    return kernels.gated_linear_attention(q, k, v, decay, backend="pallas")[0]


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


OPS = [linear, favor, linformer, window, softmax]
OTHERS = [slow(linear_both_ways), slow(gated), slow(favor_both_ways)]


def given(*shape: int):
    made = arrays(0, **dict.fromkeys("qkv", shape))
    return [jnp.asarray(made[name], jnp.bfloat16) for name in "qkv"]


def graded(op):
    """op -> (a number, gradients)."""

    def loss(*a):
        return jnp.sum(jnp.square(op(*a).astype(jnp.float32)))

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


def spread(function, mesh):
    """The outputs and gradients of parts of batch and heads, each on a device of its own."""

    def both(*a):
        out, back = jax.vjp(function, *a)
        return out, *back(out)

    return jax.shard_map(both, mesh=mesh, in_specs=BY_HEAD, out_specs=BY_HEAD)


def mesh_of(batch: int, heads: int):
    devices = jax.devices()[: batch * heads]
    kinds = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((batch, heads), ("batch", "heads"), axis_types=kinds, devices=devices)


def lowered(function, arguments) -> str:
    with use("hopper"):
        traced = jax.jit(function).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def launches(text: str) -> int:
    """How many kernels a program runs, each once: none within a loop."""
    assert "stablehlo.while" not in text.split("mosaic_gpu", 1)[0]
    return len(re.findall(r"custom_call @mosaic_gpu", text))


@pytest.mark.parametrize("op", [*OPS, *OTHERS])
def test_vmap_and_checkpoint_run_the_kernels_once(op):
    plain = launches(lowered(graded(op), given(2, 128, 2, 64)))
    more = given(3, 2, 128, 2, 64)
    assert plain > 1 and launches(lowered(jax.vmap(graded(op)), more)) == plain
    again = launches(lowered(jax.vmap(graded(jax.checkpoint(op))), more))
    assert plain <= again <= plain + launches(lowered(op, given(2, 128, 2, 64)))


@pytest.mark.parametrize("op", [*OPS, *OTHERS])
def test_shard_map_over_batch_and_heads_and_export(op):
    arguments = given(2, 128, 4, 64)
    with use("hopper"):
        function = jax.jit(spread(op, mesh_of(2, 2)))
        exported = jax.export.export(function, platforms=("cuda",))(*arguments)
    assert exported.nr_devices == 4 and launches(exported.mlir_module()) > 1
    assert [a.shape for a in exported.out_avals[1:]] == [a.shape for a in arguments]


@pytest.mark.parametrize("op", [linear, *(slow(op) for op in (favor, linformer, window, softmax))])
def test_a_program_for_cuda_can_be_stored(op):
    pytest.importorskip("flatbuffers", reason="jax.export writes with flatbuffers")
    with use("hopper"):
        function = jax.jit(graded(op))
        exported = jax.export.export(function, platforms=("cuda",))(*given(2, 128, 2, 64))
    back = jax.export.deserialize(exported.serialize())
    assert back.platforms == ("cuda",) and back.out_avals == exported.out_avals


@pytest.mark.slow
@pytest.mark.parametrize("op", [linear, linear_both_ways, gated, favor, linformer, window, softmax])
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
@pytest.mark.parametrize("op", [linear, linear_both_ways, gated, favor, linformer, window, softmax])
def test_shard_map_and_checkpoint_give_what_the_op_gives(op):
    """On a mesh of one device: the interpreter takes no more."""
    arguments = given(1, 64, 2, 64)

    def both(*a):
        out, back = jax.vjp(op, *a)
        return out, *back(out)

    with use("hopper", INTERPRET):
        made = jax.jit(spread(jax.checkpoint(op), mesh_of(1, 1)))(*arguments)
        expected = jax.jit(both)(*arguments)
    same(made, expected)


def same(made, expected):
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
