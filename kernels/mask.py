"""Who may see whom: the one way in which visibility is said."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Mask:
    """Which keys each query sees. By default every query sees every key.

    causal: query t sees the keys s <= t; needs as many keys as queries.
    keys: False where a key is padding, which no query sees.
    segments: query t sees key s only if their numbers agree (self-attention over packed documents).
        Each segment is one run of neighbours.

    In every op of this package a query that sees no key gets 0.
    """

    causal: bool = field(default=False, metadata={"static": True})
    keys: Bool[Array, "B S"] | None = None
    segments: Int[Array, "B T"] | None = None

    @property
    def needs(self) -> frozenset[str]:
        """What a mechanism must support to honour this mask."""
        asked = {
            "causal": self.causal,
            "padding": self.keys is not None,
            "segments": self.segments is not None,
        }
        return frozenset(name for name, needed in asked.items() if needed)

    def visible(self, rows: Int[Array, " T"], keys: int) -> Bool[Array, "#B 1 T S"]:
        """The mask of the queries at positions `rows` against all keys, written out."""
        seen = jnp.ones((1, 1, len(rows), keys), bool)
        if self.causal:
            seen &= (rows[:, None] >= jnp.arange(keys)[None])[None, None]
        if self.keys is not None:
            seen &= self.keys[:, None, None, :]
        if self.segments is not None:
            seen &= (self.segments[:, rows, None] == self.segments[:, None, :])[:, None]
        return seen

    def check(self, queries: int, keys: int) -> None:
        """Raise ValueError where the mask does not fit `queries` x `keys`, or one of them is 0."""
        if not queries or not keys:
            raise ValueError(f"{queries} queries and {keys} keys: give at least one of each")
        square = self.causal or self.segments is not None
        if square and queries != keys:
            raise ValueError(
                f"a causal or segment mask needs as many keys as queries, not {keys} and {queries}"
            )
        for name, array in (("keys", self.keys), ("segments", self.segments)):
            if array is not None and array.shape[-1] != keys:
                raise ValueError(f"mask.{name} has length {array.shape[-1]}, the keys have {keys}")


def check_heads(heads: int, k: Array) -> None:
    """Raise ValueError where the key-value heads of k [B,S,G,D] do not divide `heads`, H."""
    if heads % k.shape[2]:
        raise ValueError(f"{k.shape[2]} key-value heads do not divide {heads} heads")
