"""MobileNetV2 (arXiv 1801.04381, table 2) and V3 (1905.02244, tables 1 and 2) as published."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from efficient_attn.backbones.base import Build, Input, Rule
from efficient_attn.backbones.images.pyramid import Pyramid, mean, refuse_attention
from efficient_attn.backbones.images.variants import Variant
from efficient_attn.blocks import Chain
from efficient_attn.blocks.inverted_residual import Inside, InvertedResidual, in_eights
from efficient_attn.config import at_least, require
from efficient_attn.layers.activations import Activation
from efficient_attn.layers.conv2d import ConvNorm

BLOCK, THEIRS = r"stages\.(\d+)\.layers\.(\d+)", r"blocks.\1.\2"


@dataclass(frozen=True)
class Stage:
    """Inverted residuals, `width` channels wide outside, the first with the stride.

    expand: how many times as wide each block is inside as what it is given, in eights; 1 leaves the
    expansion out. Without any there is one convolution of single places.
    kernel, activation, squeeze: see `blocks.inverted_residual.Inside`.
    """

    width: int
    stride: int
    expand: tuple[float | int, ...]
    kernel: int = 3
    activation: Activation = "relu6"
    squeeze: float = 0.0

    def __post_init__(self):
        at_least(self, 1, "width", "stride")
        require(min(self.expand, default=1) > 0, f"expand={self.expand} must be positive")
        self.inside(0.0)

    def inside(self, drop_path: float) -> Inside:
        """What its blocks have inside."""
        return Inside(
            kernel=self.kernel, activation=self.activation, squeeze=self.squeeze,
            drop_path=drop_path,
        )  # fmt: skip


class MobileNet(Pyramid):
    """A convolution, stages of inverted residuals, a wide convolution of single places, the mean
    over them, a classifier. No attention."""

    names = (
        Rule(r"stem\.conv", "conv_stem"),
        Rule(r"stem\.norm\.norm", "bn1"),
        Rule(r"stages\.0\.layers\.(\d+)\.depthwise\.norm\.norm", r"blocks.0.\1.bn1"),
        Rule(r"stages\.0\.layers\.(\d+)\.project\.conv", r"blocks.0.\1.conv_pw"),
        Rule(r"stages\.0\.layers\.(\d+)\.project\.norm\.norm", r"blocks.0.\1.bn2"),
        Rule(rf"{BLOCK}\.expand\.conv", f"{THEIRS}.conv_pw"),
        Rule(rf"{BLOCK}\.expand\.norm\.norm", f"{THEIRS}.bn1"),
        Rule(rf"{BLOCK}\.depthwise\.conv", f"{THEIRS}.conv_dw"),
        Rule(rf"{BLOCK}\.depthwise\.norm\.norm", f"{THEIRS}.bn2"),
        Rule(rf"{BLOCK}\.squeeze\.squeeze", f"{THEIRS}.se.conv_reduce"),
        Rule(rf"{BLOCK}\.squeeze\.excite", f"{THEIRS}.se.conv_expand"),
        Rule(rf"{BLOCK}\.project\.conv", f"{THEIRS}.conv_pwl"),
        Rule(rf"{BLOCK}\.project\.norm\.norm", f"{THEIRS}.bn3"),
        Rule(rf"{BLOCK}\.conv", f"{THEIRS}.conv"),
        Rule(rf"{BLOCK}\.norm\.norm", f"{THEIRS}.bn1"),
        Rule(r"last\.conv", "conv_head"),
        Rule(r"last\.norm\.norm", "bn2"),
        Rule("classifier", "classifier"),
    )

    @dataclass(frozen=True)
    class Config:
        """stem, last: channels of the first convolution and of the last one, with `activation`.
        pool: whether the mean over the places is taken "after" the last convolution (V2), or
        "before" it, which then has a bias and no norm (V3).
        drop_path: how often an example skips the last block in training, and earlier ones less
        (arXiv 1603.09382, equation 4). dropout: before the classifier.
        """

        stages: tuple[Stage, ...] = (Stage(16, 1, (1,)), Stage(24, 2, (6, 6)))
        stem: int = 32
        last: int = 1280
        activation: Activation = "relu6"
        pool: Literal["after", "before"] = "after"
        drop_path: float = 0.0
        dropout: float = 0.0

        def __post_init__(self):
            at_least(self, 1, "stem", "last")
            require(len(self.stages) > 0, "stages=() is no network; give one or more")
            for name in ("dropout", "drop_path"):
                rate = getattr(self, name)
                require(0 <= rate < 1, f"{name}={rate} is not in [0, 1)")

    def __init__(self, config: Config, source: Input, build: Build, *, rngs: nnx.Rngs):
        super().__init__(config, source)
        refuse_attention("mobilenet", build)
        given, act = {"dtype": build.dtype, "rngs": rngs}, config.activation
        self.stem = ConvNorm(source.shape[-1], config.stem, 3, stride=2, activation=act, **given)
        width, block, stages = config.stem, 0, []
        blocks = sum(len(stage.expand) for stage in config.stages)
        for stage in config.stages:
            layers = []
            for j, expand in enumerate(stage.expand):
                block += 1
                hidden = None if expand == 1 else in_eights(expand * width)
                inside = stage.inside(config.drop_path * block / blocks)
                layers.append(
                    InvertedResidual(
                        width, stage.width, hidden=hidden, stride=1 if j else stage.stride,
                        inside=inside, **given,
                    )
                )  # fmt: skip
                width = stage.width
            if not stage.expand:
                layers.append(ConvNorm(width, stage.width, activation=stage.activation, **given))
                width = stage.width
            stages.append(Chain(*layers))
        self.stages = nnx.List(stages)
        norm = "batchnorm" if config.pool == "after" else "none"
        self.last = ConvNorm(width, config.last, norm=norm, activation=act, **given)
        self.dropout = nnx.Dropout(config.dropout)
        self.classifier = nnx.Linear(config.last, source.classes, rngs=rngs)

    def head(self, x, *, rngs):
        """Logits, the mean taken before or after the last convolution."""
        if self.config.pool == "before":
            x = jnp.mean(x, axis=(1, 2), keepdims=True)
        x = mean(self.last(x, rngs=rngs))
        return self.classifier(self.dropout(x, deterministic=rngs is None, rngs=rngs))


V2 = tuple(
    Stage(width, stride, (expand,) * depth)
    for expand, width, depth, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
)  # fmt: skip
SMALL = (
    Stage(16, 2, (1,), 3, "relu", 0.25),
    Stage(24, 2, (4.5, 3.67), 3, "relu"),
    Stage(40, 2, (4, 6, 6), 5, "hardswish", 0.25),
    Stage(48, 1, (3, 3), 5, "hardswish", 0.25),
    Stage(96, 2, (6, 6, 6), 5, "hardswish", 0.25),
    Stage(576, 1, (), 1, "hardswish"),
)
LARGE = (
    Stage(16, 1, (1,), 3, "relu"),
    Stage(24, 2, (4, 3), 3, "relu"),
    Stage(40, 2, (3, 3, 3), 5, "relu", 0.25),
    Stage(80, 2, (6, 2.5, 2.3, 2.3), 3, "hardswish"),
    Stage(112, 1, (6, 6), 3, "hardswish", 0.25),
    Stage(160, 2, (6, 6, 6), 5, "hardswish", 0.25),
    Stage(960, 1, (), 1, "hardswish"),
)


def _wider(stages: tuple[Stage, ...], times: float) -> tuple[Stage, ...]:
    return tuple(replace(stage, width=in_eights(times * stage.width)) for stage in stages)


def _v2(times: float) -> Variant:
    stem, last = (in_eights(times * width) for width in (32, 1280))
    return Variant(MobileNet, MobileNet.Config(_wider(V2, times), stem, max(1280, last)))


def _deeper(times: float, depth: float) -> Variant:
    """timm's "d": deeper stages but the first and the last; the outer convolutions as V2's."""
    first, *middle, last = _wider(V2, times)
    deep = [replace(stage, expand=(6,) * math.ceil(depth * len(stage.expand))) for stage in middle]
    return Variant(MobileNet, MobileNet.Config((first, *deep, last)))


def _v3(stages: tuple[Stage, ...], times: float, *, last: int) -> Variant:
    stem = 16 if times < 0.75 else in_eights(16 * times)
    config = MobileNet.Config(_wider(stages, times), stem, last, "hardswish", "before")
    return Variant(MobileNet, config)


VARIANTS = {
    f"mobilenetv2_{round(100 * times):03}": _v2(times) for times in (0.35, 0.5, 0.75, 1.0, 1.4)
}
VARIANTS |= {"mobilenetv2_110d": _deeper(1.1, 1.2), "mobilenetv2_120d": _deeper(1.2, 1.4)}
for _times in (0.75, 1.0):
    VARIANTS[f"mobilenetv3_large_{round(100 * _times):03}"] = _v3(LARGE, _times, last=1280)
for _times in (0.5, 0.75, 1.0):
    VARIANTS[f"mobilenetv3_small_{round(100 * _times):03}"] = _v3(SMALL, _times, last=1024)
