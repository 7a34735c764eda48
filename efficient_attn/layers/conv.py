"""The short causal convolution that recurrences look at their nearest past with."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from kernels import Mask, last_inputs, local_conv, local_conv_step


class ShortConv(nnx.Module):
    """silu(conv(x)): K taps of its own for each channel, at and before the token.

    Padding reads as zero; segments do not see each other. Taps (and the bias, if any) begin uniform
    in +-K^-1/2, as in the released models.
    """

    def __init__(self, width: int, taps: int, *, use_bias: bool = False, rngs: nnx.Rngs):
        def draw(shape):
            bound = taps**-0.5
            return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))

        self.weight = draw((width, taps))
        self.bias = draw((width,)) if use_bias else None

    def __call__(self, x: Float[Array, "B T W"], *, mask: Mask) -> Float[Array, "B T W"]:
        """All tokens at once."""
        weights = self.weight[...][None, None]
        return self._finish(local_conv(x, weights, mask=mask))

    def init_state(self, batch: int, dtype: Any) -> Float[Array, "B P W"]:
        """The K - 1 inputs before the first token: zeros."""
        width, taps = self.weight.shape
        return jnp.zeros((batch, taps - 1, width), dtype)

    def step(self, x: Float[Array, "B 1 W"], inputs: Float[Array, "B P W"]):
        """One token's output and its last K - 1 inputs."""
        out, inputs = local_conv_step(x, inputs, self.weight[...][None, None])
        return self._finish(out), inputs

    def last(self, x: Float[Array, "B T W"], inputs, *, keys: Bool[Array, "B T"]):
        """The last K - 1 inputs once the tokens that `keys` shows have followed `inputs`."""
        return last_inputs(x, inputs, keys=keys)

    def _finish(self, x):
        if self.bias is not None:
            x = x + self.bias[...][None, None].astype(x.dtype)
        return jax.nn.silu(x)
