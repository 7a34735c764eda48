"""EfficientViT of MIT (arXiv 2205.14756, section 3.2) as published: B0 to B3, L1 to L3."""

from dataclasses import dataclass, replace
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from efficient_attn import attention
from efficient_attn.attention import Site
from efficient_attn.backbones.base import Build, Input, Rule
from efficient_attn.backbones.images.pyramid import Pyramid, mean
from efficient_attn.backbones.images.variants import Variant
from efficient_attn.blocks import Chain
from efficient_attn.blocks.context import ContextBlock, ContextStage
from efficient_attn.blocks.inverted_residual import FusedResidual, Inside, InvertedResidual
from efficient_attn.config import at_least, require
from efficient_attn.layers.activations import ACTIVATIONS, Activation
from efficient_attn.layers.conv2d import ConvNorm
from efficient_attn.layers.norm import make_norm

STEM, LAYER = r"stem\.layers\.1\.layers\.(\d+)", r"stages\.(\d+)\.layers\.(\d+)"
PLACES = {
    r"stem\.layers\.0": "stem.in_conv",
    rf"{STEM}\.spatial": r"stem.res\1.main.conv1",
    rf"{STEM}\.depthwise": r"stem.res\1.main.depth_conv",
    rf"{STEM}\.project": r"stem.res\1.main.point_conv",
    rf"{LAYER}\.expand": r"stages.\1.blocks.\2.main.inverted_conv",
    rf"{LAYER}\.spatial": r"stages.\1.blocks.\2.main.spatial_conv",
    rf"{LAYER}\.depthwise": r"stages.\1.blocks.\2.main.depth_conv",
    rf"{LAYER}\.project": r"stages.\1.blocks.\2.main.point_conv",
    rf"{LAYER}\.local\.expand": r"stages.\1.blocks.\2.local_module.main.inverted_conv",
    rf"{LAYER}\.local\.depthwise": r"stages.\1.blocks.\2.local_module.main.depth_conv",
    rf"{LAYER}\.local\.project": r"stages.\1.blocks.\2.local_module.main.point_conv",
    "wide": "head.in_conv",
}
CONTEXT = r"stages.\1.blocks.\2.context_module.main"


def _conv_norm(ours: str, theirs: str) -> tuple[Rule, Rule]:
    return Rule(rf"{ours}\.conv", f"{theirs}.conv"), Rule(rf"{ours}\.norm\.norm", f"{theirs}.norm")


@dataclass(frozen=True)
class Stage:
    """A block that halves the resolution, and `depth` more, `width` channels wide outside.

    kind: "inverted" or "fused" residuals, or blocks of "attention" and an inverted residual; the
    first of these stages is inverted. first, expand: how many times as wide the first block and the
    others are inside. norm: inside of blocks, "none" has biases. mixer: the attention.
    """

    width: int
    depth: int
    kind: Literal["inverted", "fused", "attention"] = "inverted"
    first: int = 4
    expand: int = 4
    norm: Literal["batchnorm", "none"] = "batchnorm"
    mixer: str = "relu_linear"

    def __post_init__(self):
        at_least(self, 1, "width", "first", "expand")
        at_least(self, 0, "depth")


class EfficientVit(Pyramid):
    """Convolutions, stages of residuals, the last ones with attention, and a wide classifier.

    An expression takes the place of the attention; as in the paper no norm stands before it.
    """

    names = (
        *(rule for ours, theirs in PLACES.items() for rule in _conv_norm(ours, theirs)),
        Rule(rf"{LAYER}\.mixer\.qkv", rf"{CONTEXT}.qkv.conv", channels=-1),
        Rule(rf"{LAYER}\.mixer\.scales\.(\d+)\.depthwise", rf"{CONTEXT}.aggreg.\3.0"),
        Rule(rf"{LAYER}\.mixer\.scales\.(\d+)\.pointwise", rf"{CONTEXT}.aggreg.\3.1"),
        Rule(rf"{LAYER}\.mixer\.out", rf"{CONTEXT}.proj.conv", channels=-1),
        Rule(rf"{LAYER}\.norm\.norm", rf"{CONTEXT}.proj.norm"),
        Rule("hidden", "head.classifier.0"),
        Rule("hidden_norm", "head.classifier.1"),
        Rule("classifier", "head.classifier.4"),
    )

    @dataclass(frozen=True)
    class Config:
        """stem: channels of the stem. stem_depth, stem_kind: of the residuals in it.
        head_dim: channels of a head of the attention. head: channels of the convolution before the
        mean over the places, and of the linear layer after it.
        activation: of all blocks. epsilon: of all norms. dropout: before the classifier.
        drop_path: how often an example skips the last block in training, and earlier ones less
        (arXiv 1603.09382, equation 4).
        """

        stages: tuple[Stage, ...] = (Stage(16, 1), Stage(32, 1, "attention"))
        stem: int = 8
        stem_depth: int = 1
        stem_kind: Literal["inverted", "fused"] = "inverted"
        head_dim: int = 16
        head: tuple[int, ...] = (1024, 1280)
        activation: Activation = "hardswish"
        epsilon: float = 1e-5
        dropout: float = 0.0
        drop_path: float = 0.0

        def __post_init__(self):
            at_least(self, 1, "stem", "head_dim")
            at_least(self, 0, "stem_depth")
            require(len(self.stages) > 0, "stages=() is no network; give one or more")
            require(len(self.head) == 2, f"head={self.head} must be two numbers")
            for name in ("dropout", "drop_path"):
                rate = getattr(self, name)
                require(0 <= rate < 1, f"{name}={rate} is not in [0, 1)")
            for stage in self.stages:
                require(
                    stage.kind != "attention" or stage.width % self.head_dim == 0,
                    f"head_dim={self.head_dim} does not divide a stage's width={stage.width}",
                )

    def __init__(self, config: Config, source: Input, build: Build, *, rngs: nnx.Rngs):
        super().__init__(config, source)
        given = {"dtype": build.dtype, "rngs": rngs}
        width, act, epsilon = config.stem, config.activation, config.epsilon
        inside = Inside(activation=act, epsilon=epsilon)
        first = ConvNorm(
            source.shape[-1], width, 3, stride=2, activation=act, epsilon=epsilon, **given
        )
        whole = Chain(
            *(
                InvertedResidual(width, width, hidden=None, inside=inside, **given)
                if config.stem_kind == "inverted"
                else FusedResidual(width, width, hidden=width, last=3, inside=inside, **given)
                for _ in range(config.stem_depth)
            )
        )
        self.stem = Chain(first, whole)
        sides = tuple(-(-side // 2) for side in source.shape[:2])
        block, stages = 0, []
        for stage in config.stages:
            sides = tuple(-(-side // 2) for side in sides)
            stages.append(self._stage(stage, width, sides, block, build, rngs))
            width, block = stage.width, block + 1 + stage.depth
        self.stages = nnx.List(stages)
        wide, hidden = config.head
        self.wide = ConvNorm(width, wide, activation=act, epsilon=epsilon, **given)
        self.hidden = nnx.Linear(wide, hidden, use_bias=False, rngs=rngs)
        self.hidden_norm = make_norm(
            "layernorm", hidden, epsilon=epsilon, dtype=jnp.float32, rngs=rngs
        )
        self.dropout = nnx.Dropout(config.dropout)
        self.classifier = nnx.Linear(hidden, source.classes, rngs=rngs)

    def _stage(self, stage: Stage, width: int, sides, block: int, build: Build, rngs):
        config, given = self.config, {"dtype": build.dtype, "rngs": rngs}
        blocks = sum(1 + stage.depth for stage in config.stages)
        inside = [
            Inside(
                activation=config.activation, norm=stage.norm, epsilon=config.epsilon,
                drop_path=config.drop_path * (block + 1 + i) / blocks,
            )
            for i in range(1 + stage.depth)
        ]  # fmt: skip
        residual = FusedResidual if stage.kind == "fused" else InvertedResidual
        hidden, inner = stage.first * width, stage.expand * stage.width
        first = residual(width, stage.width, hidden=hidden, stride=2, inside=inside[0], **given)
        if stage.kind != "attention":
            more = [
                residual(stage.width, stage.width, hidden=inner, inside=its, **given)
                for its in inside[1:]
            ]
            return Chain(first, *more)
        site = Site(
            width=stage.width, heads=stage.width // config.head_dim, seq=sides[0] * sides[1],
            grid=sides, qkv_bias=False, dtype=build.dtype, backend=build.backend,
        )  # fmt: skip
        shared: dict[str, nnx.Module] = {}
        choices = attention.pattern(build.expression(stage.mixer), stage.depth)
        made = [
            ContextBlock(
                choice, replace(site, layer=i), hidden=inner, inside=inside[1 + i], rngs=rngs,
                shared=shared,
            )
            for i, choice in enumerate(choices)
        ]  # fmt: skip
        return ContextStage(first, made, shared)

    def head(self, x, *, rngs):
        """Logits of the last map, made wide first."""
        x = mean(self.wide(x, rngs=rngs))
        x = ACTIVATIONS[self.config.activation](self.hidden_norm(self.hidden(x)))
        return self.classifier(self.dropout(x, deterministic=rngs is None, rngs=rngs))


class EfficientVitLarge(EfficientVit):
    """EfficientViT with a stem of fused residuals, which others' files call otherwise."""

    names = (*_conv_norm(rf"{STEM}\.project", r"stem.res\1.main.conv2"), *EfficientVit.names)


def _b(stem: int, depths: tuple[int, ...], *, head_dim: int, head: tuple[int, int]) -> Variant:
    widths = [stem * 2**i for i in range(1, 5)]
    stages = (
        *(Stage(width, depth - 1) for width, depth in zip(widths[:2], depths[:2], strict=True)),
        *(
            Stage(width, depth, "attention", norm="none")
            for width, depth in zip(widths[2:], depths[2:], strict=True)
        ),
    )
    return Variant(EfficientVit, EfficientVit.Config(stages, stem, head_dim=head_dim, head=head))


def _l(stem: int, depths: tuple[int, ...], *, head: tuple[int, int]) -> Variant:
    one, two, three, four = (2 * stem, 4 * stem, 8 * stem, 16 * stem)
    stages = (
        Stage(one, depths[0], "fused", first=16),
        Stage(two, depths[1], "fused", first=16),
        Stage(three, depths[2], first=16, norm="none"),
        Stage(four, depths[3], "attention", first=24, expand=6, norm="none"),
    )
    config = EfficientVitLarge.Config(
        stages, stem, stem_kind="fused", head_dim=32, head=head, activation="gelu", epsilon=1e-7
    )
    return Variant(EfficientVitLarge, config)


VARIANTS = {
    "efficientvit_b0": _b(8, (2, 2, 2, 2), head_dim=16, head=(1024, 1280)),
    "efficientvit_b1": _b(16, (2, 3, 3, 4), head_dim=16, head=(1536, 1600)),
    "efficientvit_b2": _b(24, (3, 4, 4, 6), head_dim=32, head=(2304, 2560)),
    "efficientvit_b3": _b(32, (4, 6, 6, 9), head_dim=32, head=(2304, 2560)),
    "efficientvit_l1": _l(32, (1, 1, 6, 6), head=(3072, 3200)),
    "efficientvit_l2": _l(32, (2, 2, 8, 8), head=(3072, 3200)),
    "efficientvit_l3": _l(64, (2, 2, 8, 8), head=(6144, 6400)),
}
