"""The fused softmax ops on a TPU run block by block, `interpret=True`, and their inputs."""

import functools

import jax.numpy as jnp
import pytest

from kernels import Mask, reference
from kernels.fused import softmax as fused_softmax
from kernels.fused.softmax import Tiles
from kernels.target import use
from tests.kernels.compare import arrays

WINDOWS = ((0, 0), (3, 2), (16, 0), (1000, 5), (1000, 1000))
SMALL, NONE = Tiles(16, 8), Mask()


def qkv(length, *, keys=None, heads=2, groups=2, dim=64, batch=4, seed=0):
    keys = length if keys is None else keys
    like = (batch, keys, groups, dim)
    return arrays(seed, q=(batch, length, heads, dim), k=like, v=like)


def softmax(q, k, v, *, mask=NONE, tiles=SMALL, interpret=True):
    with use("tpu", interpret):
        how = {"mask": mask, "scale": q.shape[-1] ** -0.5}
        assert fused_softmax.refuse_softmax(q, k, v, **how) is None
        return fused_softmax.softmax(q, k, v, tiles=tiles, **how)


def linformer(q, k, v, *, mask=NONE, tiles=None, interpret=True):
    with use("tpu", interpret):
        assert fused_softmax.refuse_linformer(q, k, v, alive=mask.keys) is None
        return fused_softmax.linformer(q, k, v, alive=mask.keys, tiles=tiles)


def window(q, k, v, *, mask=NONE, left, right, tiles=SMALL, interpret=True):
    with use("tpu", interpret):
        how = {"mask": mask, "left": left, "right": right}
        assert fused_softmax.refuse_window(q, k, v, **how) is None
        return together(fused_softmax.window(q, k, v, tiles=tiles, **how))


def expected_window(q, k, v, **how):
    return together(reference.window_attention(q, k, v, **how))


def together(part):
    """out, and log-sum-exp as a channel of its own: both have a gradient."""
    out, lse = part
    return jnp.concatenate([out, jnp.where(jnp.isfinite(lse), lse, -9.0)[..., None]], axis=-1)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
