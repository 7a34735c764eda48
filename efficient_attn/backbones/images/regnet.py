"""RegNetY (Designing Network Design Spaces, arXiv 2003.13678, section 5) as published."""

from dataclasses import dataclass

from flax import nnx

from efficient_attn.backbones.base import Build, Input, Rule
from efficient_attn.backbones.images.pyramid import Pyramid, refuse_attention
from efficient_attn.backbones.images.variants import Variant
from efficient_attn.blocks import Chain
from efficient_attn.blocks.bottleneck import Bottleneck
from efficient_attn.config import at_least, require
from efficient_attn.layers.conv2d import ConvNorm

BLOCK = {"squeeze.squeeze": "se.fc1", "squeeze.excite": "se.fc2"}
for _ours, _theirs in (("conv1",) * 2, ("conv2",) * 2, ("conv3",) * 2, ("shortcut", "downsample")):
    BLOCK |= {f"{_ours}.conv": f"{_theirs}.conv", f"{_ours}.norm.norm": f"{_theirs}.bn"}


@dataclass(frozen=True)
class Stage:
    """`depth` bottlenecks of `width` channels; the first of them strides by 2."""

    width: int
    depth: int

    def __post_init__(self):
        at_least(self, 1, "width", "depth")


class RegNet(Pyramid):
    """A convolution, stages of grouped bottlenecks, the mean over the places, a classifier.

    Bottlenecks are as wide inside as outside, and what squeeze-and-excitation keeps is a share of
    the channels that enter the block. No attention.
    """

    @dataclass(frozen=True)
    class Config:
        """stages: each halves the resolution. stem: channels after the first convolution, which
        halves it too. group: channels of a group of the 3 x 3 convolutions. squeeze: the share
        that squeeze-and-excitation keeps; 0 has none. drop_path: how often an example skips the
        last block in training, and earlier ones less (arXiv 1603.09382, equation 4).
        """

        stages: tuple[Stage, ...] = (Stage(24, 1), Stage(56, 1), Stage(152, 4), Stage(368, 7))
        stem: int = 32
        group: int = 8
        squeeze: float = 0.25
        drop_path: float = 0.0

        def __post_init__(self):
            at_least(self, 1, "stem", "group")
            require(len(self.stages) > 0, "stages=() is no network; give one or more")
            require(
                all(stage.width % self.group == 0 for stage in self.stages),
                f"group={self.group} must divide the width of every stage",
            )
            require(0 <= self.squeeze <= 1, f"squeeze={self.squeeze} is not in [0, 1]")
            require(0 <= self.drop_path < 1, f"drop_path={self.drop_path} is not in [0, 1)")

    names = (
        Rule(r"stem\.conv", "stem.conv"),
        Rule(r"stem\.norm\.norm", "stem.bn"),
        Rule("classifier", "head.fc"),
    )

    def __init__(self, config: Config, source: Input, build: Build, *, rngs: nnx.Rngs):
        super().__init__(config, source)
        refuse_attention("regnet", build)
        given = {"dtype": build.dtype, "rngs": rngs}
        self.stem = ConvNorm(source.shape[-1], config.stem, 3, stride=2, activation="relu", **given)
        width, block, stages = config.stem, 0, []
        blocks = sum(stage.depth for stage in config.stages)
        for stage in config.stages:
            layers = []
            for j in range(stage.depth):
                block += 1
                made = Bottleneck(
                    width, stage.width, inner=stage.width, groups=stage.width // config.group,
                    squeeze=round(config.squeeze * width), stride=1 if j else 2,
                    drop_path=config.drop_path * block / blocks, **given,
                )  # fmt: skip
                layers.append(made)
                width = stage.width
            stages.append(Chain(*layers))
        self.stages = nnx.List(stages)
        self.classifier = nnx.Linear(width, source.classes, rngs=rngs)

    def rules(self):
        """Theirs counts stages and blocks from 1."""
        found = []
        for i, stage in enumerate(self.config.stages):
            for j in range(stage.depth):
                ours, theirs = rf"stages\.{i}\.layers\.{j}\.", f"s{i + 1}.b{j + 1}."
                found += [Rule(ours + a, theirs + b) for a, b in BLOCK.items()]
        return (*self.names, *found)


def _variant(group: int, *stages: tuple[int, int]) -> Variant:
    table = tuple(Stage(width, depth) for width, depth in stages)
    return Variant(RegNet, RegNet.Config(stages=table, group=group))


VARIANTS = {
    "regnety_002": _variant(8, (24, 1), (56, 1), (152, 4), (368, 7)),
    "regnety_004": _variant(8, (48, 1), (104, 3), (208, 6), (440, 6)),
    "regnety_006": _variant(16, (48, 1), (112, 3), (256, 7), (608, 4)),
    "regnety_008": _variant(16, (64, 1), (128, 3), (320, 8), (768, 2)),
    "regnety_016": _variant(24, (48, 2), (120, 6), (336, 17), (888, 2)),
    "regnety_032": _variant(24, (72, 2), (216, 5), (576, 13), (1512, 1)),
    "regnety_040": _variant(64, (128, 2), (192, 6), (512, 12), (1088, 2)),
    "regnety_064": _variant(72, (144, 2), (288, 7), (576, 14), (1296, 2)),
    "regnety_080": _variant(56, (168, 2), (448, 4), (896, 10), (2016, 1)),
    "regnety_120": _variant(112, (224, 2), (448, 5), (896, 11), (2240, 1)),
    "regnety_160": _variant(112, (224, 2), (448, 4), (1232, 11), (3024, 1)),
    "regnety_320": _variant(232, (232, 2), (696, 5), (1392, 12), (3712, 1)),
}
