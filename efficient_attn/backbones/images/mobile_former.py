"""Mobile-Former (arXiv 2108.05895): a MobileNet beside a transformer of at most six tokens.

The tables are those of the released code (AAboys/MobileFormer), whose parameters are the paper's.
The multiply-adds in the names are more than these networks have, by 4 % (508m) to 24 % (26m): about
five for each number that a dynamic ReLU bends, so elementwise work seems to be counted there.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient_attn.attention import pattern
from efficient_attn.backbones.base import NATIVE, Build, Input, Rule, refuse_size
from efficient_attn.backbones.images.pyramid import Pyramid
from efficient_attn.backbones.images.variants import Variant
from efficient_attn.blocks import mobile_former as blocks
from efficient_attn.blocks.mobile_former import Lite, MobileFormerBlock, Row, Situation, ToTokens
from efficient_attn.config import at_least, require
from efficient_attn.layers.conv2d import ConvNorm
from efficient_attn.layers.norm import BatchNorm

BLOCK, THERE = r"blocks\.(\d+)\.", r"features.\1."
TO_TOKENS = {"query": "q", "gate": "alpha.0", "out": "proj", "norm": "layer_norm"}
FORMER = {"mixer.query": "q", "mixer.out": "channel_mlp", "mixer_norm": "layer_norm"}
FORMER |= {"mlp.expand": "ffn.0", "mlp.contract": "ffn.2", "mlp_norm": "ffn_norm"}
HEAD = {"last_conv.conv": "conv.1", "last_conv.norm.norm": "conv.2", "linear": "fc.0"}
HEAD |= {"linear_norm.norm": "fc.1", "classifier": "classifier.1"}
LITE = {"depthwise.conv": "conv.0", "depthwise.norm.norm": "conv.1"}
LITE |= {"pointwise.conv": "conv.4", "pointwise.norm.norm": "conv.5"}


class MobileFormer(Pyramid):
    """Blocks in which a map and a few tokens ask each other, then both classified together.

    An expression takes the place of the attention of the tokens among themselves; what passes
    between map and tokens stays, with keys and values that no mixer has. Weights are those of
    AAboys/MobileFormer.
    """

    @dataclass(frozen=True)
    class Config:
        """stem: channels of the first convolution. blocks: the table. last: width of the layer
        before the classifier. tokens, token_width: how many, how wide. groups: of the pointwise
        convolutions. dropout: before the classifier.
        """

        stem: int = 8
        blocks: tuple[Row, ...] = (Row("lite", 12, 3, 2),)
        last: int = 1024
        tokens: int = 3
        token_width: int = 128
        groups: int = 1
        dropout: float = 0.0

        def __post_init__(self):
            at_least(self, 1, "stem", "last", "tokens", "groups")
            at_least(self, 4, "token_width")
            require(len(self.blocks) > 0, "blocks=() leaves nothing to build; give one or more")
            require(
                all(row.width % 2 == 0 for row in self.blocks),
                "every block's width must be even, for two heads",
            )

    names = (
        Rule(r"stem\.conv", "stem.0"),
        Rule(r"stem\.norm\.norm", "stem.1"),
        Rule("tokens", "tokens.weight"),
        Rule(rf"{BLOCK}conv(\d)\.conv", rf"{THERE}conv\2.0"),
        Rule(rf"{BLOCK}conv(\d)\.norm\.norm", rf"{THERE}conv\2.1"),
        *(Rule(BLOCK + a, THERE + b) for a, b in LITE.items()),
        *(
            Rule(rf"{BLOCK}to_tokens\.{a}", f"{THERE}local_global.{b}")
            for a, b in TO_TOKENS.items()
        ),
        *(Rule(rf"{BLOCK}former\.{a}", f"{THERE}global_block.{b}") for a, b in FORMER.items()),
        Rule(rf"{BLOCK}to_map\.key", f"{THERE}global_local.k"),
        Rule(rf"{BLOCK}to_map\.value", f"{THERE}global_local.proj"),
        *(Rule(rf"to_tokens\.{a}", f"local_global.{b}") for a, b in TO_TOKENS.items()),
        *(Rule(a, f"classifier.{b}") for a, b in HEAD.items()),
    )

    def __init__(self, config: Config, source: Input, build: Build, *, rngs: nnx.Rngs):
        super().__init__(config, source)
        given = {"dtype": build.dtype, "rngs": rngs}
        where = Situation(
            tokens=config.tokens, token_width=config.token_width, groups=config.groups,
            dtype=build.dtype, backend=build.backend,
        )  # fmt: skip
        self.stem = ConvNorm(
            source.shape[-1], config.stem, 3, stride=2, activation="relu6", **given
        )
        self.tokens = nnx.Param(
            jax.random.normal(rngs.params(), (config.tokens, config.token_width))
        )
        depth = sum(row.kind != "lite" for row in config.blocks)
        native = build.attention == NATIVE or depth == 0
        choices = [blocks.NATIVE] * depth if native else pattern(build.attention, depth)
        shared: dict[str, nnx.Module] = {}
        made, width, layer = [], config.stem, 0
        for row in config.blocks:
            if row.kind == "lite":
                made.append(Lite(width, row, where, rngs=rngs))
            else:
                block = MobileFormerBlock(
                    width, row, where, choices[layer], layer=layer, rngs=rngs, shared=shared
                )
                made.append(block)
                layer += 1
            width = row.width
        self.blocks = nnx.List(made)
        self.shared = nnx.Dict(shared)
        self.to_tokens = ToTokens(width, where, rngs=rngs)
        self.last_conv = ConvNorm(
            width, 6 * width, groups=config.groups, activation="relu6", **given
        )
        self.linear = nnx.Linear(6 * width + config.token_width, config.last, rngs=rngs)
        self.linear_norm = BatchNorm(config.last, dtype=jnp.float32, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout)
        self.classifier = nnx.Linear(config.last, source.classes, rngs=rngs)

    def rules(self):
        """The second dynamic ReLU of a block follows its second or its third convolution."""
        found = []
        for i, row in enumerate(self.config.blocks):
            for relu, conv in enumerate((1, 2 if row.kind == "mobile" else 3)):
                ours, theirs = rf"blocks\.{i}\.relus\.{relu}", f"features.{i}.hyper{conv}.hyper"
                found += [
                    Rule(rf"{ours}\.squeeze", f"{theirs}.0"),
                    Rule(rf"{ours}\.excite", f"{theirs}.2"),
                ]
        return (*self.names, *found)

    def __call__(
        self, images: Float[Array, "B H W C"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B classes"]:
        """Logits, float32. `rngs` says that this is training.

        Raises:
            ValueError: images of another size than the model was built for.
        """
        maps, tokens = self._encode(images, rngs)
        with jax.named_scope("head"):
            first = self.to_tokens(maps[-1], tokens)[:, 0]
            x = blocks.shuffle(maps[-1], self.config.groups)
            x = self.last_conv(x, rngs=rngs).astype(jnp.float32)
            x = nnx.hard_swish(jnp.mean(x, axis=(1, 2)))
            x = self.linear(jnp.concatenate([x, first.astype(jnp.float32)], axis=-1))
            x = nnx.hard_swish(self.linear_norm(x, rngs=rngs))
            return self.classifier(self.dropout(x, deterministic=rngs is None, rngs=rngs))

    def features(self, images, *, rngs=None):
        """The last map of each resolution, from the finest."""
        return self._encode(images, rngs)[0]

    def _encode(self, images, rngs):
        """The last map of each resolution, and the tokens."""
        refuse_size(images, self.shape)
        with jax.named_scope("stem"):
            x = self.stem(images, rngs=rngs)
        tokens = jnp.broadcast_to(
            self.tokens[...].astype(x.dtype)[None], (len(x), *self.tokens.shape)
        )
        maps = []
        for row, block in zip(self.config.blocks, self.blocks, strict=True):
            halved = row.kind == "down" or row.stride == 2
            with jax.named_scope(f"stage{len(maps) - (not halved and bool(maps))}"):
                x, tokens = block(x, tokens, rngs=rngs, shared=self.shared)
            maps = [*(maps if halved else maps[:-1]), x]
        return tuple(maps), tokens


def _rows(first: Row, *stages: tuple[Row, ...]) -> tuple[Row, ...]:
    return (first, *(row for stage in stages for row in stage))


def _stage(width: int, *expands: int) -> tuple[Row, ...]:
    """A block that halves the resolution, expanding by 6 first, then inverted residuals."""
    return (Row("down", width, 6), *(Row("mobile", width, expand) for expand in expands))


def _deep(a: int, b: int, c: int, d: int, *, wide: int, expands: tuple[int, int]):
    """The rows after the first of the larger networks, `wide` at the end of the third stage."""
    third = (*_stage(c, 4), Row("mobile", wide, 6), Row("mobile", wide, 6))
    return (_stage(a, expands[0]), _stage(b, expands[1]), third, _stage(d, 6, 6))


SMALL = _rows(
    Row("lite", 12, 3, 2), (Row("mobile", 12, 3),), _stage(24, 3),
    (*_stage(48, 4), Row("mobile", 64, 6)), _stage(96, 6),
)  # fmt: skip
MIDDLE = _rows(
    Row("lite", 12, 2), _stage(16), _stage(32, 3), (*_stage(64, 4), Row("mobile", 88, 6)),
    _stage(128, 6),
)  # fmt: skip


def _variant(stem: int, rows: tuple[Row, ...], last: int, tokens: int, width: int, groups: int = 1):
    return Variant(MobileFormer, MobileFormer.Config(stem, rows, last, tokens, width, groups))


VARIANTS = {
    "mobile_former_26m": _variant(8, SMALL, 1024, 3, 128, groups=4),
    "mobile_former_52m": _variant(8, SMALL, 1024, 3, 128),
    "mobile_former_96m": _variant(12, MIDDLE, 1280, 4, 128),
}
for _name, _width, _wide, _expands, _last, _stages in (
    ("151m", 12, 88, (3, 3), 1280, (16, 32, 64, 128)),
    ("214m", 12, 112, (3, 4), 1600, (20, 40, 80, 160)),
    ("294m", 16, 128, (4, 4), 1920, (24, 48, 96, 192)),
    ("508m", 24, 176, (3, 3), 1920, (40, 72, 128, 240)),
):
    _blocks = _rows(Row("lite", _width, 2), *_deep(*_stages, wide=_wide, expands=_expands))
    VARIANTS[f"mobile_former_{_name}"] = _variant(_width, _blocks, _last, 6, 192)
