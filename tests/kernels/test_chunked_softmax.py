"""`kernels.chunked_softmax` against the reference of softmax attention in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import Mask, linformer_attention, reference, softmax_attention
from kernels.chunked_softmax import LOGITS, SHORTEST, chunked_softmax, refuse_chunked
from kernels.target import use
from tests.kernels.compare import MASKS, agree, arrays, both, mask_of

TILE = (16, 32)  # multiples of chunked_softmax.VECTOR


def op(q, k, v, *, mask=None, scale=None, tile=TILE):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return chunked_softmax(q, k, v, mask=mask or Mask(), scale=scale, tile=tile)


def qkv(length, *, keys=None, heads=4, groups=4, dim=8, values=None):
    keys = length if keys is None else keys
    values = dim if values is None else values
    shapes = {"q": (4, length, heads, dim), "k": (4, keys, groups, dim)}
    return arrays(0, **shapes, v=(4, keys, groups, values))


def tiled(length, count=None, device="cpu", op=softmax_attention, **options):
    """Whether `auto` goes tile by tile over queries and keys of these lengths."""
    q, k = (jax.ShapeDtypeStruct((1, n, 2, 8), jnp.float32) for n in (length, count or length))
    with use(device):
        return "custom_vjp" in str(jax.make_jaxpr(functools.partial(op, **options))(q, k, k))


def test_auto_takes_it_on_a_cpu_where_it_is_faster_and_only_there():
    length = round(LOGITS**0.5)
    assert tiled(length) and tiled(length, mask=Mask(causal=True))
    assert tiled(LOGITS // SHORTEST, SHORTEST) and tiled(SHORTEST, LOGITS // SHORTEST)
    assert tiled(LOGITS // SHORTEST, SHORTEST, op=linformer_attention)
    assert not tiled(length - 1) and not tiled(1, LOGITS)
    assert not tiled(length, logit_cap=3.0) and not tiled(length, device="gpu")


def test_auto_leaves_it_where_several_devices_may_hold_the_heads():
    shape = jnp.ones((1, 256, 2, 8))
    assert jax.device_count() > 1
    assert "custom_vjp" not in str(jax.make_jaxpr(softmax_attention)(shape, shape, shape))


def test_in_shard_map_each_device_has_its_own():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("batch",))
    spec = jax.sharding.PartitionSpec("batch")
    given = [jnp.asarray(x) for x in qkv(40).values()]
    divided = jax.shard_map(op, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    loss = lambda call: lambda *x: jnp.sum(call(*x) ** 2)  # noqa: E731
    ours, alone = (jax.grad(loss(call), (0, 1, 2))(*given) for call in (divided, op))
    for x, y in zip(ours, alone, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_the_op_has_it_by_name():
    given = {name: jnp.asarray(x) for name, x in qkv(23).items()}
    out = softmax_attention(**given, backend="tiled")
    np.testing.assert_allclose(out, softmax_attention(**given), rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="backend 'tiled'.*logit_cap"):
        softmax_attention(**given, logit_cap=30.0, backend="tiled")


@pytest.mark.parametrize(
    ("length", "mask"),
    [(63, mask) for mask in MASKS] + [(length, "all") for length in (1, 7, 48, 100)],
)
def test_output_and_gradients_are_the_references(length, mask):
    agree(both(op, reference.softmax_attention, qkv(length), mask_of(mask, length)))


@pytest.mark.parametrize(
    "shape", [{"groups": 2}, {"groups": 1, "dim": 3}, {"values": 5}, {"keys": 31}], ids=str
)
def test_other_shapes(shape):
    mask = mask_of("padding", shape.get("keys", 63))
    agree(both(op, reference.softmax_attention, qkv(63, **shape), mask))


@pytest.mark.parametrize("tile", [(32, 48), (96, 16), (128, 64)])
def test_causal_tiles_of_other_shapes(tile):
    mask = mask_of("causal", 63)
    given = qkv(63, groups=2)  # two heads side by side: 16, 48 and 64 positions
    agree(both(op, reference.softmax_attention, given, mask, op_options={"tile": tile}))


def test_another_scale():
    agree(both(op, reference.softmax_attention, qkv(63), mask_of("all", 63), scale=0.7))


def test_bfloat16_is_a_rounding_away():
    result = both(op, reference.softmax_attention, qkv(63), mask_of("all", 63), dtype=jnp.bfloat16)
    agree(result, forward=1e-2, backward=2e-2)


def test_logits_of_a_thousand_neither_overflow_nor_lose_the_gradient():
    given = qkv(63)
    given = given | {"q": 300 * given["q"]}
    result = both(op, reference.softmax_attention, given, mask_of("all", 63))
    agree(result, forward=2e-4, backward=2e-3)


def test_a_row_that_sees_nothing_is_zero_and_so_are_its_gradients():
    result = both(op, reference.softmax_attention, qkv(63), mask_of("all", 63))
    np.testing.assert_array_equal(result.out[3], 0)
    for grad in result.grads.values():
        np.testing.assert_array_equal(grad[3], 0)


def test_under_vmap_and_checkpoint():
    q, k, v = (jnp.asarray(x) for x in qkv(40).values())
    stacked = [jnp.stack([x, x[::-1]]) for x in (q, k, v)]
    causal = functools.partial(op, mask=Mask(causal=True))
    loss = lambda *x: jnp.sum(jax.checkpoint(causal)(*x) ** 2)  # noqa: E731
    one = jax.grad(loss, (0, 1, 2))
    for mapped, alone in zip(jax.vmap(one)(*stacked), one(q, k, v), strict=True):
        np.testing.assert_allclose(mapped[0], alone, atol=1e-5)
        np.testing.assert_allclose(mapped[1], alone[::-1], atol=1e-5)


def temporaries(length):
    shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    tiles = functools.partial(op, tile=(64, 64))
    step = jax.jit(jax.grad(lambda q, k, v: jnp.sum(tiles(q, k, v)), (0, 1, 2)))
    return step.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_the_length():
    assert temporaries(2048) < 2.2 * temporaries(1024)
    assert temporaries(1024) < 1024 * 1024 * 2 * 4 / 8


def test_what_it_does_not_take_is_refused():
    q, k, v = (jnp.asarray(x) for x in qkv(7).values())
    how = {"mask": Mask(), "scale": 1.0}
    with use("cpu"):
        assert refuse_chunked(q, k, v, **how) is None
        assert "logit_cap" in refuse_chunked(q, k, v, **how, logit_cap=2.0)
        assert "slopes" in refuse_chunked(q, k, v, **how, bias=(jnp.ones(4), None))
    with use("tpu"):
        assert "not for a tpu" in refuse_chunked(q, k, v, **how)
