"""MobileViT (arXiv 2110.02178, table 4) and V2 (2206.02680, table 5) as published."""

import math
from dataclasses import dataclass
from typing import Literal

from flax import nnx

from efficient_attn.attention import Site
from efficient_attn.backbones.base import Build, Input, Rule, block_names
from efficient_attn.backbones.images.pyramid import Pyramid, mean
from efficient_attn.backbones.images.variants import Variant
from efficient_attn.blocks import Chain, GridShape
from efficient_attn.blocks.inverted_residual import Inside, InvertedResidual, in_eights
from efficient_attn.blocks.mobilevit import PatchTransformer
from efficient_attn.config import at_least, require
from efficient_attn.layers.conv2d import ConvNorm

LAYER, THEIRS = r"stages\.(\d+)\.layers\.(\d+)", r"stages.\1.\2"
BLOCK, ITS = rf"{LAYER}\.stack\.blocks\.(\d+)", rf"{THEIRS}.transformer.\3"
CONVS = {
    LAYER + r"\.expand": f"{THEIRS}.conv1_1x1",
    LAYER + r"\.depthwise": f"{THEIRS}.conv2_kxk",
    LAYER + r"\.project": f"{THEIRS}.conv3_1x1",
    LAYER + r"\.local": f"{THEIRS}.conv_kxk",
    LAYER + r"\.leave": f"{THEIRS}.conv_proj",
    LAYER + r"\.fuse": f"{THEIRS}.conv_fusion",
    "stem": "stem",
    r"stages\.\d+": "final_conv",
}


@dataclass(frozen=True)
class Stage:
    """`depth` inverted residuals, `width` channels wide, the first with the stride; then, where
    there are `layers`, a transformer of that many, `inner` channels wide, with its `mixer`."""

    width: int
    depth: int = 1
    stride: int = 2
    inner: int = 0
    layers: int = 0
    mixer: str = "softmax"

    def __post_init__(self):
        at_least(self, 1, "width", "depth", "stride")
        at_least(self, 0, "layers")
        require(
            (self.inner > 0) == (self.layers > 0),
            f"inner={self.inner} and layers={self.layers}: a transformer has both, no transformer "
            "neither",
        )


class MobileVit(Pyramid):
    """A convolution, stages of inverted residuals and transformers over patches, perhaps a wide
    convolution, the mean over the places, a classifier.

    An expression takes the place of every transformer's attention; it sees one place of each patch.
    """

    names = (
        *(Rule(rf"{ours}\.conv", f"{theirs}.conv") for ours, theirs in CONVS.items()),
        *(Rule(rf"{ours}\.norm\.norm", f"{theirs}.bn") for ours, theirs in CONVS.items()),
        Rule(rf"{LAYER}\.enter", f"{THEIRS}.conv_1x1"),
        Rule(rf"{LAYER}\.stack\.norm", f"{THEIRS}.norm"),
        *block_names(BLOCK, ITS),
        Rule("classifier", "head.fc"),
    )

    @dataclass(frozen=True)
    class Config:
        """stem: channels of the first convolution. last: of one after the stages, 0 for none.
        expand: how many times as wide inverted residuals are inside, in eights.
        heads, patch: of the transformers; `patch`, in places of the stage's map, tiles it.
        fusion: see `blocks.mobilevit.PatchTransformer`. norm: in the transformers.
        dropout: in the transformers and before the classifier. drop_path: in the transformers, see
        `blocks.Shape`.
        """

        stages: tuple[Stage, ...] = (Stage(16, stride=1), Stage(24, inner=32, layers=2))
        stem: int = 16
        last: int = 0
        expand: float = 4.0
        heads: int = 4
        patch: int = 2
        fusion: Literal["concatenate", "none"] = "concatenate"
        norm: Literal["layernorm", "groupnorm"] = "layernorm"
        dropout: float = 0.0
        drop_path: float = 0.0

        def __post_init__(self):
            at_least(self, 1, "stem", "heads", "patch")
            at_least(self, 0, "last")
            require(len(self.stages) > 0, "stages=() is no network; give one or more")
            require(self.expand > 0, f"expand={self.expand} must be positive")

        def shape(self, stage: Stage) -> GridShape:
            """Of the stage's transformer."""
            return GridShape(
                depth=stage.layers, width=stage.inner, heads=self.heads, mlp_ratio=2.0, mlp="silu",
                norm_type=self.norm, norm_epsilon=1e-5, dropout=self.dropout,
                drop_path=self.drop_path,
            )  # fmt: skip

    def __init__(self, config: Config, source: Input, build: Build, *, rngs: nnx.Rngs):
        super().__init__(config, source)
        given = {"dtype": build.dtype, "rngs": rngs}
        rows, columns, channels = source.shape
        self.stem = ConvNorm(channels, config.stem, 3, stride=2, activation="silu", **given)
        width, before, stages = config.stem, 0, []
        side = (-(-rows // 2), -(-columns // 2))
        for stage in config.stages:
            layers = []
            for j in range(stage.depth):
                layers.append(
                    InvertedResidual(
                        width, stage.width, hidden=in_eights(config.expand * width),
                        stride=1 if j else stage.stride, inside=Inside(activation="silu"), **given,
                    )
                )  # fmt: skip
                width = stage.width
            side = (-(-side[0] // stage.stride), -(-side[1] // stage.stride))
            if stage.layers:
                layers.append(self._transformer(stage, side, before, build, rngs))
                before += stage.layers
            stages.append(Chain(*layers))
        if config.last:
            stages.append(ConvNorm(width, config.last, activation="silu", **given))
        self.stages = nnx.List(stages)
        self.dropout = nnx.Dropout(config.dropout)
        self.classifier = nnx.Linear(config.last or width, source.classes, rngs=rngs)

    def _transformer(self, stage, side, before: int, build: Build, rngs):
        config, patch = self.config, self.config.patch
        whole = 2 * patch * math.prod(stage.stride for stage in config.stages)
        require(
            side[0] % patch == 0 and side[1] % patch == 0,
            f"patches of {patch} do not tile a map of {side[0]} x {side[1]}, which images of "
            f"{self.shape[0]} x {self.shape[1]} come to; take sides that are multiples of {whole}",
        )
        grid = (side[0] // patch, side[1] // patch)
        site = Site(
            width=stage.inner, heads=config.heads, seq=grid[0] * grid[1], grid=grid,
            dtype=build.dtype, backend=build.backend,
        )  # fmt: skip
        return PatchTransformer(
            build.expression(stage.mixer), config.shape(stage), site,
            width=stage.width, patch=patch, fusion=config.fusion, activation="silu", rngs=rngs,
            part=(before, sum(stage.layers for stage in config.stages)),
        )  # fmt: skip

    def head(self, x, *, rngs):
        """Logits of the mean over the places."""
        x = mean(x)
        return self.classifier(self.dropout(x, deterministic=rngs is None, rngs=rngs))


class MobileVitV2(MobileVit):
    """MobileViT whose transformers are made of 1 x 1 convolutions, in others' files."""

    names = (
        Rule(rf"{BLOCK}\.mixer\.project", f"{ITS}.attn.qkv_proj", channels=-1),
        Rule(rf"{BLOCK}\.mixer\.out", f"{ITS}.attn.out_proj", channels=-1),
        Rule(rf"{BLOCK}\.mlp\.expand", f"{ITS}.mlp.fc1", channels=-1),
        Rule(rf"{BLOCK}\.mlp\.contract", f"{ITS}.mlp.fc2", channels=-1),
        *MobileVit.names,
    )


def _v1(widths: tuple[int, ...], inner: tuple[int, ...], *, expand: float, last: int) -> Variant:
    first, second, *others = widths
    stages = (
        Stage(first, stride=1),
        Stage(second, depth=3),
        *(
            Stage(width, inner=narrow, layers=layers)
            for width, narrow, layers in zip(others, inner, (2, 4, 3), strict=True)
        ),
    )
    config = MobileVit.Config(stages, stem=16, last=last, expand=expand)
    return Variant(MobileVit, config, 256)


def _v2(times: float) -> Variant:
    stem, *widths = (int(times * width) for width in (32, 64, 128, 256, 384, 512))
    first, second, *others = widths
    stages = (
        Stage(first, stride=1),
        Stage(second, depth=2),
        *(
            Stage(width, inner=in_eights(width / 2), layers=layers, mixer="separable")
            for width, layers in zip(others, (2, 4, 3), strict=True)
        ),
    )
    config = MobileVitV2.Config(stages, stem=stem, expand=2.0, fusion="none", norm="groupnorm")
    return Variant(MobileVitV2, config, 256)


VARIANTS = {
    "mobilevit_xxs": _v1((16, 24, 48, 64, 80), (64, 80, 96), expand=2.0, last=320),
    "mobilevit_xs": _v1((32, 48, 64, 80, 96), (96, 120, 144), expand=4.0, last=384),
    "mobilevit_s": _v1((32, 64, 96, 128, 160), (144, 192, 240), expand=4.0, last=640),
}
VARIANTS |= {
    f"mobilevitv2_{round(100 * times):03}": _v2(times)
    for times in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
}
