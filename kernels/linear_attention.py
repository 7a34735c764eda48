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
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.decode_step import decode_step
from kernels.dispatch import Backend, Path, run
from kernels.fused import linear as fused_linear
from kernels.fused.passes import LEAST
from kernels.mask import Mask, check_heads
from kernels.recurrence import Reach, scan_chunks

FeatureMap = Callable[
    [Float[Array, "B C H D"], Int[Array, "B C"]],
    tuple[Float[Array, "B C H R"], Float[Array, "B C H"] | None],
]
"""phi(x) = features exp(log_scale) of queries or keys at given positions; float32."""


class LinearState(NamedTuple):
    """All that the past leaves behind: sums of exp(log_scale_s - top) k_s v_s^T and k_s; `top`."""

    sums: Float[Array, "B H R Dv"]
    normaliser: Float[Array, "B H R"]
    top: Float[Array, "B H"]


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

    Raises:
        ValueError: the mask does not fit, or G does not divide H.
        NotImplementedError: the op has no such backend, or it does not take these arguments.
    """
    mask = mask or Mask()
    mask.check(q.shape[1], k.shape[1])
    check_heads(q, k)
    how = {"features": features, "log_scale": log_scale, "mask": mask, "chunk": chunk}
    paths = {
        "pallas": Path(fused_linear.linear, fused_linear.refuse_linear),
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
    check_heads(q, k)
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
    fading = state.top - _finite(new)
    k = k.astype(jnp.float32) * jnp.exp(scale - _finite(new)[:, None])[..., None]
    normaliser = jnp.exp(fading)[..., None] * state.normaliser + k[:, 0]
    q = q.astype(jnp.float32)
    q = _divide(q, jnp.sum(q * normaliser[:, None], axis=-1))
    out, sums = decode_step(q, k, v, state=state.sums, log_decay=fading[:, None], backend=backend)
    return out, LinearState(sums, normaliser, new)


def even(length: int, chunk: int) -> int:
    """Tokens of each chunk where as few as can be, of up to `chunk`, are all of one size."""
    return -(-length // -(-length // chunk))


def _xla(q, k, v, *, features: FeatureMap | None, log_scale, mask: Mask, chunk: int):
    features = _grouped(features or _given, q.shape[2])
    tokens = _tokens(k, v, log_scale, mask)
    if not mask.causal and mask.segments is None:
        return _two_sided(q, tokens, features, 4 * chunk).astype(v.dtype)
    scan = functools.partial(_scan, features=features, chunk=chunk)
    (out, den, top), _ = scan(q, tokens, mask.segments, strict=False)
    if not mask.causal:
        backwards = jax.tree.map(_flip, (q, tokens, mask.segments))
        later, den_later, top_later = map(_flip, scan(*backwards, strict=True)[0])
        both = _finite(jnp.maximum(top, top_later))
        before, after = jnp.exp(top - both), jnp.exp(top_later - both)
        out = out * before[..., None] + later * after[..., None]
        den = den * before + den_later * after
    return _divide(out, den).astype(v.dtype)


def _xla_causal(q, k, v, state, *, features: FeatureMap | None, log_scale, mask: Mask, chunk: int):
    features = _grouped(features or _given, q.shape[2])
    tokens = _tokens(k, v, log_scale, mask)
    how = {"features": features, "chunk": chunk, "strict": False}
    (out, den, _), state = _scan(q, tokens, mask.segments, state, **how)
    return _divide(out, den).astype(v.dtype), state


class _Tokens(NamedTuple):
    """Keys and values as they were given; what is filled up with zeros is not `seen`."""

    k: Float[Array, "B S G D"]
    v: Float[Array, "B S G Dv"]
    scale: Float[Array, "B S G"] | Float[Array, "B S 1"]
    seen: Bool[Array, "B S"]
    at: Int[Array, "B S"]


def _tokens(k, v, log_scale, mask: Mask) -> _Tokens:
    scale = jnp.zeros_like(k, shape=(*k.shape[:2], 1)) if log_scale is None else log_scale
    seen = jnp.ones(k.shape[:2], bool) if mask.keys is None else mask.keys
    return _Tokens(k, v, scale.astype(jnp.float32), seen, _positions(k))


def _positions(x):
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])


def _given(x, at):
    return x.astype(jnp.float32), None


def _grouped(features: FeatureMap, heads: int) -> FeatureMap:
    """`features`, those of a key-value head once for each of the query heads that it serves."""

    def repeated(x, at):
        made = features(x, at)
        times = heads // x.shape[2]
        return made if times == 1 else jax.tree.map(lambda y: jnp.repeat(y, times, axis=2), made)

    return repeated


def _keys(tokens: _Tokens, features: FeatureMap):
    """float32 and heads first: features [B,H,C,R], values [B,H,C,Dv], log scales [B,H or 1,C]."""
    k, own = features(tokens.k, tokens.at)
    each = lambda x: jnp.repeat(x, k.shape[2] // x.shape[2], axis=2)  # noqa: E731
    scale = tokens.scale if tokens.scale.shape[2] == 1 else each(tokens.scale)
    scale = scale if own is None else scale + own
    seen = tokens.seen[:, :, None]
    k, v = (jnp.where(seen[..., None], x, 0.0) for x in (k, each(tokens.v.astype(jnp.float32))))
    return _turned(k), _turned(v), _turned(jnp.where(seen, scale, -jnp.inf))


def _turned(x):
    """Heads before positions, or back: products over a head's own rows need no copies then."""
    return jnp.swapaxes(x, 1, 2)


def _flip(x):
    return jnp.flip(x, axis=1)


def _finite(top):
    return jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))


def _divide(out, den):
    """Weighted sums [..., Dv] over the sums of the weights [...], 0 where these are below `LEAST`.

    Taking the size of the normaliser out first keeps its inverse square, which the gradient has,
    inside float32's range.
    """
    den = den[..., None]
    size = jax.lax.stop_gradient(jnp.abs(den))
    alive = ~(size <= LEAST)  # NaN stays NaN
    out, den = (jnp.where(alive, x, 0.0) / jnp.where(alive, size, 1.0) for x in (out, den))
    return out / jnp.where(alive, den, 1.0)


def _empty(q, tokens: _Tokens, features: FeatureMap) -> LinearState:
    """The state before the first token; "like" q, so that it is sharded as q is."""
    made = jax.eval_shape(features, tokens.k[:, :1], tokens.at[:, :1])[0]  # of all heads
    shape = (q.shape[0], *made.shape[2:])
    zeros = functools.partial(jnp.zeros_like, q, jnp.float32)
    top = jnp.full_like(q, -jnp.inf, jnp.float32, shape=shape[:2])
    return LinearState(zeros(shape=(*shape, tokens.v.shape[3])), zeros(shape=shape), top)


def _two_sided(q, tokens: _Tokens, features: FeatureMap, chunk: int):
    """Every query reads all keys: sum these up, then read.

    By chunks where there are more features than channels, else all at once.
    """

    def absorb(state, tokens, reach):
        return _absorb(state, *_keys(tokens, features), reach), ()

    def read(_, tokens, reach):
        return (), tuple(map(_turned, _read(_turned(features(*tokens)[0]), state)))

    state = _empty(q, tokens, features)
    many = state.sums.shape[2] > q.shape[3]
    each = lambda x: even(x.shape[1], chunk) if many else x.shape[1]  # noqa: E731
    _, state = scan_chunks(absorb, state, tokens, None, chunk=each(tokens.k))
    sums, _ = scan_chunks(read, (), (q, _positions(q)), None, chunk=each(q))
    return _divide(*sums)


def _scan(
    q, tokens: _Tokens, segments, state=None, *, features: FeatureMap, chunk: int, strict: bool
):
    """Sums over the keys before each query and, unless `strict`, over its own.

    Returns (the sums of values [B, T, H, Dv] and of weights [B, T, H], both over exp(top), and
    those tops [B, T, H]), and the last state.
    """
    state = _empty(q, tokens, features) if state is None else state
    body = functools.partial(_chunk, features=features, strict=strict)
    return scan_chunks(body, state, (q, tokens), segments, chunk=even(q.shape[1], chunk))


def _chunk(state: LinearState, tokens, reach: Reach, *, features: FeatureMap, strict: bool):
    """One chunk: the next state, and what its queries read from the state and from each other."""
    q, (k, v, scale) = _turned(features(tokens[0], tokens[1].at)[0]), _keys(tokens[1], features)
    seen = jnp.tril(reach.within, -1) if strict else reach.within
    within = jnp.where(seen[:, None], scale[:, :, None], -jnp.inf)
    own = jax.lax.stop_gradient(jnp.max(within, axis=-1))
    past = jnp.where(reach.start[:, None], state.top[..., None], -jnp.inf)
    top = jax.lax.stop_gradient(jnp.maximum(past, own))
    weights = jnp.einsum("bhtr,bhsr->bhts", q, k) * jnp.exp(within - _finite(own)[..., None])
    fresh, faded = (jnp.exp(x - _finite(top)) for x in (own, past))
    out, den = _read(q, state)
    out = out * faded[..., None] + jnp.einsum("bhts,bhsd->bhtd", weights, v) * fresh[..., None]
    den = den * faded + jnp.sum(weights, axis=-1) * fresh
    return _absorb(state, k, v, scale, reach), tuple(map(_turned, (out, den, top)))


def _read(q, state: LinearState):
    """Sums of values and of weights of the queries' features q [B,H,C,R] on a state."""
    out = jnp.einsum("bhtr,bhrd->bhtd", q, state.sums)
    return out, jnp.sum(q * state.normaliser[:, :, None], axis=-1)


def _absorb(state: LinearState, k, v, scale, reach: Reach) -> LinearState:
    """The state after a chunk."""
    scale = jnp.where(reach.end[:, None], scale, -jnp.inf)
    past = jnp.where(reach.keep[:, None], state.top, -jnp.inf)
    new = jax.lax.stop_gradient(jnp.maximum(past, jnp.max(scale, axis=-1)))
    kept = jnp.exp(past - _finite(new))[..., None]
    k = k * jnp.exp(scale - _finite(new)[..., None])[..., None]
    sums = state.sums * kept[..., None] + jnp.einsum("bhsr,bhsd->bhrd", k, v)
    return LinearState(sums, state.normaliser * kept + jnp.sum(k, axis=2), new)
