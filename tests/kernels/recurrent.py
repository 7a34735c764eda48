"""What the tests of the two recurrent ops share: outputs and last state as one array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import Mask
from kernels.target import use
from tests import support
from tests.kernels.compare import arrays, both, mask_of

HOPPER = tuple(
    pytest.param(length, mask, how, marks=pytest.mark.slow)
    for length, mask, how in (
        (1, "causal", {}),
        (7, "all", {}),
        (63, "causal", {"heads": 3}),
        (100, "all", {"key": 48, "value": 96}),
        (257, "all", {"key": 128, "value": 128}),
    )
)
"""Lengths, masks and sizes of both ops' tests there: those of the kernels and others."""


def joined(function):
    """`function` with its outputs [B, T, H, D] and its state [B, H, R, D] in one array [B, N]."""

    def call(*args, **options):
        out, state = function(*args, **options)
        flat = [x.reshape(len(x), -1).astype(jnp.float32) for x in (out, state)]
        if out.dtype == jnp.float64:
            flat = [x.reshape(len(x), -1) for x in (out, state)]
        return jnp.concatenate(flat, axis=1)

    return call


def fused(op, chip, interpret):
    """`joined` of `op` by a chip's kernels."""

    def call(*args, **options):
        with use(chip, interpret):
            return joined(op)(*args, backend="pallas", **options)

    return call


def compared(op, reference, given, mask, *, chunk=16, **options):
    return both(joined(op), joined(reference), given, mask, op_options={"chunk": chunk}, **options)


def causal_mask(name: str, length: int, *, batch: int | None = None):
    """`mask_of`, causal, of the first `batch` rows."""
    mask = mask_of(name, length) | {"causal": True}
    return {key: x[:batch] if isinstance(x, np.ndarray) else x for key, x in mask.items()}


def tokens(length, *, heads=2, groups=2, key=5, value=4, state=True, batch=4, seed=0):
    """Queries, keys, values and, if asked for, an initial state."""
    shapes = {"q": (batch, length, groups, key), "k": (batch, length, groups, key)}
    shapes["v"] = (batch, length, heads, value)
    if state:
        shapes["initial_state"] = (batch, heads, key, value)
    return arrays(seed, **shapes)


def decays(shape, *, seed=1, depth=20.0):
    """Logarithms of decays, most near 0, some down to -`depth`."""
    random = np.random.default_rng(seed)
    return (-depth * random.uniform(size=shape) ** 6).astype(np.float32)


def delta_problem(length, *, heads=2, key=32, value=32, top=2.0, **options):
    """Of the gated delta rule: keys of length 1; beta in (0, top); decays from 1 to e^-20."""
    given = tokens(length, heads=heads, groups=heads, key=key, value=value, **options)
    given["k"] /= np.linalg.norm(given["k"], axis=-1, keepdims=True)
    shape = given["v"].shape[:3]
    beta = np.random.default_rng(3).uniform(0, top, shape).astype(np.float32)
    return given | {"beta": beta, "log_decay": decays(shape)}


def channel_problem(length, *, batch=4, heads=2, groups=None, key=32, value=32):
    """Of a decay per channel: log decays from -1e-3 to -10, and now and then -1e7 and -inf."""
    like = (batch, length, groups or heads, key)
    given = arrays(0, q=like, k=like, v=(batch, length, heads, value))
    given["q"] /= key**0.5
    given["k"] /= np.linalg.norm(given["k"], axis=-1, keepdims=True)
    decay = -(10.0 ** np.random.default_rng(1).uniform(-3, 1, (batch, length, heads, key)))
    decay[:, 11::29], decay[:, 13::31, :, ::3] = -1e7, -np.inf
    given["log_decay"] = decay.astype(np.float32)
    return given | arrays(3, initial_state=(batch, heads, key, value))


def off_of_decays(op, given, chip, interpret) -> float:
    """How far a chip's gradient of mild decays is off in bfloat16, beside XLA's in float32.

    It is a sum of differences over all tokens, whose errors would add up.
    """
    given = given | {"log_decay": given["log_decay"] / 50}
    cotangent = support.draw(given["v"].shape, seed=9)

    rounded = {n: jnp.asarray(x, jnp.bfloat16) for n, x in given.items() if n in "qkv"}

    def gradient(backend, dtype):
        rest = jax.tree.map(jnp.asarray, given)
        rest |= {n: x.astype(dtype) for n, x in rounded.items()}

        def loss(log_decay):
            mine = rest | {"log_decay": log_decay}
            out, last = op(**mine, mask=Mask(causal=True), backend=backend)
            return jnp.sum(out.astype(jnp.float32) * cotangent) + jnp.sum(jnp.sin(last))

        return jax.jit(jax.grad(loss))(rest["log_decay"])

    expected = gradient("xla", jnp.float32)
    with use(chip, interpret):
        return support.relative(gradient("pallas", jnp.bfloat16), expected)


def halves_give_the_whole(op, given, length, cut, **options):
    """The state after `cut` tokens, handed on, is all that the rest needs to know."""
    keys, segments = support.ragged_keys(length), support.ragged_segments(length)
    assert (segments[:, cut] == segments[:, cut - 1]).all(), "the cut lies inside a segment"

    def part(at, state):
        mask = Mask(
            causal=True, keys=jnp.asarray(keys[:, at]), segments=jnp.asarray(segments[:, at])
        )
        there = {k: v[:, at] for k, v in given.items() if k != "initial_state"}
        return op(**there, initial_state=state, mask=mask, **options)

    whole, last = part(slice(None), given["initial_state"])
    first, state = part(slice(0, cut), given["initial_state"])
    second, end = part(slice(cut, None), state)
    np.testing.assert_allclose(np.concatenate([first, second], 1), whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(end, last, rtol=1e-5, atol=1e-5)
