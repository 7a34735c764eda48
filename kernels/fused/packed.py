"""Segments whose tokens see each other both ways, as a causal sequence of twice the length.

There each segment has all its keys first and then all its queries, which so see every key of their
own and no other. Nothing is added up twice or taken off again; what it costs beside a causal pass
is that pass again, and a copy of q, k, v and the result.
"""

import jax
import jax.numpy as jnp

from kernels.mask import Mask


def both_ways(causal, q, k, v, log_scale, keys, segments: jax.Array):
    """The [B, T, H, Dv] of segments [B, T], by causal(q, k, v, log_scale, mask) of 2T tokens.

    keys: bool [B, T], False where a key is padding, or None.
    """
    key, query, result = _places(segments)
    keys = jnp.ones_like(segments, bool) if keys is None else keys
    k, v, keys = (_at(key, x) for x in (k, v, keys))
    log_scale = None if log_scale is None else _at(key, log_scale)
    twice = Mask(causal=True, keys=keys, segments=jnp.repeat(segments, 2, axis=1))
    return _at(result, causal(_at(query, q), k, v, log_scale, twice))


@jax.vmap
def _places(segments):
    """Which key and which query [2T] come where, T and more for none; where results [T] are."""
    length = segments.shape[0]
    token, place = jnp.arange(length), jnp.arange(2 * length)
    changes = segments[1:] != segments[:-1]
    first = jnp.where(jnp.pad(changes, (1, 0)), token, 0)
    behind = jnp.where(jnp.pad(changes, (0, 1)), token + 1, length)
    first, behind = jax.lax.cummax(first), jax.lax.cummin(behind, reverse=True)
    starts, stops = (jnp.repeat(x, 2) for x in (first, behind))
    of_key, none = place < starts + stops, length + place  # no two places have one token
    key, query = jnp.where(of_key, place - starts, none), jnp.where(of_key, none, place - stops)
    return key, query, token + behind


@jax.vmap
def _at(places, x):
    """x [S, ...] at the places [T], 0 where there is none such."""
    return x.at[places].get(mode="fill", fill_value=0, unique_indices=True)
