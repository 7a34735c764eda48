"""LeViT (arXiv 2104.01136, table 2): attention in a pyramid, with the norms of convolutions."""

from dataclasses import dataclass

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from efficient_attn.attention import Site
from efficient_attn.attention.biased import attend, offsets
from efficient_attn.backbones.base import Build, Input, Rule
from efficient_attn.backbones.images.pyramid import Distilled, mean
from efficient_attn.backbones.images.variants import Variant
from efficient_attn.blocks import Chain, GridShape, GridStack
from efficient_attn.config import at_least, require
from efficient_attn.layers.activations import ACTIVATIONS
from efficient_attn.layers.conv2d import ConvNorm
from efficient_attn.layers.mlp import Mlp
from efficient_attn.layers.norm import BatchNorm, LinearNorm

HEAD = 32
"""Channels of a head of whatever takes the place of the native attention."""
BLOCK, HALVE = r"stages\.(\d+)\.layers\.\d\.stack\.blocks\.(\d+)", r"stages\.(\d+)\.layers\.0"
MLP = {"expand": "ln1.linear", "expand_norm.norm": "ln1.bn"}
MLP |= {"contract": "ln2.linear", "contract_norm.norm": "ln2.bn"}


def _normed(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """Where a linear layer or a convolution and its norm are found."""
    return Rule(rf"{ours}\.(linear|conv)", f"{theirs}.linear"), Rule(
        rf"{ours}\.norm\.norm", f"{theirs}.bn"
    )


@dataclass(frozen=True)
class Stage:
    """`depth` blocks of `width`, their attention with `heads` heads."""

    width: int
    heads: int
    depth: int


class Levit(Distilled):
    """Four convolutions, three stages, and two classifiers, one of them for a teacher's labels.

    The native attention (`biased`) has keys half as wide as values, a bias for each offset and
    norms over the batch. An expression takes its place inside the stages, with heads of 32
    channels; the attention that halves the resolution between them stays: with fewer queries than
    keys it is no mixer.
    """

    names = (
        *(rule for i in range(4) for rule in _normed(rf"stem\.layers\.{i}", f"stem.conv{i + 1}")),
        Rule(rf"{BLOCK}\.mixer\.biases", r"stages.\1.blocks.\2.attn.attention_biases"),
        *_normed(rf"{BLOCK}\.mixer\.qkv", r"stages.\1.blocks.\2.attn.qkv"),
        *_normed(rf"{BLOCK}\.mixer\.out", r"stages.\1.blocks.\2.attn.proj.ln"),
        Rule(rf"{HALVE}\.biases", r"stages.\1.downsample.attn_downsample.attention_biases"),
        *_normed(rf"{HALVE}\.query", r"stages.\1.downsample.attn_downsample.q.ln"),
        *_normed(rf"{HALVE}\.keys_values", r"stages.\1.downsample.attn_downsample.kv"),
        *_normed(rf"{HALVE}\.out", r"stages.\1.downsample.attn_downsample.proj.ln"),
        *(Rule(rf"{BLOCK}\.mlp\.{a}", rf"stages.\1.blocks.\2.mlp.{b}") for a, b in MLP.items()),
        *(Rule(rf"{HALVE}\.mlp\.{a}", rf"stages.\1.downsample.mlp.{b}") for a, b in MLP.items()),
        Rule("classifier_norm.norm", "head.bn"),
        Rule("classifier", "head.linear"),
        Rule("student_norm.norm", "head_dist.bn"),
        Rule("student", "head_dist.linear"),
    )

    @dataclass(frozen=True)
    class Config:
        """stages: the table. key_dim: channels of a head's keys; its values have twice as many,
        four times where the resolution is halved. drop_path: of the last block (see `Shape`).
        """

        stages: tuple[Stage, ...] = (Stage(128, 4, 2), Stage(256, 6, 3), Stage(384, 8, 4))
        key_dim: int = 16
        drop_path: float = 0.0

        def __post_init__(self):
            at_least(self, 1, "key_dim")
            require(len(self.stages) > 0, "stages=() leaves nothing to build; give one or more")
            for stage in self.stages:
                at_least(stage, 1, "heads", "depth")
                require(
                    stage.width % HEAD == 0,
                    f"a stage's width={stage.width} must be a multiple of {HEAD}",
                )

    def __init__(self, config: Config, source: Input, build: Build, *, rngs: nnx.Rngs):
        super().__init__(config, source)
        height, width_px, channels = source.shape
        first, act = config.stages[0].width, "hardswish"
        given = {"dtype": build.dtype, "rngs": rngs}
        widths = [channels, first // 8, first // 4, first // 2, first]
        self.stem = Chain(
            *(
                ConvNorm(a, b, 3, stride=2, activation=act if b < first else "none", **given)
                for a, b in zip(widths, widths[1:], strict=False)
            )
        )
        grid, before, stages = (-(-height // 16), -(-width_px // 16)), 0, []
        blocks = sum(stage.depth for stage in config.stages)
        for i, stage in enumerate(config.stages):
            layers = []
            if i:
                narrow = config.stages[i - 1].width
                layers.append(Halve(narrow, stage.width, grid, key_dim=config.key_dim, **given))
                grid = (-(-grid[0] // 2), -(-grid[1] // 2))
            part = (before, blocks)
            layers.append(_stack(stage, config, grid, build, part=part, rngs=rngs))
            stages.append(Chain(*layers))
            before += stage.depth
        self.stages = nnx.List(stages)
        last = config.stages[-1].width
        self.classifier_norm = BatchNorm(last, dtype=jnp.float32, rngs=rngs)
        self.classifier = nnx.Linear(last, source.classes, rngs=rngs)
        self.student_norm = BatchNorm(last, dtype=jnp.float32, rngs=rngs)
        self.student = nnx.Linear(last, source.classes, rngs=rngs)

    def scores(self, x, *, rngs):
        """The mean over the places, normed for each classifier by itself."""
        x = mean(x)
        return (
            self.classifier(self.classifier_norm(x, rngs=rngs)),
            self.student(self.student_norm(x, rngs=rngs)),
        )


class Halve(nnx.Module):
    """Attention from every second place in rows and columns, then x + mlp(x) (section 4.2):
    [B,H,W,`width`] -> [B,ceil(H / 2),ceil(W / 2),`out`]."""

    def __init__(self, width: int, out: int, grid: tuple[int, int], *, key_dim: int, dtype, rngs):
        heads = max(1, width // key_dim)
        given = {"dtype": dtype, "rngs": rngs}
        self.heads, self.key_dim, self.grid = heads, key_dim, grid
        self.query = LinearNorm(width, heads * key_dim, **given)
        self.keys_values = LinearNorm(width, heads * 5 * key_dim, **given)
        self.out = LinearNorm(heads * 4 * key_dim, out, **given)
        self.biases = nnx.Param(jnp.zeros((heads, grid[0] * grid[1])))
        self.mlp = Mlp(
            out, 2 * out, kind="hardswish", norm="batchnorm", use_bias=False, begin=0.0,
            dropout=0.0, **given,
        )  # fmt: skip

    def __call__(
        self, x: Float[Array, "B H W E"], *, rngs: nnx.Rngs | None
    ) -> Float[Array, "B h w F"]:
        """`rngs` says that this is training."""
        chosen = x[:, ::2, ::2]
        q, kv = (
            rearrange(layer(places, rngs=rngs), "b i j (h d) -> b (i j) h d", h=self.heads)
            for layer, places in ((self.query, chosen), (self.keys_values, x))
        )
        k, v = jnp.split(kv, (self.key_dim,), axis=-1)
        y = attend(q, k, v, self.biases[...][:, offsets(self.grid, stride=2)])
        y = self.out(ACTIVATIONS["hardswish"](y), rngs=rngs)
        y = y + self.mlp(y, rngs=rngs)
        return y.reshape(*chosen.shape[:3], y.shape[-1])


def _stack(stage: Stage, config: Levit.Config, grid, build: Build, *, part, rngs) -> GridStack:
    shape = GridShape(
        depth=stage.depth, width=stage.width, heads=stage.width // HEAD, mlp_ratio=2.0,
        mlp="hardswish", mlp_norm="batchnorm", mlp_bias=False, norm_type="none", final_norm=False,
        dropout=0.0, drop_path=config.drop_path,
    )  # fmt: skip
    site = Site(
        width=stage.width, heads=shape.heads, seq=grid[0] * grid[1], grid=grid,
        dtype=build.dtype, backend=build.backend,
    )  # fmt: skip
    native = (
        f"biased(heads={stage.heads}, key_dim={config.key_dim}, ratio=2, norm='batchnorm', "
        "activation='hardswish')"
    )
    return GridStack(build.expression(native), shape, site, rngs=rngs, part=part)


def _variant(widths, heads, depths, *, key_dim: int) -> Variant:
    stages = tuple(map(Stage, widths, heads, depths))
    return Variant(Levit, Levit.Config(stages, key_dim=key_dim))


VARIANTS = {
    "levit_128s": _variant((128, 256, 384), (4, 6, 8), (2, 3, 4), key_dim=16),
    "levit_128": _variant((128, 256, 384), (4, 8, 12), (4, 4, 4), key_dim=16),
    "levit_192": _variant((192, 288, 384), (3, 5, 6), (4, 4, 4), key_dim=32),
    "levit_256": _variant((256, 384, 512), (4, 6, 8), (4, 4, 4), key_dim=32),
    "levit_384": _variant((384, 512, 768), (6, 9, 12), (4, 4, 4), key_dim=32),
}
