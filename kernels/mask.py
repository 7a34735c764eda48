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

    In every op of this package a query that sees no key gets 0.
    """

    causal: bool = field(default=False, metadata={"static": True})
    keys: Bool[Array, "B S"] | None = None
    segments: Int[Array, "B T"] | None = None

    @property
    def needs(self) -> frozenset[str]:
        """What a mechanism must support to honour this mask."""
        asked = {"causal": self.causal, "padding": self.keys, "segments": self.segments}
        return frozenset(name for name, on in asked.items() if on is not None and on is not False)

    def visible(self, queries: int, keys: int) -> Bool[Array, "#B 1 T S"]:
        """The whole mask as booleans, for references and for paths that are quadratic anyway."""
        self.check(queries, keys)
        seen = jnp.ones((1, 1, queries, keys), bool)
        if self.causal:
            seen &= jnp.arange(queries)[:, None] >= jnp.arange(keys)
        if self.keys is not None:
            seen &= self.keys[:, None, None, :]
        if self.segments is not None:
            seen &= (self.segments[:, :, None] == self.segments[:, None, :])[:, None]
        return seen

    def check(self, queries: int, keys: int) -> None:
        """Raise ValueError where the mask does not fit `queries` x `keys`."""
        square = self.causal or self.segments is not None
        if square and queries != keys:
            raise ValueError(
                f"a causal or segment mask needs as many keys as queries, not {keys} and {queries}"
            )
        for name, array in (("keys", self.keys), ("segments", self.segments)):
            if array is not None and array.shape[-1] != keys:
                raise ValueError(f"mask.{name} has length {array.shape[-1]}, the keys have {keys}")
