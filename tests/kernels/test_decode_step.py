"""One token of a recurrence in XLA and on simulated chips, against the reference in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kernels import decode_step, linear_attention_init, linear_attention_step, reference
from kernels.decode_step import MODULES
from kernels.target import NEEDED, use
from tests import support
from tests.kernels.compare import arrays
from tests.kernels.simulated import SIMULATOR, pallas

FORMS = ("plain", "head", "channel", "delta", "gated delta")
VERSION = tuple(int(n) for n in jax.__version__.split(".")[:3])
slow = pytest.mark.slow


def problem(form, *, rows=24, columns=16, batch=2, heads=4, groups=2, seed=0):
    """A token and a state; of the decays one leaves nothing."""
    shapes = {"q": (batch, 1, groups, rows), "k": (batch, 1, groups, rows)}
    shapes |= {"v": (batch, 1, heads, columns), "state": (batch, heads, rows, columns)}
    given = arrays(seed, **shapes)
    given["k"] = given["k"] / np.linalg.norm(given["k"], axis=-1, keepdims=True)
    random = np.random.default_rng(seed + 1)
    if form != "plain" and form != "delta":
        shape = (batch, 1, heads, rows) if form == "channel" else (batch, 1, heads)
        given["log_decay"] = -(10.0 ** random.uniform(-3, 1, shape)).astype(np.float32)
        given["log_decay"][0, 0, 0] = -np.inf
    if "delta" in form:
        given["beta"] = random.uniform(0, 2, (batch, 1, heads)).astype(np.float32)
    return {name: jnp.asarray(x) for name, x in given.items()}


def quick(function, **how):
    return jax.jit(function, compiler_options=support.fast(), **how)


def expected_of(given):
    with jax.enable_x64(True):
        wide = {name: np.asarray(x, np.float64) for name, x in given.items()}
        return jax.tree.map(np.asarray, reference.decode_step(**wide))


def check(given, backend, tolerance=1e-6):
    made = quick(lambda given: decode_step(**given, backend=backend))(given)
    for a, b in zip(made, expected_of(given), strict=True):
        assert a.shape == b.shape and support.relative(a, b) < tolerance


def interpreter(chip):
    if chip == "tpu":
        return SIMULATOR
    if VERSION < NEEDED:
        pytest.skip("GPU kernels are interpreted from jax 0.11.2 on")
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams(detect_races=True)


@pytest.mark.parametrize("form", FORMS)
def test_in_xla(form):
    check(problem(form), "xla")


@pallas
@pytest.mark.parametrize(
    "form", ["plain", *(pytest.param(x, marks=slow) for x in FORMS[1:4]), "gated delta"]
)
@pytest.mark.parametrize("chip", MODULES)
def test_on_a_simulated_chip(chip, form, capfd):
    """Rows that are no whole block of Hopper's, heads that are no whole block of a TPU's."""
    with use(chip, interpreter(chip)):
        check(problem(form, rows=72, columns=24), "pallas")
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pallas
@slow
@pytest.mark.parametrize("rows, columns", [(8, 8), (64, 128), (128, 96), (200, 64)])
@pytest.mark.parametrize("chip", MODULES)
def test_sizes_on_a_simulated_chip(chip, rows, columns):
    with use(chip, interpreter(chip)):
        check(problem("gated delta", rows=rows, columns=columns, heads=3, groups=1), "pallas")


@pallas
@pytest.mark.parametrize("chip", MODULES)
def test_bfloat16_tokens_keep_a_float32_state(chip):
    given = problem("head")
    rounded = {n: x if n in ("state", "log_decay") else np.asarray(jnp.asarray(x, jnp.bfloat16))
               for n, x in given.items()}  # fmt: skip
    with use(chip, interpreter(chip)):
        out, state = quick(lambda x: decode_step(**x, backend="pallas"))(rounded)
    expected, left = expected_of({n: np.asarray(x, np.float32) for n, x in rounded.items()})
    assert out.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert support.relative(np.asarray(out, np.float32), expected) < 5e-3
    assert support.relative(state, left) < 1e-6


@pallas
@slow
def test_gradients_are_those_of_xla():
    given = problem("gated delta", rows=8, columns=8)
    given["log_decay"] = given["log_decay"].clip(-5)

    def loss(given, backend):
        out, state = decode_step(**given, backend=backend)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(state))

    expected = quick(jax.grad(functools.partial(loss, backend="xla")))(given)
    with use("tpu", True):
        got = quick(jax.grad(functools.partial(loss, backend="pallas")))(given)
    for name in given:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-6)


@pallas
def test_tokens_of_linear_attention_one_after_the_other():
    """Scales from e^-200 up, which the normaliser and the state are held beside."""
    given = arrays(q=(2, 6, 2, 16), k=(2, 6, 2, 16), v=(2, 6, 2, 8), scale=(2, 6, 2))
    given["q"], given["k"] = np.exp(given["q"]), np.exp(given["k"])
    given["scale"] = 30 * np.arange(6, dtype=np.float32)[None, :, None] + 10 * given["scale"] - 200

    def run(backend):
        def one(state, token):
            q, k, v, scale = (token[name][:, None] for name in ("q", "k", "v", "scale"))
            out, state = linear_attention_step(q, k, v, state, log_scale=scale, backend=backend)
            return state, out

        tokens = jax.tree.map(lambda x: jnp.swapaxes(jnp.asarray(x), 0, 1), given)
        return quick(lambda t: jax.lax.scan(one, linear_attention_init(2, 2, 16, 8), t))(tokens)

    expected = run("xla")
    with use("tpu", True):
        got = run("pallas")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@pallas
@pytest.mark.parametrize("chip", MODULES)
def test_vmap(chip):
    given = problem("delta", batch=4, heads=2)
    apart = {name: x.reshape(2, 2, *x.shape[1:]) for name, x in given.items()}
    how = True if chip == "tpu" else interpreter(chip)  # its simulator takes no further grid axis
    with use(chip, how):
        call = jax.vmap(lambda x: decode_step(**x, backend="pallas"))
        made = quick(call)(apart)
    for a, b in zip(made, expected_of(given), strict=True):
        assert support.relative(a.reshape(b.shape), b) < 1e-6


@pallas
@pytest.mark.parametrize("chip", MODULES)
def test_a_batch_over_devices(chip):
    """Over one where the simulator, that of Hopper, mixes up the barriers of several."""
    from jax.experimental.pallas import tpu as pltpu

    given, count = problem("gated delta"), 2 if chip == "tpu" else 1
    mesh = jax.make_mesh(
        (count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:count]
    )
    spec = PartitionSpec("data")
    with use(chip, pltpu.InterpretParams() if chip == "tpu" else interpreter(chip)):
        one = lambda x: decode_step(**x, backend="pallas")  # noqa: E731
        made = quick(jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec))(given)
    for a, b in zip(made, expected_of(given), strict=True):
        assert support.relative(a, b) < 1e-6


@pallas
@pytest.mark.parametrize("form", ["head", "gated delta"])
@pytest.mark.parametrize("chip", MODULES)
def test_export_changes_the_state_in_place(chip, form):
    interpreter(chip)  # or skip
    given = problem(form, rows=128, columns=128)
    state = given.pop("state")
    run = jax.jit(lambda state, x: decode_step(**x, state=state, backend="pallas"),
                  donate_argnums=0)  # fmt: skip
    with use(chip):
        made = jax.export.export(run, platforms=["tpu" if chip == "tpu" else "cuda"])(state, given)
    text = made.mlir_module()
    call = next(line for line in text.splitlines() if "custom_call @" in line and "alias" in line)
    assert "output_operand_alias" in call and "operand_index" in call
    assert ("@tpu_custom_call" if chip == "tpu" else "@mosaic_gpu") in call
    if form == "head":
        pytest.importorskip("flatbuffers", reason="jax.export writes with flatbuffers")
        jax.export.deserialize(made.serialize())


def test_what_it_cannot_do_is_refused():
    given = problem("head", groups=4, heads=6)
    with pytest.raises(ValueError, match="4 groups of keys do not divide 6 heads"):
        decode_step(**given)
    with pytest.raises(NotImplementedError, match="not for this cpu"):
        decode_step(**problem("head"), backend="pallas")
    if VERSION < NEEDED:
        return
    for chip, rows, word in (("hopper", 20, "multiples of 8"), ("hopper", 520, "up to 512 rows"),
                             ("tpu", 4096, "over 1048576 bytes")):  # fmt: skip
        wide = problem("head", rows=rows, columns=128)
        with use(chip), pytest.raises(NotImplementedError, match=word):
            decode_step(**wide, backend="pallas")
