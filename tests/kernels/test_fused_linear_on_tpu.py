"""Fused linear attention in the simulator of a TPU, under transformations, exported, refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from kernels import LinearState, Mask, linear_attention_init
from kernels.fused import linear as fused_linear
from kernels.fused.passes import Projection
from kernels.pallas_tpu import linear as kernels_on_tpu
from tests.kernels.compare import arrays, mask_of
from tests.kernels.fused_linear import (
    ALL,
    CAUSAL,
    decaying,
    favor,
    features,
    gated,
    linear,
    queries,
    quick,
    rows,
    slow,
    together,
)
from tests.kernels.simulated import SIMULATOR, pallas

pytestmark = pallas


def simulated(op, given, mask, **options):
    def run(**given):
        return op(**given, interpret=SIMULATOR, **options)

    def plain(**given):
        return op(**given, interpret=True, **options)

    for name, function in (("simulated", run), ("plain", plain)):
        call = lambda given: jnp.sum(jnp.sin(function(**given, mask=mask)))  # noqa: B023, E731
        out = quick(jax.value_and_grad(call))(given)
        if name == "simulated":
            got = jax.tree.map(np.asarray, out)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(out), strict=True):
        assert np.isfinite(a).all()
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_simulator_of_tpu_finds_no_race_and_nothing_unwritten():
    said = mask_of("all", 140)
    mask = Mask(
        causal=True, keys=jnp.asarray(said["keys"][:1]), segments=jnp.asarray(said["segments"][:1])
    )
    given = jax.tree.map(jnp.asarray, features(140, batch=1, scale=1.0))
    simulated(linear, given, mask)


@pytest.mark.parametrize("mask", [ALL, pytest.param(CAUSAL, marks=slow)], ids=["all", "causal"])
def test_the_simulator_of_tpu_runs_favor(mask):
    given = jax.tree.map(jnp.asarray, queries(140, batch=1))
    simulated(favor, given, mask, weight=rows(24, 64))


@slow
def test_the_simulator_of_tpu_runs_gated():
    given = jax.tree.map(jnp.asarray, decaying(140, batch=1))
    state = jnp.asarray(arrays(3, s=(1, 2, 32, 32))["s"])
    simulated(together(gated), given | {"initial_state": state}, CAUSAL)


@slow
def test_the_simulator_of_tpu_runs_heads_beside_each_other():
    given = features(140, batch=1, heads=2, dim=128)
    given = {name: jnp.asarray(x, jnp.bfloat16) for name, x in given.items()}
    simulated(linear, given, CAUSAL)


@slow
def test_the_simulator_of_tpu_runs_what_reads_all_keys():
    simulated(linear, jax.tree.map(jnp.asarray, features(140, batch=1)), ALL)


def test_a_projection_between_bfloat16_numbers_is_not_rounded_to_them():
    """Rows all as far above one as can be: rounded, features are 1 % off, and to the same side."""
    rounded = np.asarray(jnp.asarray(rows(64, 32) * 32**-0.25, jnp.bfloat16), np.float64)
    weight, half = rounded * (1 + 0.95 * 2.0**-9), 0.5 * 32**-0.5
    given = arrays(k=(1, 128, 1, 32), v=(1, 128, 1, 32))
    k, v = (jnp.asarray(x, jnp.bfloat16) for x in given.values())
    none = jnp.zeros((1, 1, 128))
    projection = Projection(jnp.asarray(weight, jnp.float32), half, None, none)
    how = {"end": None, "projection": projection, "chunk": 128, "interpret": True}
    total = kernels_on_tpu.sums(k, v, **how)[1]
    zeros, ones = jnp.zeros((1, 1, 64, 32)), jnp.ones((1, 1, 64))
    grad = kernels_on_tpu.sums_backward(k, v, zeros, ones, **how)[0]
    top = kernels_on_tpu.log_scale(k, projection.weight, half, interpret=True)
    x = np.asarray(k, np.float64)[0, :, 0]
    logits = x @ weight.T - half * np.square(x).sum(-1, keepdims=True)
    phi = np.exp(logits - logits.max(-1, keepdims=True))
    expected = phi @ weight - 2 * half * x * phi.sum(-1, keepdims=True)
    longer = lambda a, b: np.vdot(np.asarray(a, np.float64), b) / np.vdot(b, b) - 1  # noqa: E731
    assert abs(longer(total, phi.sum(0))) < 1e-3
    assert abs(longer(grad, expected)) < 1.5e-3
    assert np.abs(np.asarray(top).ravel() - logits.max(-1)).max() < 1e-3


def loss(op):
    return lambda given: jnp.sum(jnp.sin(op(**given)))


def test_vmap_and_checkpoint():
    given = jax.tree.map(jnp.asarray, queries(40, batch=4, dim=32))
    weight = rows(24, 32)
    call = loss(lambda **x: favor(**x, weight=weight, mask=CAUSAL))
    expected = quick(jax.value_and_grad(call))(given)

    def mapped(given):
        apart = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), given)
        return jnp.sum(jax.vmap(jax.checkpoint(call))(apart))

    got = quick(jax.value_and_grad(mapped))(given)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_batch_and_heads_over_devices():
    """Inside shard_map, whose check of what varies where the simulator takes, each runs its own."""
    given = jax.tree.map(jnp.asarray, features(40, batch=2, heads=2, scale=1.0))
    call = lambda given: linear(**given, mask=CAUSAL, interpret=pltpu.InterpretParams())  # noqa: E731
    expected = quick(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(call(x)))))(given)
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "head"), axis_types=auto, devices=jax.devices()[:4])

    def total(given):
        return jax.lax.psum(jnp.sum(jnp.sin(call(given))), ("data", "head"))

    spec = PartitionSpec("data", None, "head")
    mapped = jax.shard_map(total, mesh=mesh, in_specs=spec, out_specs=PartitionSpec())
    got = quick(jax.value_and_grad(mapped))(given)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def of_chip(op, mask, dtype, dim, **how):
    """Arguments and the gradient of an op, to be lowered for a TPU."""
    shape = jax.ShapeDtypeStruct((2, 300, 4, dim), dtype)
    numbers = jax.ShapeDtypeStruct((2, 300, 4), jnp.float32)
    given = {"q": shape, "k": shape, "v": shape}
    given |= {name: numbers for name in how.pop("numbers", ())}

    def call(given):
        out = op(**given, mask=mask, interpret=None, **how)
        return jnp.sum((out[0] if isinstance(out, tuple) else out).astype(jnp.float32))

    return jax.jit(jax.grad(call)), given


CASES = {
    "linear": (linear, CAUSAL, {"numbers": ["log_scale"]}),
    "both ways": (linear, ALL, {}),
    "gated": (gated, CAUSAL, {"numbers": ["log_decay"]}),
    "favor": (favor, CAUSAL, {"weight": rows(256, 64)}),
    "favor both ways": (favor, ALL, {"weight": rows(256, 64)}),
}


@pytest.mark.parametrize("name", CASES)
def test_export_for_tpu(name):
    op, mask, how = CASES[name]
    run, given = of_chip(op, mask, jnp.bfloat16, 64, **how)
    made = jax.export.export(run, platforms=["tpu"])(given)
    assert "tpu_custom_call" in made.mlir_module()
    if name == "favor":
        pytest.importorskip("flatbuffers", reason="jax.export writes with flatbuffers")
        jax.export.deserialize(made.serialize())


def test_vmap_lowers_for_tpu():
    run, given = of_chip(linear, CAUSAL, jnp.bfloat16, 128)
    given = {name: jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for name, x in given.items()}
    jax.jit(jax.vmap(run)).trace(given).lower(lowering_platforms=("tpu",))


def test_no_array_of_features_is_written_out():
    """Of FAVOR+: nothing as long as T is as wide as R, forward or backward."""
    run, given = of_chip(favor, CAUSAL, jnp.bfloat16, 64, weight=rows(200, 64))
    made = jax.make_jaxpr(run)(given)
    shapes = set()

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            shapes.update(v.aval.shape for v in eqn.outvars)
            if eqn.primitive.name == "pallas_call":
                continue
            for inner in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(made.jaxpr)
    assert any(384 in s or 300 in s for s in shapes), "tokens have been seen"
    assert not [s for s in shapes if 200 in s and (384 in s or 300 in s)]


@pytest.mark.parametrize(
    ("reason", "call"),
    [
        ("float16", lambda x: linear(**{n: y.astype(jnp.float16) for n, y in x.items()},
                                     mask=ALL)),
        ("512", lambda x: favor(**x, weight=np.ones((600, 32)), mask=CAUSAL)),
        ("blocks of 128 lanes", lambda x: linear(**{n: y.repeat(9, 2)[:, :, :17, :30]
                                                    for n, y in x.items()}, mask=CAUSAL)),
    ],
)  # fmt: skip
def test_what_no_kernel_takes_is_refused_with_a_reason(reason, call, monkeypatch):
    said = []
    for name in ("refuse_linear", "refuse_favor"):
        real = getattr(fused_linear, name)
        monkeypatch.setattr(
            fused_linear, name, lambda *a, _real=real, **k: said.append(_real(*a, **k)) or said[-1]
        )
    with pytest.raises(AssertionError):
        call({name: jnp.asarray(x) for name, x in features(9).items()})
    assert reason in said[0]


def test_a_cpu_has_no_kernels():
    x = jnp.ones((1, 4, 1, 8))
    how = {"features": None, "log_scale": None, "mask": CAUSAL, "chunk": 128}
    assert "cpu" in fused_linear.refuse_linear(x, x, x, **how)
    assert isinstance(linear_attention_init(1, 1, 2, 3), LinearState)
