"""An op beside its float64 reference: outputs and gradients of both."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels import Mask
from tests import support

MASKS = ("none", "padding", "segments", "causal", "all")


class Both(NamedTuple):
    """(output, gradients by name) of the op and of the reference, as float64 arrays."""

    out: Any
    expected: Any
    grads: dict[str, Any]
    expected_grads: dict[str, Any]


def mask_of(name: str, length: int) -> dict[str, Any]:
    """The arrays of a mask: ragged rows, as in the contract tests; the last row sees nothing."""
    return {
        "keys": support.ragged_keys(length) if name in ("padding", "all") else None,
        "segments": support.ragged_segments(length) if name in ("segments", "all") else None,
        "causal": name in ("causal", "all"),
    }


def arrays(seed: int = 0, dtype=np.float32, **shapes) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {k: random.standard_normal(s).astype(dtype) for k, s in shapes.items()}


def evaluate(function, given, mask, cotangent, options):
    """Output and gradients of <output, cotangent> by every array of `given`."""
    causal = mask["causal"]

    def call(given, keys, segments, cotangent):
        said = Mask(causal=causal, keys=keys, segments=segments)
        out, back = jax.vjp(lambda given: function(**given, mask=said, **options), given)
        return out, back(cotangent.astype(out.dtype))[0]

    run = jax.jit(call, compiler_options=support.fast())
    out, grads = run(given, mask["keys"], mask["segments"], cotangent)
    wide = lambda x: np.asarray(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, np.float64)  # noqa: E731
    return wide(out), jax.tree.map(wide, grads)


def both(op, reference, given, mask, *, op_options=None, dtype=None, **options) -> Both:
    """Both on the same numbers; `dtype` rounds what the op and the reference get."""
    if dtype is not None:
        given = {k: v if k == "log_scale" else jnp.asarray(v, dtype) for k, v in given.items()}
    shape = jax.eval_shape(lambda g: op(**g, **options), given).shape
    cotangent = support.draw(shape, seed=9)
    out, grads = evaluate(op, given, mask, cotangent, options | (op_options or {}))
    wide = {k: np.asarray(v, np.float64) for k, v in given.items()}
    with jax.enable_x64(True):
        expected, expected_grads = evaluate(
            reference, wide, mask, cotangent.astype(np.float64), options
        )
    return Both(out, expected, grads, expected_grads)


def agree(result: Both, *, forward: float = 1e-5, backward: float = 2e-5) -> None:
    """Relative 2-norms; a gradient that vanishes is compared with the size of the others."""
    assert np.isfinite(result.out).all()
    assert support.relative(result.out, result.expected) < forward
    size = max(np.linalg.norm(g) for g in result.expected_grads.values())
    for name, expected in result.expected_grads.items():
        off = np.linalg.norm(result.grads[name] - expected)
        assert np.isfinite(off) and off <= backward * (np.linalg.norm(expected) + 0.1 * size), name
