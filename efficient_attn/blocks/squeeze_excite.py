"""Channels weighed by what the whole map says of them."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient_attn.layers.activations import ACTIVATIONS, Activation
from efficient_attn.layers.conv2d import conv2d


class SqueezeExcite(nnx.Module):
    """x gate(W_2 relu(W_1 mean(x))), the mean over all places (arXiv 1709.01507, section 3).

    hidden: channels after W_1. gate: "sigmoid", the paper's, or "hardsigmoid", MobileNetV3's.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        gate: Activation = "sigmoid",
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.squeeze = conv2d(width, hidden, dtype=dtype, rngs=rngs)
        self.excite = conv2d(hidden, width, dtype=dtype, rngs=rngs)
        self.gate: Activation = gate

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """A factor for each channel of each example."""
        whole = jnp.mean(x, axis=(1, 2), keepdims=True)
        hidden = ACTIVATIONS["relu"](self.squeeze(whole))
        factor = ACTIVATIONS[self.gate](self.excite(hidden))
        return x * jnp.broadcast_to(factor, x.shape)
