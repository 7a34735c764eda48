"""What linear attention does with one chunk of tokens, wherever its chunks come from.

Features of queries and keys, the state that keys leave, what queries read of it and of each other;
the formula is that of `kernels.linear_attention`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.fused.passes import LEAST
from kernels.mask import Mask
from kernels.recurrence import Reach

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


class Tokens(NamedTuple):
    """Keys and values as they were given; what is filled up with zeros is not `seen`.

    scale None is 0, seen None is all.
    """

    k: Float[Array, "B S G D"]
    v: Float[Array, "B S G Dv"]
    scale: Float[Array, "B S G"] | Float[Array, "B S 1"] | None
    seen: Bool[Array, "B S"] | None
    at: Int[Array, "B S"]


def tokens_of(k, v, log_scale, mask: Mask) -> Tokens:
    """All of them, every field an array."""
    scale = jnp.zeros_like(k, shape=(*k.shape[:2], 1)) if log_scale is None else log_scale
    seen = jnp.ones(k.shape[:2], bool) if mask.keys is None else mask.keys
    return Tokens(k, v, scale.astype(jnp.float32), seen, positions(k))


def positions(x):
    """0, 1, ... of x [B,T,...], as [B,T]."""
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])


def given(x, at):
    """The feature map of features that were given."""
    return x.astype(jnp.float32), None


def grouped(features: FeatureMap, heads: int) -> FeatureMap:
    """`features`, those of a key-value head once for each of the query heads that it serves."""

    def repeated(x, at):
        made = features(x, at)
        times = heads // x.shape[2]
        return made if times == 1 else jax.tree.map(lambda y: jnp.repeat(y, times, axis=2), made)

    return repeated


def keys_of(tokens: Tokens, features: FeatureMap) -> tuple[Array, Array, Array | None]:
    """float32 and heads first: features [B,H,C,R], values [B,H,C,Dv], log scales [B,H or 1,C].

    No log scales, None, where neither `tokens` nor `features` have any.
    """
    k, own = features(tokens.k, tokens.at)
    each = lambda x: jnp.repeat(x, k.shape[2] // x.shape[2], axis=2)  # noqa: E731
    v, scale = each(tokens.v.astype(jnp.float32)), tokens.scale
    if scale is not None:
        scale = scale if scale.shape[2] == 1 else each(scale)
        scale = scale if own is None else scale + own
    else:
        scale = own
    if tokens.seen is not None:
        seen = tokens.seen[:, :, None]
        k, v = (jnp.where(seen[..., None], x, 0.0) for x in (k, v))
        scale = None if scale is None else jnp.where(seen, scale, -jnp.inf)
    return turned(k), turned(v), None if scale is None else turned(scale)


def turned(x):
    """Heads before positions, or back: products over a head's own rows need no copies then."""
    return jnp.swapaxes(x, 1, 2)


def finite(top):
    """`top`, 0 where it is not a finite number."""
    return jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))


def divide(out, den):
    """Weighted sums [..., Dv] over the sums of the weights [...], 0 where these are below `LEAST`.

    Taking the size of the normaliser out first keeps its inverse square, which the gradient has,
    inside float32's range.
    """
    den = den[..., None]
    size = jax.lax.stop_gradient(jnp.abs(den))
    alive = ~(size <= LEAST)  # NaN stays NaN
    out, den = (jnp.where(alive, x, 0.0) / jnp.where(alive, size, 1.0) for x in (out, den))
    return out / jnp.where(alive, den, 1.0)


def empty(q, tokens: Tokens, features: FeatureMap) -> LinearState:
    """The state before the first token; "like" q, so that it is sharded as q is."""
    made = jax.eval_shape(features, tokens.k[:, :1], tokens.at[:, :1])[0]  # of all heads
    shape = (q.shape[0], *made.shape[2:])
    zeros = functools.partial(jnp.zeros_like, q, jnp.float32)
    top = jnp.full_like(q, -jnp.inf, jnp.float32, shape=shape[:2])
    return LinearState(zeros(shape=(*shape, tokens.v.shape[3])), zeros(shape=shape), top)


def attend(state: LinearState, tokens, reach: Reach, *, features: FeatureMap, strict: bool):
    """One chunk: the next state, and what its queries read from the state and from each other."""
    q, (k, v, scale) = turned(features(tokens[0], tokens[1].at)[0]), keys_of(tokens[1], features)
    assert scale is not None
    seen = jnp.tril(reach.within, -1) if strict else reach.within
    within = jnp.where(seen[:, None], scale[:, :, None], -jnp.inf)
    own = jax.lax.stop_gradient(jnp.max(within, axis=-1))
    past = jnp.where(reach.start[:, None], state.top[..., None], -jnp.inf)
    top = jax.lax.stop_gradient(jnp.maximum(past, own))
    weights = jnp.einsum("bhtr,bhsr->bhts", q, k) * jnp.exp(within - finite(own)[..., None])
    fresh, faded = (jnp.exp(x - finite(top)) for x in (own, past))
    out, den = read(q, state)
    out = out * faded[..., None] + jnp.einsum("bhts,bhsd->bhtd", weights, v) * fresh[..., None]
    den = den * faded + jnp.sum(weights, axis=-1) * fresh
    return absorb(state, k, v, scale, reach), tuple(map(turned, (out, den, top)))


def read(q, state: LinearState):
    """Sums of values and of weights of the queries' features q [B,H,C,R] on a state."""
    out = jnp.einsum("bhtr,bhrd->bhtd", q, state.sums)
    return out, jnp.sum(q * state.normaliser[:, :, None], axis=-1)


def absorb(state: LinearState, k, v, scale, reach: Reach) -> LinearState:
    """The state after a chunk."""
    scale = jnp.where(reach.end[:, None], scale, -jnp.inf)
    past = jnp.where(reach.keep[:, None], state.top, -jnp.inf)
    new = jax.lax.stop_gradient(jnp.maximum(past, jnp.max(scale, axis=-1)))
    kept = jnp.exp(past - finite(new))[..., None]
    k = k * jnp.exp(scale - finite(new)[..., None])[..., None]
    sums = state.sums * kept[..., None] + jnp.einsum("bhsr,bhsd->bhrd", k, v)
    return LinearState(sums, state.normaliser * kept + jnp.sum(k, axis=2), new)
