"""The gated delta rule by a chip's own kernels.

    S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,    out_t = S_t^T q_t

Here lengths are filled up to whole chunks and gradients are put together (`custom_vjp`). A chip's
module (of `MODULES`) has, on arrays [B, T, H, channels] and `Ways`,

    refuse(q, k, v) -> a sentence or None     of arrays or their shapes
    CHUNK                 tokens of a chunk
    forward(q, k, v, ways, beta, *, state, interpret) -> out [B,T,H,Dv], S [B,H,R,Dv]
    backward(q, k, v, ways, beta, *, dout, state, dstate, interpret)
        -> dq, dk [B,T,H,R], dv [B,T,H,Dv], dbeta, passed [B,H,T], dS, S [B,H,R,Dv]

beta is [B,H,T]; it, its gradient and states are float32. passed_t is what token t reads times its
gradient, less what is read of token t later times theirs. What passes from j < t to i >= t fades by
a_t = exp(log_decay_t), so that

    dlog_decay_t = sum_{i >= t} passed_i + sum S_T dS_T

where all cancels that does not pass t: passed and S, the state after the last token, are sums of
the same rounded numbers.
"""

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from kernels.divide import by_batch
from kernels.fused.linear import LEAST_LOG_DECAY, pad
from kernels.fused.passes import cumsum_back
from kernels.fused.ways import of_decays
from kernels.mask import Mask
from kernels.target import refuse_kernels, target

MODULES = {"tpu": "kernels.pallas_tpu.gated_delta", "hopper": "kernels.pallas_gpu.gated_delta"}


class How(NamedTuple):
    """What is known when tracing."""

    chip: str
    interpret: Any

    @property
    def module(self) -> ModuleType:
        """The chip's kernels."""
        return module_of(self.chip)


class Tokens(NamedTuple):
    """A sequence in whole chunks; all 0 where padding is, but the segments."""

    q: Float[Array, "B T H R"]
    k: Float[Array, "B T H R"]
    v: Float[Array, "B T H Dv"]
    beta: Float[Array, "B H T"]
    log_decay: Float[Array, "B H T"]
    segments: Int[Array, "B T"] | None


def module_of(chip: str) -> ModuleType:
    """The chip's kernels of the delta rule."""
    return importlib.import_module(MODULES[chip])


def delta(q, k, v, beta, log_decay, *, mask: Mask, chunk: int, state):
    """`kernels.gated_delta_rule` in kernels of its own; arguments of its XLA path.

    A chunk's system is solved in float32, or to 16 bits where v is bfloat16; other products are
    made in v's dtype, sums held in float32. Log decays below `LEAST_LOG_DECAY` are taken for it and
    get no gradient, as in `kernels.fused.linear.gated`. Chunks have the chip's own length, not
    `chunk`.
    """
    return by_batch(_delta, q, k, v, beta, log_decay, mask, state)


def _delta(q, k, v, beta, log_decay, mask: Mask, state):
    how, length = How(*target()), v.shape[1]
    q, k = (x.astype(v.dtype) for x in (q, k))
    log_decay = jnp.zeros_like(beta) if log_decay is None else log_decay
    beta, log_decay = (x.astype(jnp.float32) for x in (beta, log_decay))
    log_decay = jnp.maximum(log_decay, LEAST_LOG_DECAY)
    if mask.keys is not None:
        seen = mask.keys[:, :, None]
        k, v = (jnp.where(seen[..., None], x, 0) for x in (k, v))
        beta, log_decay = (jnp.where(seen, x, 0.0) for x in (beta, log_decay))
    whole = how.module.CHUNK
    q, k, v, beta, log_decay = (pad(x, whole) for x in (q, k, v, beta, log_decay))
    beta, log_decay = (rearrange(x, "b t h -> b h t") for x in (beta, log_decay))
    segments = mask.segments
    if segments is not None:
        segments = jnp.pad(segments, [(0, 0), (0, -length % whole)], mode="edge")
    state = None if state is None else state.astype(jnp.float32)
    out, last = _pass(how, Tokens(q, k, v, beta, log_decay, segments), state)
    return out[:, :length], last


def refuse_delta(q, k, v, beta, log_decay, *, mask: Mask, chunk: int, state) -> str | None:
    """Why no kernel takes this call of `delta`, and what to do; None where one does."""
    if reason := refuse_kernels():
        return reason
    return module_of(target().chip).refuse(q, k, v)


def _forward(how: How, tokens: Tokens, state):
    ways = of_decays(tokens.log_decay, tokens.segments, how.module.CHUNK)
    q, k, v, beta = tokens[:4]
    out, last = how.module.forward(q, k, v, ways, beta, state=state, interpret=how.interpret)
    return (out, last), (tokens, ways, state)


def _backward(how: How, residuals, cotangents):
    tokens, ways, state = residuals
    dout, dlast = cotangents
    q, k, v, beta = tokens[:4]
    dq, dk, dv, dbeta, passed, dstate, last = how.module.backward(
        q, k, v, ways, beta, dout=dout, state=state, dstate=dlast, interpret=how.interpret
    )
    dlog_decay = cumsum_back(passed) + jnp.sum(last * dlast, axis=(2, 3))[..., None]
    return Tokens(dq, dk, dv, dbeta, dlog_decay, None), None if state is None else dstate


def _passed(how: How, tokens: Tokens, state):
    """Outputs, and the state that the last token leaves."""
    return _forward(how, tokens, state)[0]


_pass: Any = jax.custom_vjp(_passed, nondiff_argnums=(0,))
_pass.defvjp(_forward, _backward)
