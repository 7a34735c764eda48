"""Convolutions of images, channels last, with the paddings of PyTorch's networks."""

from typing import Any, Literal

from flax import nnx
from jaxtyping import Array, Float

from efficient_attn.layers.activations import ACTIVATIONS, Activation
from efficient_attn.layers.norm import BatchNorm


def conv2d(
    width: int,
    out: int,
    kernel: int = 1,
    *,
    stride: int = 1,
    groups: int = 1,
    use_bias: bool = True,
    dtype: Any,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """[B,H,W,`width`] -> [B,ceil(H / stride),ceil(W / stride),`out`]; `kernel` // 2 zeros around.

    Weights are drawn from N(0, 2 / fan out) (He et al., arXiv 1502.01852), as light networks' are.
    """
    around = (kernel // 2, kernel // 2)
    return nnx.Conv(
        width, out, (kernel, kernel), strides=stride, padding=(around, around),
        feature_group_count=groups, use_bias=use_bias, dtype=dtype, rngs=rngs,
        kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
    )  # fmt: skip


class ConvNorm(nnx.Module):
    """activation(norm(conv(x))), the convolution without a bias, see `conv2d` and `BatchNorm`.

    With norm="none" activation(conv(x)), the convolution with one.
    """

    def __init__(
        self,
        width: int,
        out: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        norm: Literal["batchnorm", "none"] = "batchnorm",
        activation: Activation = "none",
        epsilon: float = 1e-5,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.normed = norm == "batchnorm"
        self.conv = conv2d(
            width, out, kernel, stride=stride, groups=groups, use_bias=not self.normed,
            dtype=dtype, rngs=rngs,
        )  # fmt: skip
        if self.normed:
            self.norm = BatchNorm(out, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.activation: Activation = activation

    def __call__(
        self, x: Float[Array, "B H W C"], *, rngs: nnx.Rngs | None
    ) -> Float[Array, "B h w F"]:
        """`rngs` says that this is training."""
        x = self.conv(x)
        return ACTIVATIONS[self.activation](self.norm(x, rngs=rngs) if self.normed else x)
