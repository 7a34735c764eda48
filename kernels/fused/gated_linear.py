"""Gated linear attention with a decay per key channel by a chip's own kernels.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T,    out_t = S_t^T q_t,    a_t = exp(log_decay_t)

Here lengths are filled up to whole chunks and gradients are put together (`custom_vjp`). A chip's
module (of `MODULES`) has, on arrays [B, T, heads, channels], q and k of G heads and the rest of H,

    refuse(q, k, v) -> a sentence or None     of arrays or their shapes
    chunk_length(length) -> tokens of a chunk
    forward(q, k, v, log_decay, *, state, chunk, interpret) -> out [B,T,H,Dv], S [B,H,R,Dv]
    backward(q, k, v, log_decay, *, dout, state, dstate, crossing, chunk, interpret)
        -> dq, dk [B,T,H,R], dv [B,T,H,Dv], dlog_decay [B,T,H,R], dS [B,H,R,Dv]

log_decay, its gradient and states are float32. What passes from j < t to i >= t fades by a_t, so
that with products by channel

    dlog_decay_t = sum_{i >= t} (q_i dq_i - k_i dk_i) + crossing,    crossing = sum_d S_T dS_T

(GLA, arXiv 2312.06635, section 4.3 and appendix). A chip may leave the pairs i = j out of both.
"""

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.divide import by_batch
from kernels.fused.linear import pad
from kernels.fused.passes import grouped
from kernels.mask import Mask
from kernels.target import refuse_kernels, target

MODULES = {"tpu": "kernels.pallas_tpu.gated_linear", "hopper": "kernels.pallas_gpu.gated_linear"}


class How(NamedTuple):
    """What is known when tracing."""

    chip: str
    interpret: Any
    chunk: int

    @property
    def module(self) -> ModuleType:
        """The chip's kernels."""
        return module_of(self.chip)


class Tokens(NamedTuple):
    """A sequence in whole chunks; all 0 where padding is."""

    q: Float[Array, "B T G R"]
    k: Float[Array, "B T G R"]
    v: Float[Array, "B T H Dv"]
    log_decay: Float[Array, "B T H R"]


def module_of(chip: str) -> ModuleType:
    """The chip's kernels of a decay per channel."""
    return importlib.import_module(MODULES[chip])


def by_channel(q, k, v, log_decay, *, mask: Mask, chunk: int, state):
    """`kernels.gated_linear_attention` with a decay per channel; arguments of its XLA path.

    Products are made in v's dtype, sums held in float32. Chunks have the chip's own length, not
    `chunk`. The gradient of the decays is a difference of sums over all later tokens (the module's
    formula): in float32 its absolute error is 1e-7 of these sums, where the XLA path's is relative
    to each number. It is 0 where the decay itself is, below about -104.
    """
    return by_batch(_by_channel, q, k, v, log_decay, mask, state)


def _by_channel(q, k, v, log_decay, mask: Mask, state):
    q, k = (x.astype(v.dtype) for x in (q, k))
    log_decay = log_decay.astype(jnp.float32)
    if mask.keys is not None:
        seen = mask.keys[:, :, None, None]
        k, v, log_decay = (jnp.where(seen, x, 0) for x in (k, v, log_decay))
    if mask.segments is not None:  # a new one begins: nothing of what was before is left
        begins = mask.segments[:, 1:] != mask.segments[:, :-1]
        begins = jnp.pad(begins, [(0, 0), (1, 0)])[:, :, None, None]
        log_decay = jnp.where(begins, -jnp.inf, log_decay)
    chip, length = target(), v.shape[1]
    chunk = module_of(chip.chip).chunk_length(length)
    given = Tokens(*(pad(x, chunk) for x in (q, k, v, log_decay)))
    state = None if state is None else state.astype(jnp.float32)
    out, last = _pass(How(*chip, chunk), given, state)
    return out[:, :length], last


def refuse_by_channel(q, k, v, log_decay, *, mask: Mask, chunk: int, state) -> str | None:
    """Why no kernel takes this call of `by_channel`, and what to do; None where one does."""
    if reason := refuse_kernels():
        return reason
    return module_of(target().chip).refuse(q, k, v)


def _forward(how: How, tokens: Tokens, state):
    out, last = how.module.forward(*tokens, state=state, chunk=how.chunk, interpret=how.interpret)
    return (out, last), (tokens, state, last)


def _backward(how: How, residuals, cotangents):
    tokens, state, last = residuals
    dout, dlast = cotangents
    dq, dk, dv, dlog_decay, dstate = how.module.backward(
        *tokens, dout=dout, state=state, dstate=dlast, crossing=jnp.sum(last * dlast, axis=3),
        chunk=how.chunk, interpret=how.interpret,
    )  # fmt: skip
    dlog_decay = jnp.where(jnp.exp(tokens.log_decay) == 0.0, 0.0, dlog_decay)
    grads = Tokens(grouped(dq, tokens.q), grouped(dk, tokens.k), dv, dlog_decay)
    return grads, None if state is None else dstate


def _passed(how: How, tokens: Tokens, state):
    """Outputs, and the state that the last token leaves."""
    return _forward(how, tokens, state)[0]


_pass: Any = jax.custom_vjp(_passed, nondiff_argnums=(0,))
_pass.defvjp(_forward, _backward)
