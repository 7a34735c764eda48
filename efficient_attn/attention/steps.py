"""Decoding of many tokens by the step of one."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool


def scan_steps(step: Any, tokens: tuple[Array, ...], state: Any, *, keys: Bool[Array, "B T"]):
    """`step` over the tokens ([B, T, ...] each) that `keys` shows, which begin each row.

    Returns the outputs [B, T, ...], 0 where there was no token, and the last state.
    """

    def one(carry, given):
        *token, here, position = given
        out, after = step(
            *(part[:, None] for part in token),
            carry,
            position=jnp.broadcast_to(position, here.shape),
        )
        keep = lambda new, old: jnp.where(_beside(here, new), new, old)  # noqa: E731
        return jax.tree.map(keep, after, carry), jnp.where(_beside(here, out[:, 0]), out[:, 0], 0)

    given = (*tokens, keys)
    columns = [jnp.swapaxes(part, 0, 1) for part in given]
    state, outs = jax.lax.scan(one, state, (*columns, jnp.arange(keys.shape[1])))
    return jnp.swapaxes(outs, 0, 1), state


def _beside(here: Bool[Array, " B"], array: Array) -> Array:
    return here.reshape(here.shape + (1,) * (array.ndim - 1))
