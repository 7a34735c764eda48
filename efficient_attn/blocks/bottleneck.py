"""Residuals that are narrow or grouped inside: ResNet's, and RegNet's with squeeze-and-excite."""

from functools import partial
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from efficient_attn.blocks.inverted_residual import Skip
from efficient_attn.blocks.squeeze_excite import SqueezeExcite
from efficient_attn.layers.activations import ACTIVATIONS
from efficient_attn.layers.conv2d import ConvNorm


class Bottleneck(nnx.Module):
    """relu(shortcut(x) + widen(squeeze(conv(narrow(x))))) (ResNet, arXiv 1512.03385, figure 5).

    inner: channels of the middle, in `groups` (ResNeXt, arXiv 1611.05431). squeeze: channels that
    squeeze-and-excitation keeps; 0 has none. The 3 x 3 convolution strides, as in torchvision's and
    timm's; the paper's does with the first of 1 x 1. The shortcut is x, or a convolution where the
    shapes differ (option B).
    """

    def __init__(
        self,
        width: int,
        out: int,
        *,
        inner: int,
        groups: int = 1,
        squeeze: int = 0,
        stride: int,
        drop_path: float,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        conv = partial(ConvNorm, dtype=dtype, rngs=rngs)
        self.conv1 = conv(width, inner, activation="relu")
        self.conv2 = conv(inner, inner, 3, stride=stride, groups=groups, activation="relu")
        self.squeezes = squeeze > 0
        if self.squeezes:
            self.squeeze = SqueezeExcite(inner, squeeze, dtype=dtype, rngs=rngs)
        self.conv3 = conv(inner, out)
        self.changes = width != out or stride > 1
        if self.changes:
            self.shortcut = conv(width, out, stride=stride)
        self.skip = Skip(True, drop_path)

    def __call__(
        self, x: Float[Array, "B H W C"], *, rngs: nnx.Rngs | None
    ) -> Float[Array, "B h w F"]:
        """`rngs` says that this is training."""
        y = self.conv2(self.conv1(x, rngs=rngs), rngs=rngs)
        y = self.squeeze(y) if self.squeezes else y
        y = self.conv3(y, rngs=rngs)
        x = self.shortcut(x, rngs=rngs) if self.changes else x
        return ACTIVATIONS["relu"](self.skip(x, y, rngs=rngs))
