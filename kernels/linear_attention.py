"""Attention with a feature map in place of the exponential: linear in the length.

    out_t = sum_s w_ts v_s / sum_s w_ts,    w_ts = <q_t, k_s> exp(log_scale_s)

over the keys s that query t sees (Katharopoulos et al. 2020, arXiv 2006.16236, equations 4-12;
Choromanski et al. 2021, arXiv 2009.14794, equations 3-4). q and k are features, or `features` makes
them out of q and k, chunk by chunk and once more in the backward pass: where there are many more
features than channels, no array of T x R numbers is ever written out. `log_scale`, one number per
key, carries magnitudes that float32 could not: each row's own maximum over the keys it sees is
taken out before exponentiating, as an online softmax does. It cancels in the quotient, so the
result is exact, no constant is added to the normaliser, and no future key has a say.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.decode_step import decode_step
from kernels.dispatch import Backend, Path, run
from kernels.fused import linear as fused_linear
from kernels.linear_chunk import (
    FeatureMap,
    LinearState,
    Tokens,
    absorb,
    attend,
    divide,
    empty,
    finite,
    given,
    grouped,
    keys_of,
    positions,
    read,
    tokens_of,
    turned,
)
from kernels.mask import Mask, check_heads
from kernels.recurrence import scan_chunks
from kernels.tiled_causal import refuse_causal, tiled_causal, worth_causal
from kernels.tiled_linear import refuse_tiled, tiled_linear, worth_slabs


def linear_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G Dv"],
    *,
    features: FeatureMap | None = None,
    log_scale: Float[Array, "B S G"] | None = None,
    mask: Mask | None = None,
    chunk: int = 128,
    backend: Backend = "auto",
) -> Float[Array, "B T H Dv"]:
    """Linear attention of q on k; see the module's formula.

    features: phi, of queries and keys at their positions 0, 1, ...; None takes q and k as they are.
    G key-value heads serve H query heads, G dividing H.

    By a scan over chunks: of up to `chunk` keys where the mask is causal or has segments, T (chunk
    (R + Dv) + 2 R Dv) multiply-adds a head with no prefix sum per position, twice that with
    segments and no causal mask; else of up to 4 chunk, all where R is at most D, T 2 R Dv. Memory
    is linear in T. Sums are
    held in float32 (for their precision see `kernels.recurrence`); the result has v's dtype. A row
    whose normaliser is below `LEAST` (it sees no key, or shares no live feature with any) gives 0.
    "tiled" is for a CPU, where "auto" takes it from 256 tokens on, without segments and, if causal,
    without log scales (`kernels.tiled_linear`, `kernels.tiled_causal`: chunks of up to 64 there).
    It has no forward-mode derivative (`jax.jvp`, `jax.linearize`): take backend="xla" for that.

    Raises:
        ValueError: the mask does not fit, or G does not divide H.
        NotImplementedError: the op has no such backend, or it does not take these arguments.
    """
    mask = mask or Mask()
    mask.check(q.shape[1], k.shape[1])
    check_heads(q.shape[2], k)
    how = {"features": features, "log_scale": log_scale, "mask": mask, "chunk": chunk}
    paths = {
        "pallas": Path(fused_linear.linear, fused_linear.refuse_linear),
        "tiled": _CAUSAL_SLABS if mask.causal else _SLABS,
        "xla": Path(_xla),
    }
    return run("linear_attention", backend, paths, (q, k, v), how)


def causal_linear_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T G D"],
    v: Float[Array, "B T G Dv"],
    state: LinearState,
    *,
    features: FeatureMap | None = None,
    log_scale: Float[Array, "B T G"] | None = None,
    mask: Mask | None = None,
    chunk: int = 128,
    backend: Backend = "auto",
) -> tuple[Float[Array, "B T H Dv"], LinearState]:
    """Causal linear attention that goes on from `state`, and the state that it leaves.

    A sequence cut in two gives what it gives whole. With segments, the state belongs to the first.
    `features` counts positions from 0 anew.

    Raises:
        ValueError: the mask does not fit or is not causal, or G does not divide H.
        NotImplementedError: the op has no such backend, or it does not take these arguments.
    """
    mask = mask or Mask(causal=True)
    mask.check(q.shape[1], k.shape[1])
    if not mask.causal:
        raise ValueError("causal_linear_attention takes a causal mask: Mask(causal=True, ...)")
    check_heads(q.shape[2], k)
    how = {"features": features, "log_scale": log_scale, "mask": mask, "chunk": chunk}
    paths = {
        "pallas": Path(fused_linear.causal, fused_linear.refuse_causal),
        "xla": Path(_xla_causal),
    }
    return run("causal_linear_attention", backend, paths, (q, k, v, state), how)


def linear_attention_init(batch: int, heads: int, features: int, dim: int) -> LinearState:
    """The state before the first token; `dim` is the dimension of the values."""
    sums = jnp.zeros((batch, heads, features, dim), jnp.float32)
    top = jnp.full((batch, heads), -jnp.inf, jnp.float32)
    return LinearState(sums, jnp.zeros(sums.shape[:3], jnp.float32), top)


def linear_attention_step(
    q: Float[Array, "B 1 H R"],
    k: Float[Array, "B 1 G R"],
    v: Float[Array, "B 1 G Dv"],
    state: LinearState,
    *,
    log_scale: Float[Array, "B 1 G"] | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Array, "B 1 H Dv"], LinearState]:
    """One token of causal linear attention, features given: update the state, read it out.

    A `decode_step` with the normaliser, R numbers a head, beside it; see there for the errors.
    """
    scale = jnp.zeros_like(k, shape=k.shape[:3]) if log_scale is None else log_scale
    per = q.shape[2] // k.shape[2]
    k, v, scale = (jnp.repeat(x, per, axis=2) for x in (k, v, scale.astype(jnp.float32)))
    new = jnp.maximum(state.top, scale[:, 0])
    fading = state.top - finite(new)
    k = k.astype(jnp.float32) * jnp.exp(scale - finite(new)[:, None])[..., None]
    normaliser = jnp.exp(fading)[..., None] * state.normaliser + k[:, 0]
    q = q.astype(jnp.float32)
    q = divide(q, jnp.sum(q * normaliser[:, None], axis=-1))
    out, sums = decode_step(q, k, v, state=state.sums, log_decay=fading[:, None], backend=backend)
    return out, LinearState(sums, normaliser, new)


def linear_attention_sum(
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G Dv"],
    *,
    heads: int,
    features: FeatureMap | None = None,
    log_scale: Float[Array, "B S G"] | None = None,
    mask: Mask | None = None,
    chunk: int = 128,
) -> LinearState:
    """All that queries of H = `heads` heads can read of those keys, for `linear_attention_read`.

    Where queries come one after the other, each then takes R Dv multiply-adds a head, whatever S.

    Raises:
        ValueError: the mask is causal, has segments or another length, or G does not divide H.
    """
    mask = mask or Mask()
    mask.check(1, k.shape[1])
    check_heads(heads, k)
    features, tokens = grouped(features or given, heads), tokens_of(k, v, log_scale, mask)
    return _summed(empty(k, tokens, features), tokens, features, 4 * chunk)


def linear_attention_read(
    q: Float[Array, "B T H D"],
    state: LinearState,
    *,
    features: FeatureMap | None = None,
    chunk: int = 128,
) -> Float[Array, "B T H Dv"]:
    """Each query's linear attention to all keys of the state, which stays as it is; q's dtype."""
    return _read_out(q, state, features or given, 4 * chunk).astype(q.dtype)


_SLABS = Path(tiled_linear, refuse_tiled, worth_slabs)
_CAUSAL_SLABS = Path(tiled_causal, refuse_causal, worth_causal)


def even(length: int, chunk: int) -> int:
    """Tokens of each chunk where as few as can be, of up to `chunk`, are all of one size."""
    return -(-length // -(-length // chunk))


def _xla(q, k, v, *, features: FeatureMap | None, log_scale, mask: Mask, chunk: int):
    features = grouped(features or given, q.shape[2])
    tokens = tokens_of(k, v, log_scale, mask)
    if not mask.causal and mask.segments is None:
        return _two_sided(q, tokens, features, 4 * chunk).astype(v.dtype)
    scan = functools.partial(_scan, features=features, chunk=chunk)
    (out, den, top), _ = scan(q, tokens, mask.segments, strict=False)
    if not mask.causal:
        backwards = jax.tree.map(_flip, (q, tokens, mask.segments))
        later, den_later, top_later = map(_flip, scan(*backwards, strict=True)[0])
        both = finite(jnp.maximum(top, top_later))
        before, after = jnp.exp(top - both), jnp.exp(top_later - both)
        out = out * before[..., None] + later * after[..., None]
        den = den * before + den_later * after
    return divide(out, den).astype(v.dtype)


def _xla_causal(q, k, v, state, *, features: FeatureMap | None, log_scale, mask: Mask, chunk: int):
    features = grouped(features or given, q.shape[2])
    tokens = tokens_of(k, v, log_scale, mask)
    how = {"features": features, "chunk": chunk, "strict": False}
    (out, den, _), state = _scan(q, tokens, mask.segments, state, **how)
    return divide(out, den).astype(v.dtype), state


def _flip(x):
    return jnp.flip(x, axis=1)


def _two_sided(q, tokens: Tokens, features: FeatureMap, chunk: int):
    """Every query reads all keys: sum these up, then read."""
    state = empty(q, tokens, features)
    return _read_out(q, _summed(state, tokens, features, chunk), features, chunk)


def _summed(state: LinearState, tokens: Tokens, features: FeatureMap, chunk: int) -> LinearState:
    """The state with all tokens in it."""

    def take(state, tokens, reach):
        return absorb(state, *keys_of(tokens, features), reach), ()

    return scan_chunks(take, state, tokens, None, chunk=_part(tokens.k, state, chunk))[1]


def _read_out(q, state: LinearState, features: FeatureMap, chunk: int):
    """What every query reads of the state, float32."""

    def give(_, tokens, reach):
        return (), tuple(map(turned, read(turned(features(*tokens)[0]), state)))

    sums, _ = scan_chunks(give, (), (q, positions(q)), None, chunk=_part(q, state, chunk))
    return divide(*sums)


def _part(x, state: LinearState, chunk: int) -> int:
    """Tokens of x at once: all, unless they have more features than channels."""
    return even(x.shape[1], chunk) if state.sums.shape[2] > x.shape[3] else x.shape[1]


def _scan(
    q, tokens: Tokens, segments, state=None, *, features: FeatureMap, chunk: int, strict: bool
):
    """Sums over the keys before each query and, unless `strict`, over its own.

    Returns (the sums of values [B, T, H, Dv] and of weights [B, T, H], both over exp(top), and
    those tops [B, T, H]), and the last state.
    """
    state = empty(q, tokens, features) if state is None else state
    body = functools.partial(attend, features=features, strict=strict)
    return scan_chunks(body, state, (q, tokens), segments, chunk=even(q.shape[1], chunk))
