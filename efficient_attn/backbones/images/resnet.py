"""ResNets of bottlenecks (arXiv 1512.03385, table 1) as published."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from efficient_attn.backbones.base import Build, Input, Rule
from efficient_attn.backbones.images.pyramid import Pyramid, refuse_attention
from efficient_attn.backbones.images.variants import Variant
from efficient_attn.blocks import Chain
from efficient_attn.blocks.bottleneck import Bottleneck
from efficient_attn.config import at_least, require
from efficient_attn.layers.conv2d import ConvNorm


class Stem(nnx.Module):
    """A convolution of 7 x 7 and the largest of 3 x 3, each striding by 2."""

    def __init__(self, channels: int, width: int, *, dtype: Any, rngs: nnx.Rngs):
        self.conv = ConvNorm(
            channels, width, 7, stride=2, activation="relu", dtype=dtype, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "B H W C"], *, rngs: nnx.Rngs | None
    ) -> Float[Array, "B h w F"]:
        """`rngs` says that this is training."""
        x, around = self.conv(x, rngs=rngs), ((0, 0), (1, 1), (1, 1), (0, 0))
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), around)


def _names() -> tuple[Rule, ...]:
    rules = [Rule(r"stem\.conv\.conv", "conv1"), Rule(r"stem\.conv\.norm\.norm", "bn1")]
    for i in range(4):
        ours, theirs = rf"stages\.{i}\.layers\.(\d+)", rf"layer{i + 1}.\1"
        rules += [
            Rule(rf"{ours}\.conv(\d)\.conv", rf"{theirs}.conv\2"),
            Rule(rf"{ours}\.conv(\d)\.norm\.norm", rf"{theirs}.bn\2"),
            Rule(rf"{ours}\.shortcut\.conv", f"{theirs}.downsample.0"),
            Rule(rf"{ours}\.shortcut\.norm\.norm", f"{theirs}.downsample.1"),
        ]
    return (*rules, Rule("classifier", "fc"))


@dataclass(frozen=True)
class Stage:
    """`depth` bottlenecks, `width` channels wide outside."""

    width: int
    depth: int

    def __post_init__(self):
        at_least(self, 1, "depth")
        require(self.width % 4 == 0, f"width={self.width} must be a multiple of 4")


class ResNet(Pyramid):
    """A stem, stages of bottlenecks, the mean over the places, a classifier. No attention."""

    names = _names()

    @dataclass(frozen=True)
    class Config:
        """stages: each but the first halves the resolution. stem: channels after the stem.
        drop_path: how often an example skips the last block in training, and earlier ones less
        (arXiv 1603.09382, equation 4).
        """

        stages: tuple[Stage, ...] = (Stage(256, 3), Stage(512, 4), Stage(1024, 6), Stage(2048, 3))
        stem: int = 64
        drop_path: float = 0.0

        def __post_init__(self):
            at_least(self, 1, "stem")
            require(len(self.stages) > 0, "stages=() is no network; give one or more")
            require(0 <= self.drop_path < 1, f"drop_path={self.drop_path} is not in [0, 1)")

    def __init__(self, config: Config, source: Input, build: Build, *, rngs: nnx.Rngs):
        super().__init__(config, source)
        refuse_attention("resnet", build)
        given = {"dtype": build.dtype, "rngs": rngs}
        self.stem = Stem(source.shape[-1], config.stem, **given)
        width, block, stages = config.stem, 0, []
        blocks = sum(stage.depth for stage in config.stages)
        for i, stage in enumerate(config.stages):
            layers = []
            for j in range(stage.depth):
                block += 1
                made = Bottleneck(
                    width, stage.width, inner=stage.width // 4, stride=2 if i and not j else 1,
                    drop_path=config.drop_path * block / blocks, **given,
                )  # fmt: skip
                layers.append(made)
                width = stage.width
            stages.append(Chain(*layers))
        self.stages = nnx.List(stages)
        self.classifier = nnx.Linear(width, source.classes, rngs=rngs)


def _variant(*depths: int) -> Variant:
    widths = (256, 512, 1024, 2048)
    return Variant(ResNet, ResNet.Config(stages=tuple(map(Stage, widths, depths))))


VARIANTS = {
    "resnet50": _variant(3, 4, 6, 3),
    "resnet101": _variant(3, 4, 23, 3),
    "resnet152": _variant(3, 8, 36, 3),
}
