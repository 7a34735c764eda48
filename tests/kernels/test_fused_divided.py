"""`kernels.divide`: each device runs a kernel on its part of the batch, on simulated TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

import kernels
from kernels import Mask
from kernels.divide import by_batch
from kernels.target import use
from tests import support
from tests.kernels.on_tpu import quick, same
from tests.kernels.simulated import pallas

pytestmark = pallas

BATCH, LENGTH, HEADS, DIM = 4, 20, 2, 16
WEIGHT = jnp.asarray(support.draw((24, DIM), seed=9))


def mesh_of(*shape: int):
    names = ("data", "model")[: len(shape)]
    auto = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, names, axis_types=auto, devices=jax.devices()[: np.prod(shape)])


def problem():
    wide, tall = (BATCH, LENGTH, HEADS, DIM), (BATCH, LENGTH, HEADS)
    given = {name: support.draw(wide, seed=i) for i, name in enumerate("qkv")}
    given["decay"] = -np.abs(support.draw(tall, seed=4))
    given["decays"] = -np.abs(support.draw(wide, seed=5))
    given["state"] = support.draw((BATCH, HEADS, DIM, DIM), seed=6)
    masks = support.ragged_keys(LENGTH)[:BATCH], np.arange(LENGTH) // 7 + np.zeros((BATCH, 1), int)
    return jax.tree.map(jnp.asarray, (given, masks))


def softmax(x, keys, segments):
    mask = Mask(causal=True, keys=keys, segments=segments)
    return kernels.softmax_attention(x["q"], x["k"], x["v"], mask=mask, backend="pallas")


def window(x, keys, segments):
    mask = Mask(keys=keys)
    part = kernels.window_attention(
        x["q"], x["k"], x["v"], left=4, right=2, mask=mask, backend="pallas"
    )
    return part.out


def linformer(x, keys, segments):
    return kernels.linformer_attention(x["q"], x["k"], x["v"], alive=keys, backend="pallas")


def linear(x, keys, segments):
    phi = lambda x, at: (jax.nn.elu(x) + 1, None)  # noqa: E731
    how = {"features": phi, "backend": "pallas"}
    both = kernels.linear_attention(x["q"], x["k"], x["v"], mask=Mask(keys=keys), **how)
    mask = Mask(causal=True, segments=segments)
    return both + kernels.linear_attention(x["q"], x["k"], x["v"], mask=mask, **how)


def favor(x, keys, segments):
    mask = Mask(causal=True, keys=keys)
    state = kernels.linear_attention_init(BATCH, HEADS, len(WEIGHT), DIM)
    out, state = kernels.causal_favor_attention(
        x["q"], x["k"], x["v"], WEIGHT, state, mask=mask, backend="pallas"
    )
    both = kernels.favor_attention(x["q"], x["k"], x["v"], WEIGHT, backend="pallas")
    return out + both, state.sums


def gated(x, keys, segments):
    mask = Mask(causal=True, keys=keys)
    return kernels.gated_linear_attention(
        x["q"], x["k"], x["v"], x["decay"], mask=mask, initial_state=x["state"], backend="pallas"
    )


def by_channel(x, keys, segments):
    return kernels.gated_linear_attention(x["q"], x["k"], x["v"], x["decays"], backend="pallas")


def delta(x, keys, segments):
    mask = Mask(causal=True, segments=segments)
    beta = jax.nn.sigmoid(x["decay"])
    return kernels.gated_delta_rule(
        x["q"], x["k"], x["v"], beta, x["decay"], mask=mask, backend="pallas"
    )


def decode(x, keys, segments):
    one = (x[name][:, :1] for name in "qkv")
    return kernels.decode_step(
        *one, state=x["state"], log_decay=x["decay"][:, :1], backend="pallas"
    )


OPS = [softmax, linear, favor, gated, by_channel, delta, decode]
FURTHER = [pytest.param(op, marks=pytest.mark.slow) for op in (window, linformer)]


def graded(op):
    """A number of op's results, and its gradient."""

    def loss(given, masks):
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(op(given, *masks)))

    return jax.value_and_grad(loss)


def on_devices(function, mesh, axes):
    """Check that simulated TPUs give together what one gives; the rows that each of them has."""
    given = problem()
    spread = jax.device_put(given, NamedSharding(mesh, PartitionSpec()))
    with use("tpu", interpret=pltpu.InterpretParams()):
        alone = quick(function)(*given)
        divided = quick(kernels.divide(mesh, axes)(function)).trace(*spread)
        same(divided.lower().compile()(*spread), alone)
    bodies = [x.params["jaxpr"] for x in divided.jaxpr.eqns if x.primitive.name == "shard_map"]
    return {body.invars[0].aval.shape[0] for body in bodies}


@pytest.mark.parametrize("op", [*OPS, *FURTHER])
def test_it_gives_what_one_device_gives(op):
    assert on_devices(lambda given, masks: op(given, *masks), mesh_of(4), "data") == {1}


@pytest.mark.parametrize("op", [softmax, pytest.param(favor, marks=pytest.mark.slow)])
def test_so_do_its_gradients(op):
    assert on_devices(graded(op), mesh_of(4), "data") == {1}


@pytest.mark.parametrize(
    ("shape", "axes", "rows"),
    [((2, 2), ("data", "model"), 1), ((2, 2), "model", 2), ((3,), "data", 4)],
)
def test_several_axes_and_a_batch_that_they_do_not_divide(shape, axes, rows):
    function = lambda given, masks: gated(given, *masks)  # noqa: E731
    assert on_devices(function, mesh_of(*shape), axes) == {rows}


@pytest.mark.parametrize("devices", [4, 3])  # 3 do not divide the batch
def test_gradients_of_what_is_split_and_of_what_is_whole(devices):
    x, w = (jnp.asarray(support.draw(shape, seed=2)) for shape in ((4, 5), (5, 3)))

    def loss(x, w):
        return jnp.sum(jnp.sin(by_batch(jnp.matmul, x, whole=w)))

    alone = jax.value_and_grad(loss, (0, 1))
    divided = kernels.divide(mesh_of(devices), "data")(alone)
    for a, b in zip(
        jax.tree.leaves(jax.jit(divided)(x, w)), jax.tree.leaves(alone(x, w)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_an_axis_that_the_mesh_lacks_is_named():
    with (
        pytest.raises(ValueError, match="the mesh has no axis 'batch'; it has: data, model"),
        kernels.divide(mesh_of(2, 2), "batch"),
    ):
        pass
