"""Residuals that are wide inside: MobileNetV2's, V3's, and EfficientNetV2's without a depthwise."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from flax import nnx
from jaxtyping import Array, Float

from efficient_attn.blocks.squeeze_excite import SqueezeExcite
from efficient_attn.config import require
from efficient_attn.layers.activations import Activation
from efficient_attn.layers.conv2d import ConvNorm


def in_eights(width: float | int) -> int:
    """The nearest multiple of 8, at least 8 and nine tenths of `width`, as light networks round."""
    nearest = max(8, int(width + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * width else nearest


@dataclass(frozen=True)
class Inside:
    """What an inverted residual has inside.

    kernel: side of the windows. activation: after all convolutions but the last. squeeze: the share
    of the hidden channels that squeeze-and-excitation keeps, rounded by `in_eights`, its gate being
    "hardsigmoid"; 0 has none. norm: of all convolutions but the last, "none" gives them biases.
    epsilon: of the norms. drop_path: how often an example skips the block in training.
    """

    kernel: int = 3
    activation: Activation = "relu6"
    squeeze: float = 0.0
    norm: Literal["batchnorm", "none"] = "batchnorm"
    epsilon: float = 1e-5
    drop_path: float = 0.0

    def __post_init__(self):
        require(self.kernel > 0 and self.kernel % 2 == 1, f"kernel={self.kernel} must be odd")
        require(0 <= self.squeeze <= 1, f"squeeze={self.squeeze} is not in [0, 1]")
        require(0 <= self.drop_path < 1, f"drop_path={self.drop_path} is not in [0, 1)")


class InvertedResidual(nnx.Module):
    """x + project(squeeze(depthwise(expand(x)))) (MobileNetV2, arXiv 1801.04381, figure 4).

    `expand` and `project` see single places, `depthwise` windows of single channels. Without
    `hidden` channels there is no `expand`. Where the stride or the widths differ, nothing is added.
    With `squeeze` it is MobileNetV3's (arXiv 1905.02244, figure 4).
    """

    def __init__(
        self,
        width: int,
        out: int,
        *,
        hidden: int | None,
        stride: int = 1,
        inside: Inside,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        conv = partial(ConvNorm, epsilon=inside.epsilon, dtype=dtype, rngs=rngs)
        inner = partial(conv, norm=inside.norm, activation=inside.activation)
        self.expands, self.squeezes = hidden is not None, inside.squeeze > 0
        if hidden is not None:
            self.expand = inner(width, hidden)
        wide = hidden or width
        self.depthwise = inner(wide, wide, inside.kernel, stride=stride, groups=wide)
        if self.squeezes:
            self.squeeze = SqueezeExcite(
                wide, in_eights(inside.squeeze * wide), gate="hardsigmoid", dtype=dtype, rngs=rngs
            )
        self.project = conv(wide, out)
        self.skip = Skip(stride == 1 and width == out, inside.drop_path)

    def __call__(
        self, x: Float[Array, "B H W C"], *, rngs: nnx.Rngs | None
    ) -> Float[Array, "B h w F"]:
        """`rngs` says that this is training."""
        y = self.expand(x, rngs=rngs) if self.expands else x
        y = self.depthwise(y, rngs=rngs)
        y = self.squeeze(y) if self.squeezes else y
        return self.skip(x, self.project(y, rngs=rngs), rngs=rngs)


class FusedResidual(nnx.Module):
    """x + project(spatial(x)), `spatial` seeing windows of all channels (2104.00298, section 3.2).

    last: side of the windows of `project`. As for `InvertedResidual` otherwise.
    """

    def __init__(
        self,
        width: int,
        out: int,
        *,
        hidden: int,
        stride: int = 1,
        last: int = 1,
        inside: Inside,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        conv = partial(ConvNorm, epsilon=inside.epsilon, dtype=dtype, rngs=rngs)
        self.spatial = conv(
            width, hidden, inside.kernel, stride=stride, norm=inside.norm,
            activation=inside.activation,
        )  # fmt: skip
        self.project = conv(hidden, out, last)
        self.skip = Skip(stride == 1 and width == out, inside.drop_path)

    def __call__(
        self, x: Float[Array, "B H W C"], *, rngs: nnx.Rngs | None
    ) -> Float[Array, "B h w F"]:
        """`rngs` says that this is training."""
        return self.skip(x, self.project(self.spatial(x, rngs=rngs), rngs=rngs), rngs=rngs)


class Skip(nnx.Module):
    """x + y, y left out of some examples in training (arXiv 1603.09382); y where nothing `adds`."""

    def __init__(self, adds: bool, drop_path: float):
        self.adds = adds
        self.drop_path = nnx.Dropout(drop_path, broadcast_dims=(1, 2, 3))

    def __call__(
        self, x: Float[Array, "B H W C"], y: Float[Array, "B h w F"], *, rngs: nnx.Rngs | None
    ) -> Float[Array, "B h w F"]:
        """Without `rngs` nothing is left out."""
        return x + self.drop_path(y, deterministic=rngs is None, rngs=rngs) if self.adds else y
