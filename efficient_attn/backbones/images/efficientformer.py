"""EfficientFormer (arXiv 2206.01191, table 4): pooling on maps, then attention on few places."""

from dataclasses import dataclass, replace

from flax import nnx

from efficient_attn.attention import Site
from efficient_attn.backbones.base import Build, Input, Rule
from efficient_attn.backbones.images.pyramid import Distilled, mean
from efficient_attn.backbones.images.variants import Variant
from efficient_attn.blocks import Chain, GridShape, GridStack
from efficient_attn.config import at_least, require
from efficient_attn.layers.activations import Activation
from efficient_attn.layers.conv2d import ConvNorm
from efficient_attn.layers.norm import make_norm

HEADS = 8
ATTENDED = GridShape(
    heads=HEADS, mlp="gelu_exact", norm_epsilon=1e-5, layer_scale=1e-5, final_norm=False,
    dropout=0.0,
)  # fmt: skip
POOLED = replace(ATTENDED, norm_type="none", mlp_norm="batchnorm")
POOL, POOL_THERE = r"stages\.(\d)\.layers\.\d\.stack\.blocks\.(\d+)\.", r"stages.\1.blocks.\2."
BRANCHES = {"scales.mixer": "ls1.gamma", "scales.mlp": "ls2.gamma"}
POOL_NAMES = BRANCHES | {"mlp.expand_norm.norm": "mlp.norm1", "mlp.contract_norm.norm": "mlp.norm2"}
CONVOLUTIONS = {"mlp.expand": "mlp.fc1", "mlp.contract": "mlp.fc2"}
ATTENTION_NAMES = BRANCHES | CONVOLUTIONS | {
    "mixer_norm": "norm1", "mixer.qkv.linear": "token_mixer.qkv",
    "mixer.out.linear": "token_mixer.proj", "mixer.biases": "token_mixer.attention_biases",
    "mlp_norm": "norm2",
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """`pools` blocks that average neighbours, then `attentions` blocks that attend."""

    width: int
    pools: int
    attentions: int = 0


class EfficientFormer(Distilled):
    """Two convolutions, four stages, and two classifiers, one of them for a teacher's labels.

    The paper's 4D blocks have pooling and norms over the batch, its 3D blocks layer norms and
    attention with a bias for each offset (`biased`). An expression takes the place of the
    attention; the pooling stays, having been chosen where attention is dear.
    """

    native = f"biased(heads={HEADS}, key_dim=32, ratio=4)"
    names = (
        *(Rule(rf"stem\.layers\.{i}\.conv", f"stem.conv{i + 1}") for i in (0, 1)),
        *(Rule(rf"stem\.layers\.{i}\.norm\.norm", f"stem.norm{i + 1}") for i in (0, 1)),
        Rule(r"stages\.(\d)\.layers\.0\.conv", r"stages.\1.downsample.conv"),
        Rule(r"stages\.(\d)\.layers\.0\.norm\.norm", r"stages.\1.downsample.norm"),
        *(Rule(POOL + a, POOL_THERE + b) for a, b in POOL_NAMES.items()),
        *(Rule(POOL + a, POOL_THERE + b, channels=-1) for a, b in CONVOLUTIONS.items()),
        Rule("norm", "norm"),
        Rule("classifier", "head"),
        Rule("student", "head_dist"),
    )

    @dataclass(frozen=True)
    class Config:
        """stages: the table; each but the first halves the resolution. drop_path: of the last block
        (see `Shape`).
        """

        stages: tuple[Stage, ...] = (Stage(48, 3), Stage(96, 2), Stage(224, 6), Stage(448, 3, 1))
        drop_path: float = 0.0

        def __post_init__(self):
            require(len(self.stages) > 0, "stages=() leaves nothing to build; give one or more")
            for stage in self.stages:
                at_least(stage, 0, "pools", "attentions")
                require(
                    stage.width % HEADS == 0,
                    f"a stage's width={stage.width} must be a multiple of its {HEADS} heads",
                )

    def __init__(self, config: Config, source: Input, build: Build, *, rngs: nnx.Rngs):
        super().__init__(config, source)
        first = config.stages[0].width
        self.stem = Chain(
            _halve(source.shape[-1], first // 2, build, rngs, activation="relu"),
            _halve(first // 2, first, build, rngs, activation="relu"),
        )
        rows, columns = (-(-side // 4) for side in source.shape[:2])
        total = sum(stage.pools + stage.attentions for stage in config.stages)
        stages, before, attention = [], 0, build.expression(self.native)
        for i, stage in enumerate(config.stages):
            layers = []
            if i:
                layers.append(_halve(config.stages[i - 1].width, stage.width, build, rngs))
                rows, columns = -(-rows // 2), -(-columns // 2)
            site = Site(
                width=stage.width, heads=HEADS, seq=rows * columns, grid=(rows, columns),
                dtype=build.dtype, backend=build.backend,
            )  # fmt: skip
            kinds = ((stage.pools, POOLED, "pool"), (stage.attentions, ATTENDED, attention))
            for depth, kind, expression in kinds:
                if depth:
                    given = {"width": stage.width, "depth": depth, "drop_path": config.drop_path}
                    shape, part = replace(kind, **given), (before, total)
                    layers.append(GridStack(expression, shape, site, rngs=rngs, part=part))
                    before += depth
            stages.append(Chain(*layers))
        self.stages = nnx.List(stages)
        last = config.stages[-1].width
        self.norm = make_norm("layernorm", last, epsilon=1e-5, dtype=build.dtype, rngs=rngs)
        self.classifier = nnx.Linear(last, source.classes, rngs=rngs)
        self.student = nnx.Linear(last, source.classes, rngs=rngs)

    def rules(self):
        """timm counts the blocks of a stage through, and a flattening between both kinds as one."""
        found = []
        for i, stage in enumerate(self.config.stages):
            layer = int(i > 0) + int(stage.pools > 0)
            for j in range(stage.attentions):
                ours = rf"stages\.{i}\.layers\.{layer}\.stack\.blocks\.{j}\."
                theirs = f"stages.{i}.blocks.{stage.pools + 1 + j}."
                found += [Rule(ours + a, theirs + b) for a, b in ATTENTION_NAMES.items()]
        return (*found, *self.names)

    def scores(self, x, *, rngs):
        """The mean over the normed places, for each classifier."""
        x = mean(self.norm(x))
        return self.classifier(x), self.student(x)


def _halve(width: int, out: int, build: Build, rngs, *, activation: Activation = "none"):
    return ConvNorm(
        width, out, 3, stride=2, use_bias=True, activation=activation, dtype=build.dtype, rngs=rngs
    )


VARIANTS = {
    "efficientformer_l1": Variant(EfficientFormer, EfficientFormer.Config()),
    "efficientformer_l3": Variant(
        EfficientFormer,
        EfficientFormer.Config((Stage(64, 4), Stage(128, 4), Stage(320, 12), Stage(512, 2, 4))),
    ),
    "efficientformer_l7": Variant(
        EfficientFormer,
        EfficientFormer.Config((Stage(96, 6), Stage(192, 6), Stage(384, 18), Stage(768, 0, 8))),
    ),
}
