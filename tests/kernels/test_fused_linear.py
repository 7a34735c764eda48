"""Fused linear attention on a simulated TPU, against the references in float64.

`interpret=True` runs a kernel block by block; the simulator of TPU has its memories, filled with
NaN, its copies and a detector of races as well. Chunks have 128 tokens at least: of the lengths,
257 is three chunks.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from kernels import LinearState, Mask, linear_attention_init, reference
from kernels.favor_attention import causal_favor_attention, favor_features
from kernels.fused import linear as fused_linear
from kernels.linear_attention import _xla_causal
from kernels.target import use
from tests import support
from tests.kernels.compare import MASKS, agree, arrays, both, mask_of

SIMULATOR = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
REFUSED = {"segments"}
"""Masks that the kernels leave to XLA."""
ALL, CAUSAL = Mask(), Mask(causal=True)
slow = pytest.mark.slow


def linear(q, k, v, *, log_scale=None, mask=ALL, interpret=True):
    how = {"features": None, "log_scale": log_scale, "mask": mask, "chunk": 128}
    with use("tpu", interpret):
        assert fused_linear.refuse_linear(q, k, v, **how) is None
        return fused_linear.linear(q, k, v, **how)


def continued(q, k, v, state, *, log_scale=None, mask=CAUSAL):
    how = {"features": None, "log_scale": log_scale, "mask": mask, "chunk": 128}
    with use("tpu", True):
        assert fused_linear.refuse_causal(q, k, v, state, **how) is None
        return fused_linear.causal(q, k, v, state, **how)


def by_xla(q, k, v, state, *, log_scale=None, mask=CAUSAL):
    how = {"features": lambda x, at: (x, None), "log_scale": log_scale, "mask": mask, "chunk": 16}
    return _xla_causal(q, k, v, state, **how)


def gated(q, k, v, log_decay, *, initial_state=None, mask=CAUSAL, interpret=True):
    how = {"mask": mask, "chunk": 64, "state": initial_state}
    with use("tpu", interpret):
        assert fused_linear.refuse_gated(q, k, v, log_decay, **how) is None
        return fused_linear.gated(q, k, v, log_decay, **how)


def favor(q, k, v, *, weight, mask=ALL, state=None, interpret=True):
    """`weight` is as the op has it, D^-1/4 not in it."""
    weight, half = jnp.asarray(weight * q.shape[3] ** -0.25), 0.5 * q.shape[3] ** -0.5
    with use("tpu", interpret):
        assert fused_linear.refuse_favor(q, k, v, weight, mask=mask) is None
        return fused_linear.favor(q, k, v, weight, half=half, mask=mask, chunk=128, state=state)


def favor_reference(q, k, v, *, weight, mask):
    weight = jnp.asarray(weight)
    (q, _), (k, scale) = (favor_features(x, weight, feature_map="positive") for x in (q, k))
    q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))
    scale = jnp.repeat(scale, v.shape[2] // scale.shape[2], axis=2)
    return reference.linear_attention(q, k, v, log_scale=scale, mask=mask)


def quick(function):
    return jax.jit(function, compiler_options=support.fast())


def together(function):
    """The outputs and the state that is left as one array, for gradients through both."""

    def call(*given, **how):
        out, state = function(*given, **how)
        return jnp.concatenate([out.reshape(out.shape[0], -1), state.reshape(len(state), -1)], 1)

    return call


def features(length, *, keys=None, batch=4, heads=2, dim=32, scale=None, seed=0):
    keys = length if keys is None else keys
    like = (batch, keys, heads, dim)
    given = arrays(seed, q=(batch, length, heads, dim), k=like, v=like)
    given["q"], given["k"] = np.exp(given["q"]), np.exp(given["k"])
    if scale is not None:
        given["log_scale"] = scale * arrays(seed + 1, s=(batch, keys, heads))["s"]
    return given


def decaying(length, *, batch=4, heads=2, groups=1, dim=32, seed=0):
    """Log decays from -1e-3 down to -10, and now and then -1e7: all is forgotten."""
    like = (batch, length, groups, dim)
    given = arrays(seed, q=like, k=like, v=(batch, length, heads, dim))
    given["q"], given["k"] = (given[x] / dim**0.5 for x in "qk")
    random = np.random.default_rng(seed + 1)
    decay = -(10.0 ** random.uniform(-3, 1, (batch, length, heads)))
    decay[:, 11::29] = -1e7
    return given | {"log_decay": decay.astype(np.float32)}


def queries(length, *, keys=None, batch=4, heads=2, groups=2, dim=64, seed=0):
    keys = length if keys is None else keys
    like = (batch, keys, heads, dim)
    return arrays(seed, q=(batch, length, heads, dim), k=(batch, keys, groups, dim), v=like)


def rows(rank, dim, seed=5):
    return arrays(seed, w=(rank, dim))["w"]


@pytest.mark.parametrize(
    ("length", "mask", "how"),
    [
        (257, "all", {"scale": 1.0}),
        pytest.param(100, "causal", {"dim": 64}, marks=slow),
        (63, "padding", {"keys": 300, "dim": 128, "scale": 3.0}),
    ]
    + [
        pytest.param(length, mask, {"dim": dim, "scale": scale}, marks=slow)
        for dim, scale in ((32, 1.0), (64, None), (128, 1.0))
        for mask in MASKS
        if mask not in REFUSED
        for length in (1, 7, 63, 100, 257)
    ],
)
def test_linear(length, mask, how):
    given = features(length, **how)
    agree(both(linear, reference.linear_attention, given, mask_of(mask, how.get("keys", length))))


@pytest.mark.parametrize(
    ("length", "mask", "rank", "how"),
    [(257, "all", 100, {"dim": 32}), (63, "padding", 256, {"keys": 200})]
    + [
        pytest.param(length, mask, rank, {"dim": dim, "groups": 1}, marks=slow)
        for rank, dim in ((20, 32), (256, 64), (64, 128))
        for mask in MASKS
        if mask not in REFUSED
        for length in (1, 7, 63, 100, 257)
    ],
)
def test_favor(length, mask, rank, how):
    given = queries(length, **how)
    options = {"weight": rows(rank, given["q"].shape[3])}
    said = mask_of(mask, how.get("keys", length))
    agree(both(favor, favor_reference, given, said, **options))


@pytest.mark.parametrize(
    ("length", "mask", "how"),
    [(257, "all", {"heads": 4})]
    + [
        pytest.param(length, mask, how, marks=slow)
        for how in ({"dim": 32}, {"dim": 64, "groups": 2}, {"dim": 128})
        for mask in ("causal", "all")
        for length in (1, 7, 63, 100, 257)
    ],
)
def test_gated(length, mask, how):
    """Decays of -30 and less leave 1e-13, not nothing, and sums of them 1e-4 of precision."""
    given = decaying(length, **how)
    state = arrays(3, s=(4, *(given["v"].shape[2],), *(given["v"].shape[3],) * 2))["s"]
    given["initial_state"] = state
    result = both(
        together(gated), together(reference.gated_linear_attention), given, mask_of(mask, length)
    )
    agree(result, forward=1e-4, backward=2e-4)


@pytest.mark.parametrize("sign", [1, pytest.param(-1, marks=slow)])
def test_scales_of_e_to_the_50_leave_every_row_its_own_precision(sign):
    """Chunks below and above: what the first chunk holds is e^-100 of what the next one does."""
    given = features(257)
    steps = sign * np.where(np.arange(257) % 200 < 100, -50.0, 50.0)
    noise = arrays(3, s=(4, 257, 2))["s"]
    given["log_scale"] = (steps[None, :, None] + noise).astype(np.float32)
    mask = mask_of("all", 257)
    result = both(linear, reference.linear_attention, given, mask)
    agree(result, forward=2e-5, backward=5e-5)


def test_no_later_key_has_a_say():
    """Not by a rounding: rows before it are equal bit by bit, whatever is changed."""
    given = features(150, batch=1, scale=50.0)
    other = {name: x.copy() for name, x in given.items()}
    other["log_scale"][:, 77:] += 30.0
    other["v"][:, 77:] *= -3.0
    other["k"][:, 77:] += 1.0
    run = quick(lambda x: linear(**x, mask=CAUSAL))
    here, there = (np.asarray(run(x)) for x in (given, other))
    np.testing.assert_array_equal(here[:, :77], there[:, :77])
    assert (here[:, 77] != there[:, 77]).any()
    raw, weight = queries(150, batch=1), rows(40, 64)
    other = {name: np.concatenate([x[:, :77], 2 * x[:, 77:]], 1) for name, x in raw.items()}
    run = quick(lambda x: favor(**x, weight=weight, mask=CAUSAL))
    here, there = (np.asarray(run(x)) for x in (raw, other))
    np.testing.assert_array_equal(here[:, :77], there[:, :77])
    assert (here[:, 77] != there[:, 77]).any()


@pytest.mark.parametrize(
    "op",
    [pytest.param("linear", marks=slow), "linear, heads beside each other", "favor", "gated"],
)
def test_bfloat16_is_a_rounding_away(op):
    if op == "gated":
        given = decaying(150, heads=2, dim=64)
        given["log_decay"] = np.asarray(jnp.asarray(given["log_decay"], jnp.bfloat16), np.float32)
        call = lambda log_decay, **x: gated(log_decay=log_decay.astype(jnp.float32), **x)[0]  # noqa: E731
        expected = lambda **x: reference.gated_linear_attention(**x)[0]  # noqa: E731
        result = both(call, expected, given, mask_of("all", 150), dtype=jnp.bfloat16)
    elif op == "linear":
        given, mask = features(150, dim=64, scale=1.0), mask_of("all", 150)
        result = both(linear, reference.linear_attention, given, mask, dtype=jnp.bfloat16)
    elif op == "linear, heads beside each other":
        given, mask = features(257, batch=4, heads=4, dim=128), mask_of("causal", 257)
        result = both(linear, reference.linear_attention, given, mask, dtype=jnp.bfloat16)
    else:
        given, options = queries(150), {"weight": rows(256, 64)}
        mask = mask_of("all", 150)
        result = both(favor, favor_reference, given, mask, dtype=jnp.bfloat16, **options)
    agree(result, forward=5e-3, backward=1e-2)


@pytest.mark.parametrize("cut", [100, pytest.param(128, marks=slow), pytest.param(1, marks=slow)])
def test_a_sequence_cut_in_two_gives_what_it_gives_whole(cut):
    """With the XLA path's states, which go over from one to the other."""
    given = jax.tree.map(jnp.asarray, features(200, batch=2, scale=20.0))
    keys = jnp.asarray(np.random.default_rng(0).random((2, 200)) < 0.7).at[:, :3].set(False)
    segments = jnp.asarray(np.arange(200) // 90)[None].repeat(2, 0)
    empty = linear_attention_init(2, 2, 32, 32)

    def part(at, state, run=continued):
        mask = Mask(causal=True, keys=keys[:, at], segments=segments[:, at])
        q, k, v, scale = (given[x][:, at] for x in ("q", "k", "v", "log_scale"))
        call = lambda q, k, v, state: run(q, k, v, state, log_scale=scale, mask=mask)  # noqa: E731
        return quick(call)(q, k, v, state)

    whole, last = part(slice(0, 200), empty, by_xla)
    for first in (continued, by_xla):
        begun, state = part(slice(0, cut), empty, first)
        rest, end = part(slice(cut, 200), state)
        np.testing.assert_allclose(jnp.concatenate([begun, rest], 1), whole, rtol=1e-4, atol=1e-5)
        size = float(jnp.max(jnp.abs(last.memory)))
        np.testing.assert_allclose(end.memory, last.memory, rtol=1e-4, atol=1e-5 * size)
        np.testing.assert_allclose(end.top, last.top)


@slow
@pytest.mark.parametrize("feature_map", ["positive", "hyperbolic"])
def test_favor_goes_on_from_the_xla_paths_state_and_back(feature_map):
    given, weight = jax.tree.map(jnp.asarray, queries(140, batch=1)), jnp.asarray(rows(24, 64))
    count = 24 if feature_map == "positive" else 48
    empty = linear_attention_init(1, 2, count, 64)

    def run(backend):
        how = {"feature_map": feature_map, "backend": backend}
        return quick(
            lambda x, state: causal_favor_attention(**x, projection=weight, state=state, **how)
        )

    with use("tpu", True):
        pallas, xla = run("pallas"), run("xla")
        out, state = pallas(given, empty)
        expected, left = xla(given, empty)
        held = [x.memory * jnp.exp(x.top)[..., None, None] for x in (state, left)]
        np.testing.assert_allclose(*held, rtol=1e-4, atol=1e-5 * float(jnp.abs(held[1]).max()))
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
        for first in (state, left):
            for second in (pallas, xla):
                again, wide = second(given, first)[0], xla(given, left)[0]
                np.testing.assert_allclose(again, wide, rtol=1e-4, atol=1e-5)


def test_gradients_go_through_the_state_into_the_first_part():
    given = jax.tree.map(jnp.asarray, features(140, batch=1, dim=16, scale=1.0))
    empty = linear_attention_init(1, 2, 16, 16)

    def total(given, run):
        at = lambda x, cut: {name: y[:, cut] for name, y in x.items()}  # noqa: E731
        first, state = run(**at(given, slice(0, 60)), state=empty)
        rest, left = run(**at(given, slice(60, 140)), state=state)
        read = jnp.sum(jnp.sin(first)) + jnp.sum(jnp.sin(rest))
        return read + jnp.sum(jnp.sin(left.memory / 1e3))

    got, expected = (
        quick(jax.grad(functools.partial(total, run=f)))(given) for f in (continued, by_xla)
    )
    for name in expected:
        assert support.relative(got[name], expected[name]) < 2e-5, name


@pytest.fixture
def races():
    """No race was found: jax 0.12 raises where it finds one, older ones note it."""
    before = tuple(int(x) for x in jax.__version__.split(".")[:2]) < (0, 12)
    home = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    yield
    if before and home.races is not None:
        assert not home.races.races_found


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


def test_the_simulator_of_tpu_finds_no_race_and_nothing_unwritten(races):
    said = mask_of("all", 140)
    mask = Mask(
        causal=True, keys=jnp.asarray(said["keys"][:1]), segments=jnp.asarray(said["segments"][:1])
    )
    given = jax.tree.map(jnp.asarray, features(140, batch=1, scale=1.0))
    simulated(linear, given, mask)


@pytest.mark.parametrize("mask", [ALL, pytest.param(CAUSAL, marks=slow)], ids=["all", "causal"])
def test_the_simulator_of_tpu_runs_favor(mask, races):
    given = jax.tree.map(jnp.asarray, queries(140, batch=1))
    simulated(favor, given, mask, weight=rows(24, 64))


@slow
def test_the_simulator_of_tpu_runs_gated(races):
    given = jax.tree.map(jnp.asarray, decaying(140, batch=1))
    state = jnp.asarray(arrays(3, s=(1, 2, 32, 32))["s"])
    simulated(together(gated), given | {"initial_state": state}, CAUSAL)


@slow
def test_the_simulator_of_tpu_runs_heads_beside_each_other(races):
    given = features(140, batch=1, heads=2, dim=128)
    given = {name: jnp.asarray(x, jnp.bfloat16) for name, x in given.items()}
    simulated(linear, given, CAUSAL)


@slow
def test_the_simulator_of_tpu_runs_what_reads_all_keys(races):
    simulated(linear, jax.tree.map(jnp.asarray, features(140, batch=1)), ALL)


def test_a_row_that_sees_nothing_is_zero_and_so_are_its_gradients():
    given = features(7, scale=1.0)
    for name in ("padding", "all"):
        result = both(linear, reference.linear_attention, given, mask_of(name, 7))
        np.testing.assert_array_equal(result.out[3], 0)
        for grad in result.grads.values():
            np.testing.assert_array_equal(grad[3], 0)


def test_what_is_not_a_number_is_not_hidden_unless_the_mask_hides_it():
    ones = jnp.ones((1, 3, 1, 128))
    bad, keys = ones.at[0, 1].set(jnp.nan), jnp.asarray([[True, False, True]])
    for causal in (False, True):
        run = quick(lambda q, k, v, keys: linear(q, k, v, mask=Mask(causal=causal, keys=keys)))  # noqa: B023
        assert jnp.isnan(run(bad, ones, ones, keys | True)[0, 1]).all()
        assert jnp.isnan(run(ones, bad, ones, keys | True)[0, 1:]).all()
        assert jnp.isfinite(run(ones, bad, bad, keys)).all()


def test_features_of_python_are_made_before_the_kernels_run():
    given = jax.tree.map(jnp.asarray, queries(60, batch=1, dim=32))
    phi = lambda x, at: (jnp.exp(x), jnp.sin(at)[:, :, None] + x[..., 0])  # noqa: E731
    how = {"features": phi, "log_scale": None, "mask": CAUSAL, "chunk": 128}
    with use("tpu", True):
        assert fused_linear.refuse_linear(**given, **how) is None
        out = quick(lambda x: fused_linear.linear(**x, **how))(given)
    (q, _), (k, scale) = (phi(given[x], jnp.arange(60)[None]) for x in "qk")
    expected = reference.linear_attention(q, k, given["v"], log_scale=scale, mask=CAUSAL)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


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
        ("segments", lambda x: linear(**x, mask=Mask(segments=jnp.zeros((4, 9), jnp.int32)))),
        ("float16", lambda x: linear(**{n: y.astype(jnp.float16) for n, y in x.items()},
                                     mask=ALL)),
        ("per channel", lambda x: gated(**x, log_decay=jnp.zeros((4, 9, 2, 32)), mask=CAUSAL)),
        ("512", lambda x: favor(**x, weight=np.ones((600, 32)), mask=CAUSAL)),
        ("blocks of 128 lanes", lambda x: linear(**{n: y.repeat(9, 2)[:, :, :17, :30]
                                                    for n, y in x.items()}, mask=CAUSAL)),
    ],
)  # fmt: skip
def test_what_no_kernel_takes_is_refused_with_a_reason(reason, call, monkeypatch):
    said = []
    for name in ("refuse_linear", "refuse_gated", "refuse_favor"):
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
