"""Convolutions of images, channels last, with the paddings of PyTorch's networks."""

from typing import Any

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
    """activation(norm(conv(x))), the convolution without a bias, see `conv2d` and `BatchNorm`."""

    def __init__(
        self,
        width: int,
        out: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        activation: Activation = "none",
        epsilon: float = 1e-5,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.conv = conv2d(
            width, out, kernel, stride=stride, groups=groups, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.norm = BatchNorm(out, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.activation: Activation = activation

    def __call__(
        self, x: Float[Array, "B H W C"], *, rngs: nnx.Rngs | None
    ) -> Float[Array, "B h w F"]:
        """`rngs` says that this is training."""
        return ACTIVATIONS[self.activation](self.norm(self.conv(x), rngs=rngs))
