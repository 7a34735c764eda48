"""Swin Transformer (arXiv 2103.14030, section 3.3): attention in windows, shifted in turn."""

from flax import nnx

from efficient_attn import attention
from efficient_attn.attention import Site
from efficient_attn.attention.window import Window
from efficient_attn.backbones.base import NATIVE, Build, Rule, block_names
from efficient_attn.backbones.images.pyramid import mean
from efficient_attn.backbones.images.staged import (
    BLOCK,
    STAGE,
    Stage,
    Staged,
)
from efficient_attn.backbones.images.variants import Variant
from efficient_attn.blocks import GridShape
from efficient_attn.blocks.patches import Merge, Patches
from efficient_attn.config import require
from efficient_attn.layers.norm import make_norm

PATCH = 4
THEIRS = r"layers.\1.blocks.\2"


class Swin(Staged):
    """Patches of 4 pixels; between stages, four neighbours become one place.

    The native windows must tile the map of every stage, or cover it.
    """

    names = (
        Rule(r"stem\.conv", "patch_embed.proj"),
        Rule(r"stem\.norm", "patch_embed.norm"),
        Rule(rf"{STAGE}\.(norm|reduction)", r"layers.\1.downsample.\2"),
        Rule(rf"{BLOCK}\.mixer\.core\.table", rf"{THEIRS}.attn.relative_position_bias_table"),
        *block_names(BLOCK, THEIRS),
        Rule("norm", "norm"),
        Rule("classifier", "head.fc"),
    )

    def __init__(self, config: Staged.Config, source, build, *, rngs: nnx.Rngs):
        super().__init__(config, source, build, rngs=rngs)
        last = config.stages[-1].width
        self.norm = make_norm("layernorm", last, epsilon=1e-5, dtype=build.dtype, rngs=rngs)

    def enter(self, channels, width, *, dtype, rngs):
        """Patches of pixels, and a norm."""
        return Patches(channels, width, PATCH, stride=PATCH, around=0, dtype=dtype, rngs=rngs)

    def halve(self, width, out, *, dtype, rngs):
        """Four neighbours become one place."""
        return Merge(width, out, dtype=dtype, rngs=rngs)

    def blocks(self, stage: Stage) -> GridShape:
        """Pre-norm blocks."""
        return GridShape(
            depth=stage.depth, width=stage.width, heads=stage.heads, mlp_ratio=stage.mlp_ratio,
            mlp="gelu_exact", norm_epsilon=1e-5, final_norm=False, dropout=self.config.dropout,
            drop_path=self.config.drop_path,
        )  # fmt: skip

    def check(self, stage: Stage, site: Site, build: Build) -> None:
        """Refuse images whose maps the native windows do not tile (timm fills them up with zeros,
        which then are keys and take weight)."""
        if build.attention != NATIVE:
            return
        for choice in attention.pattern(stage.mixer, stage.depth):
            window = getattr(choice.config, "window", 1) if choice.mechanism is Window else 1
            rows, columns = site.sides
            step = PATCH * 2 ** (len(self.config.stages) - 1) * window
            require(
                all(side <= window or side % window == 0 for side in (rows, columns)),
                f"windows of {window} do not tile the map of {rows} x {columns} that images of "
                f"{self.shape[0]} x {self.shape[1]} make; choose sides that are multiples of "
                f"{step}, or another attention than {NATIVE!r}",
            )

    def head(self, x, *, rngs):
        """The norm, then the mean."""
        return self.classifier(mean(self.norm(x)))


def _variant(width: int, third: int, *, window: int = 7, image_size: int = 224) -> Variant:
    """Heads of 32 channels; 2, 2, `third` and 2 blocks, each second one's windows shifted."""
    mixer = f"window(window={window}) + window(window={window}, shift={window // 2})"
    stages = (
        Stage(depth, width * 2**i, width * 2**i // 32, mixer)
        for i, depth in enumerate((2, 2, third, 2))
    )
    return Variant(Swin, Swin.Config(tuple(stages)), image_size)


VARIANTS = {
    "swin_tiny_patch4_window7_224": _variant(96, 6),
    "swin_small_patch4_window7_224": _variant(96, 18),
    "swin_base_patch4_window7_224": _variant(128, 18),
    "swin_large_patch4_window7_224": _variant(192, 18),
    "swin_base_patch4_window12_384": _variant(128, 18, window=12, image_size=384),
    "swin_large_patch4_window12_384": _variant(192, 18, window=12, image_size=384),
}
