"""The fused linear-attention ops on a TPU run block by block, `interpret=True`, and their inputs.

Chunks have 128 tokens at least: of the lengths, 257 is three chunks.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import Mask, reference
from kernels.favor_attention import favor_features
from kernels.fused import linear as fused_linear
from kernels.linear_attention import _xla_causal
from kernels.target import use
from tests import support
from tests.kernels.compare import arrays

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
        assert fused_linear.refuse_favor(q, k, v, weight) is None
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
