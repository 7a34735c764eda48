"""Passes of linear attention over whole chunks, with their gradients, whatever the chip.

Inputs and outputs of a chip's module are put together here (`kernels.fused.linear` says what it
has): exponents into it, gradients out of it.
"""

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from kernels.fused import split
from kernels.fused.ways import finite, of_decays, of_scales

MODULES = {"tpu": "kernels.pallas_tpu.linear", "hopper": "kernels.pallas_gpu.linear"}
LEAST = 1e-30
"""A normaliser below this is none: its inverse, times values and their gradient, would overflow."""


class Projection(NamedTuple):
    """FAVOR+'s features of x: exp(<x, w_r> - half |x|^2 - shift), the largest of them 1.

    A shift is `log_scale`; None where the kernels find it themselves, or are asked for it.
    """

    weight: Float[Array, "R D"]
    half: float
    shift_q: Float[Array, "B G T"] | None
    shift_k: Float[Array, "B G T"] | None


class How(NamedTuple):
    """What is known when tracing. half: of the `Projection`, if there is one.

    pieces: into which the sequence of a causal pass is cut, see `kernels.fused.split`.
    """

    chip: str
    interpret: Any
    chunk: int
    normalise: bool
    half: float | None = None
    pieces: int = 1

    @property
    def module(self) -> ModuleType:
        """The chip's kernels."""
        return module_of(self.chip)


class Entry(NamedTuple):
    """What a pass over a sequence starts from: S, z and the log scale that both are held at."""

    sums: Float[Array, "B H R Dv"]
    normaliser: Float[Array, "B H R"]
    top: Float[Array, "B H"] | None


class Tokens(NamedTuple):
    """A sequence in whole chunks. log_decay is 0, k, v and `log_scale`'s exp are where padding is.

    weight: the projection that makes features of q and k, or None where they are features.
    """

    q: Float[Array, "B T Gq D"]
    k: Float[Array, "B T Gk D"]
    v: Float[Array, "B T Gv Dv"]
    weight: Float[Array, "R D"] | None
    log_scale: Float[Array, "B H T"] | None
    log_decay: Float[Array, "B H T"] | None
    segments: Int[Array, "B T"] | None


def module_of(chip: str) -> ModuleType:
    """The chip's kernels of linear attention."""
    return importlib.import_module(MODULES[chip])


def _heads(tokens: Tokens) -> int:
    return max(x.shape[2] for x in tokens[:3])


def _pass_forward(how: How, tokens: Tokens, entry: Entry | None):
    projection = _projection(how, tokens.q, tokens.k, tokens.weight)
    ways, top = _ways(how, tokens, entry, projection)
    given = split.cut(how.pieces, tokens[:3], ways, projection)
    state = None if entry is None else (entry.sums, entry.normaliser)
    if how.pieces > 1:
        state = split.states_before(how, given, state)
    out, den, left = how.module.forward(
        *given[:4], state=state, projection=given.projection, normalise=how.normalise,
        chunk=how.chunk, interpret=how.interpret,
    )  # fmt: skip
    out, den = split.whole(how.pieces, out), split.whole_numbers(how.pieces, den)
    left = split.place(how.pieces, left, -1)
    held = (out, den) if how.normalise else ()
    return (out, Entry(*left, top)), (tokens, entry, projection, ways, held, state)


def _pass_backward(how: How, residuals, cotangents):
    tokens, entry, projection, ways, held, state = residuals
    dout, dleft = cotangents
    inverse, r = _quotient(dout, *held) if how.normalise else _plain(tokens, dout)
    given = split.cut(how.pieces, tokens[:3], ways, projection)
    dout = split.tokens(how.pieces, dout)
    inverse, r = (split.numbers(how.pieces, x) for x in (inverse, r))
    dlast = dleft.sums, dleft.normaliser
    if how.pieces > 1:
        dlast = split.grads_after(how, given, dout, inverse, r, dlast)
    dq, dk, dv, q_dq, k_dk, dstate, last = how.module.backward(
        *given[:4], dout=dout, inv_den=inverse, r=r, state=state, dstate=dlast,
        projection=given.projection, normalise=how.normalise, chunk=how.chunk,
        interpret=how.interpret,
    )  # fmt: skip
    dq, dk, dv = (split.whole(how.pieces, x) for x in (dq, dk, dv))
    dstate = split.place(how.pieces, dstate, 0)
    log_decay = None
    if tokens.log_decay is not None:
        crossing = jnp.sum(last * dlast[0], axis=(2, 3))[..., None]
        log_decay = split.whole_numbers(how.pieces, cumsum_back(q_dq - k_dk) + crossing)
    log_scale = None if tokens.log_scale is None else split.whole_numbers(how.pieces, k_dk)
    grads = Tokens(
        grouped(dq, tokens.q), grouped(dk, tokens.k), grouped(dv, tokens.v), None, log_scale,
        log_decay, None,
    )  # fmt: skip
    if entry is None:
        return grads, None
    dtop = None
    if entry.top is not None:
        dtop = jnp.sum(entry.sums * dstate[0], axis=(2, 3))
        dtop += jnp.sum(entry.normaliser * dstate[1], axis=2)
    return grads, Entry(*dstate, dtop)


def _passed(how: How, tokens: Tokens, entry: Entry | None):
    """Causal attention over whole chunks: outputs, and what the last token leaves behind."""
    return _pass_forward(how, tokens, entry)[0]


causal_pass: Any = jax.custom_vjp(_passed, nondiff_argnums=(0,))
causal_pass.defvjp(_pass_forward, _pass_backward)


def _two_sided_forward(how: How, chunk: int, q, k, v, weight, log_scale):
    projection, end = _projection(how, q, k, weight), None
    if log_scale is not None:
        scale = to_heads(log_scale, max(k.shape[2], v.shape[2]))
        if projection is not None and projection.shift_k is not None:
            scale = scale + to_heads(projection.shift_k, scale.shape[1])
        end = jnp.exp(scale - finite(jnp.max(scale, axis=2, keepdims=True)))
    of = {"projection": projection, "interpret": how.interpret}
    state = how.module.sums(k, v, end=end, chunk=chunk, **of)
    out, den = how.module.read(q, *state, normalise=True, chunk=how.chunk, **of)
    return out, (q, k, v, log_scale, projection, end, state, out, den)


def _two_sided_backward(how: How, chunk: int, residuals, dout):
    q, k, v, log_scale, projection, end, state, out, den = residuals
    inverse, r = _quotient(dout, out, den)
    of = {"projection": projection, "interpret": how.interpret}
    dq, dstate = how.module.read_backward(
        q, *state, dout=dout, inv_den=inverse, r=r, chunk=how.chunk, **of
    )
    groups = state[0].shape[1]
    dstate = [jnp.sum(x.reshape(x.shape[0], groups, -1, *x.shape[2:]), axis=2) for x in dstate]
    dk, dv, k_dk = how.module.sums_backward(k, v, *dstate, end=end, chunk=chunk, **of)
    if log_scale is not None:
        per = log_scale.shape[1]
        k_dk = jnp.sum(k_dk.reshape(k_dk.shape[0], per, -1, k_dk.shape[2]), axis=2)
    return (
        grouped(dq, q), grouped(dk, k), grouped(dv, v), None,
        None if log_scale is None else k_dk,
    )  # fmt: skip


def _summed(how: How, chunk: int, q, k, v, weight, log_scale):
    """Every query reads every key; `chunk` is that of the keys, `how.chunk` of the queries."""
    return _two_sided_forward(how, chunk, q, k, v, weight, log_scale)[0]


two_sided: Any = jax.custom_vjp(_summed, nondiff_argnums=(0, 1))
two_sided.defvjp(_two_sided_forward, _two_sided_backward)


def _projection(how: How, q, k, weight) -> Projection | None:
    if weight is None:
        return None
    assert how.half is not None

    def shift(x):
        return how.module.log_scale(x, weight, how.half, interpret=how.interpret)

    return Projection(weight, how.half, shift(q) if how.module.SHIFTS_QUERIES else None, shift(k))


def to_heads(x, heads: int):
    """x [B,G,...] with each group once for every head of it."""
    return x if x.shape[1] == heads else jnp.repeat(x, heads // x.shape[1], axis=1)


def _quotient(dout, out, den):
    """1 / den, 0 where there is none, and -<dout, out> / den: the gradients of num / den."""
    dead = jnp.abs(den) <= LEAST  # NaN is alive
    inverse = jnp.where(dead, 0.0, 1.0 / jnp.where(dead, 1.0, den))
    both = jnp.einsum("bthd,bthd->bht", dout, out, preferred_element_type=jnp.float32)
    return inverse, -both * inverse


def _plain(tokens: Tokens, dout):
    shape = (dout.shape[0], _heads(tokens), dout.shape[1])
    ones = jnp.ones_like(dout, jnp.float32, shape=shape)
    return ones, jnp.zeros_like(ones)


def grouped(x, like):
    """The gradients [B,T,H,D] of H heads summed over those that share one of `like`."""
    if x.shape[2] != like.shape[2]:
        x = rearrange(x.astype(jnp.float32), "b t (g n) d -> b t g n d", g=like.shape[2]).sum(3)
    return x.astype(like.dtype)


def cumsum_back(x, axis: int = -1):
    """The sum of each number and those behind it."""
    return jnp.flip(jnp.cumsum(jnp.flip(x, axis), axis=axis), axis)


def _ways(how: How, tokens: Tokens, entry: Entry | None, projection: Projection | None):
    """The factors of every token and chunk, and the log scale that the last state is held at."""
    scale, segments = tokens.log_scale, tokens.segments
    if tokens.log_decay is not None:
        return of_decays(tokens.log_decay, segments, how.chunk), None
    if scale is None and segments is None:
        return None, None
    if scale is None:
        shape = (tokens.q.shape[0], _heads(tokens), tokens.q.shape[1])
        scale = jnp.zeros_like(tokens.q, jnp.float32, shape=shape)
    if projection is not None and projection.shift_k is not None:
        scale = scale + to_heads(projection.shift_k, scale.shape[1])
    return of_scales(scale, None if entry is None else entry.top, segments, how.chunk)
