"""Modules one after another."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float


class Chain(nnx.Module):
    """The last of `layers` of ... of the first of x; each is (x, *, rngs) -> x."""

    def __init__(self, *layers: Any):
        self.layers = nnx.List(layers)

    def __call__(
        self, x: Float[Array, "B H W C"], *, rngs: nnx.Rngs | None
    ) -> Float[Array, "B h w F"]:
        """`rngs` says that this is training."""
        for layer in self.layers:
            x = layer(x, rngs=rngs)
        return x
