"""Fused softmax attention in the simulator of a TPU, under transformations, exported, refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kernels import Mask, reference
from kernels.fused import softmax as fused_softmax
from kernels.fused.softmax import Tiles
from kernels.target import use
from tests import support
from tests.kernels.compare import agree, both, mask_of
from tests.kernels.fused_softmax import (
    NONE,
    expected_window,
    linformer,
    qkv,
    slow,
    softmax,
    window,
)
from tests.kernels.simulated import SIMULATOR, pallas

pytestmark = pallas


@pytest.mark.parametrize(
    ("op", "length", "keys", "mask", "how"),
    [
        (window, 23, 23, "all", {"left": 7, "right": 0}),
        (linformer, 23, 12, "padding", {"tiles": Tiles(8, 12)}),
        slow(window, 23, 23, "segments", {"left": 7, "right": 4}),
        slow(window, 40, 40, "none", {"left": 3, "right": 20}),
        slow(softmax, 40, 40, "causal", {}),
        slow(softmax, 23, 23, "padding", {}),
        slow(softmax, 40, 17, "padding", {}),
    ],
)
def test_the_simulator_of_a_tpu_finds_no_race(op, length, keys, mask, how):
    """Asynchronous copies done as late as may be, NaN in fresh memory."""
    given = qkv(length, keys=keys, heads=4)
    given = {name: x[1:2] for name, x in given.items()}
    mask = {
        k: v[1:2] if k != "causal" and v is not None else v for k, v in mask_of(mask, keys).items()
    }
    expected = expected_window if op is window else reference.softmax_attention
    options = {"interpret": SIMULATOR} | {k: v for k, v in how.items() if k == "tiles"}
    rest = {k: v for k, v in how.items() if k != "tiles"}
    agree(both(op, expected, given, mask, op_options=options, **rest))


def loss(q, k, v, keys, segments):
    mask = Mask(causal=True, keys=keys, segments=segments)
    return jnp.sum(jnp.sin(window(q, k, v, mask=mask, left=9, right=0)))


@functools.cache
def problem():
    q, k, v = map(jnp.asarray, qkv(23, dim=32).values())
    keys, segments = support.ragged_keys(23), support.ragged_segments(23)
    given = q, k, v, jnp.asarray(keys), jnp.asarray(segments)
    return given, graded(loss)(*given)


def graded(function):
    return jax.jit(jax.value_and_grad(function, (0, 1, 2)), compiler_options=support.fast())


def same(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_vmap_and_checkpoint():
    given, expected = problem()

    def mapped(*given):
        two = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), given)
        return jnp.sum(jax.vmap(jax.checkpoint(loss))(*two))

    same(graded(mapped)(*given), expected)


def test_shards_of_batch_and_heads():
    given, expected = problem()
    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split, rows = PartitionSpec("data", None, "heads"), PartitionSpec("data")

    def total(*given):
        return jax.lax.psum(loss(*given), ("data", "heads"))

    mapped = jax.shard_map(  # the interpreter does not know how values vary over a mesh
        total, mesh=mesh, in_specs=(split,) * 3 + (rows,) * 2, out_specs=PartitionSpec(),
        check_vma=False,
    )  # fmt: skip
    got = jax.jit(mapped, compiler_options=support.fast())(*given)
    np.testing.assert_allclose(got, expected[0], rtol=1e-5)


def for_tpu(function, *shapes):
    """`function` and its gradients exported for TPU."""
    given = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    with use("tpu"):
        step = jax.jit(jax.grad(lambda *x: jnp.sum(function(*x).astype(jnp.float32)), (0, 1, 2)))
        return jax.export.export(step, platforms=["tpu"])(*given)


@pytest.mark.parametrize(
    ("dim", "heads", "groups", "dtype"),
    [
        (64, 4, 2, jnp.bfloat16),
        slow(128, 4, 1, jnp.bfloat16),
        slow(32, 4, 4, jnp.bfloat16),
        slow(256, 2, 2, jnp.bfloat16),
        slow(64, 4, 4, jnp.float32),
    ],
)
def test_it_is_exported_for_tpu(dim, heads, groups, dtype):
    """With the tiles that a TPU gets: 1300 positions, several tiles."""
    q, k = ((2, 1300, n, dim) for n in (heads, groups))
    masks = ((2, 1300), bool), ((2, 1300), jnp.int32)

    def attend(q, k, v, keys, segments):
        mask = Mask(keys=keys, segments=segments)
        near = window(q, k, v, mask=mask, left=200, right=100, tiles=None, interpret=None)
        mask = Mask(causal=True)
        far = softmax(q, k, v, mask=mask, tiles=None, interpret=None)
        few = linformer(q, k[:, :256], v[:, :256], interpret=None)
        return near[..., :-1] + far + few

    exported = for_tpu(attend, (q, dtype), (k, dtype), (k, dtype), *masks)
    # forward, dq and dk, dv of two; forward and one backward of linformer
    assert exported.mlir_module().count("tpu_custom_call") == 8
    assert "1300x1300" not in exported.mlir_module()


def test_shards_are_lowered_for_tpu():
    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = PartitionSpec("data", None, "heads")

    def attend(q, k, v):
        return softmax(q, k, v, tiles=None, interpret=None)

    mapped = jax.shard_map(attend, mesh=mesh, in_specs=split, out_specs=split)
    shape = (4, 256, 4, 128), jnp.bfloat16
    assert for_tpu(mapped, shape, shape, shape).mlir_module().count("tpu_custom_call") == 2


def refusal(name, *, chip="tpu", dims=(64, 64, 64), dtypes=(jnp.float32,) * 3, keys=23, **how):
    q, k, v = (
        jnp.zeros((2, n, 2, dim), dtype)
        for n, dim, dtype in zip((23, keys, keys), dims, dtypes, strict=True)
    )
    with use(chip):
        return getattr(fused_softmax, f"refuse_{name}")(q, k, v, **how)


PLAIN = {"mask": NONE, "scale": 0.125}
SIDES = {"mask": NONE, "left": 3, "right": 0}


@pytest.mark.parametrize(
    ("name", "how", "reason"),
    [
        ("softmax", PLAIN, None),
        ("softmax", PLAIN | {"chip": "cpu"}, "not for this cpu"),
        ("softmax", PLAIN | {"logit_cap": 30.0}, "no logit_cap"),
        ("softmax", PLAIN | {"bias": ()}, "no slopes"),
        ("softmax", PLAIN | {"scale": np.zeros(2)}, "Python number"),
        ("softmax", PLAIN | {"dims": (64, 64, 32)}, "32 channels"),
        ("softmax", PLAIN | {"dims": (512,) * 3}, "up to 256"),
        ("softmax", PLAIN | {"dtypes": (jnp.float16,) * 3}, "bfloat16 or float32"),
        ("softmax", PLAIN | {"dtypes": (jnp.bfloat16, jnp.float32, jnp.float32)}, "one dtype"),
        ("window", SIDES, None),
        ("window", SIDES | {"dilation": 2}, "no dilation"),
        ("window", SIDES | {"slopes": np.ones(2)}, "no slopes"),
        ("linformer", {"keys": 512}, None),
        ("linformer", {"keys": 513}, "lower rank"),
        ("cudnn", PLAIN, "not on a tpu"),
        ("cudnn", PLAIN | {"chip": "hopper"}, "bfloat16 or float16"),
    ],
)
def test_refusals(name, how, reason):
    said = refusal(name, **how)
    assert said is None if reason is None else reason in said


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({}, None),
        ({"mask": Mask(causal=True)}, None),
        ({"mask": "padding"}, "padding"),
        ({"dims": (60,) * 3}, "multiple of 8"),
        ({"dims": (264,) * 3}, "up to 256"),
        ({"logit_cap": 3.0}, "no logit_cap"),
    ],
)
def test_what_cudnn_takes(how, reason):
    half = {"chip": "hopper", "dtypes": (jnp.bfloat16,) * 3}
    if how.get("mask") == "padding":
        how = how | {"mask": Mask(keys=jnp.ones((2, 23), bool))}
    said = refusal("cudnn", **PLAIN | half | how)
    assert said is None if reason is None else reason in said
