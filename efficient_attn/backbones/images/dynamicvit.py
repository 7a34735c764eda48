"""DynamicViT (arXiv 2106.02034): small predictors learn which patches a picture can do without."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from efficient_attn import attention
from efficient_attn.backbones.base import Build, Input, Objective, Rule
from efficient_attn.backbones.images.sparse import (
    SparseVit,
    attention_logits,
    best,
    run,
    take,
    variants,
)
from efficient_attn.backbones.vit import Vit
from efficient_attn.blocks import Block
from efficient_attn.config import require
from kernels import Mask

EPSILON = 1e-6  # of the masked softmax, as released
CHANGES: dict[str, dict[str, Any]] = {
    "dynamicvit_deit_256": {"width": 256, "heads": 4},
    "dynamicvit_lvvit_s": {"layers": (5, 9, 13)},
    "dynamicvit_lvvit_m": {"layers": (6, 11, 16)},
}
"""What the published networks have beyond those that they are made of."""


class Predictor(nnx.Module):
    """Log-probabilities (keep, drop) of each patch, from itself and the mean of those that are left
    (section 3.2).
    """

    def __init__(self, width: int, *, dtype, rngs: nnx.Rngs):
        make = lambda i, o: nnx.Linear(i, o, dtype=dtype, rngs=rngs)  # noqa: E731
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.look = make(width, width)
        self.layers = nnx.List([make(width, width // 2), make(width // 2, width // 4)])
        self.out = make(width // 4, 2)

    def __call__(
        self, x: Float[Array, "B N E"], kept: Float[Array, "B N"]
    ) -> Float[Array, "B N 2"]:
        """`kept` is 1 where a patch is left, else 0."""
        own, all_ = jnp.split(gelu(self.look(self.norm(x))), 2, axis=-1)
        share = kept / jnp.maximum(kept.sum(axis=1, keepdims=True), EPSILON)
        seen = jnp.einsum("bn,bne->be", share.astype(x.dtype), all_)[:, None]
        y = jnp.concatenate([own, jnp.broadcast_to(seen, own.shape)], axis=-1)
        for layer in self.layers:
            y = gelu(layer(y))
        return jax.nn.log_softmax(self.out(y).astype(jnp.float32))


class DynamicVit(SparseVit):
    """Before the s-th of `layers` a predictor leaves floor(keep_rate^s N) of all N patches.

    Evaluation takes those with the highest scores and computes with them alone. Training draws each
    decision (straight-through Gumbel-softmax), keeps every patch, and hides those that are dropped
    from the others (section 3.3); the shares that are kept follow keep_rate^s by the loss

        ratio_weight / S * sum_s (mean of the decisions after s - keep_rate^s)^2

    The paper trains with the plain network as teacher beside it: `config.distill` with kind="soft",
    temperature 1, and weight 1/3 for its proportions. Of its two distillations that is the one of
    the predictions; the one of the patches' features is not here. Over LV-ViT every patch that is
    there is classified: in training those that are dropped as well, as released.
    """

    names = (
        *Vit.names,
        Rule(r"predictors\.(\d+)\.norm", r"score_predictor.\1.in_conv.0"),
        Rule(r"predictors\.(\d+)\.look", r"score_predictor.\1.in_conv.1"),
        Rule(r"predictors\.(\d+)\.layers\.0", r"score_predictor.\1.out_conv.0"),
        Rule(r"predictors\.(\d+)\.layers\.1", r"score_predictor.\1.out_conv.2"),
        Rule(r"predictors\.(\d+)\.out", r"score_predictor.\1.out_conv.4"),
    )

    @dataclass(frozen=True)
    class Config(SparseVit.Config):
        """And:
        ratio_weight: of the loss that holds the shares of patches near keep_rate^s.
        """

        ratio_weight: float = 2.0

        def __post_init__(self):
            super().__post_init__()
            require(self.ratio_weight >= 0, f"ratio_weight={self.ratio_weight} is negative")

    config: Config

    def __init__(self, config: Config, source: Input, build: Build, *, rngs: nnx.Rngs):
        expression = build.expression(self.native)
        for choice in attention.pattern(expression, config.depth):
            require(
                choice.name == "softmax",
                f"dynamicvit learns what to drop through the weights of softmax, and {choice} has "
                "none; leave config.attention at native or softmax, or use evit",
            )
        super().__init__(config, source, build, rngs=rngs)
        self.predictors = nnx.List(
            [Predictor(config.width, dtype=build.dtype, rngs=rngs) for _ in config.layers]
        )

    def mix(self, x: Float[Array, "B T E"], *, rngs: nnx.Rngs | None) -> Float[Array, "B S E"]:
        """The first tokens, and the patches: in evaluation those that are left."""
        first, count = self.config.first, x.shape[1] - self.config.first
        given = {"mask": Mask(), "rngs": rngs, "shared": self.stack.shared}
        kept, shares = jnp.ones((x.shape[0], count)), []
        for layer, block in enumerate(self.stack.blocks, start=1):
            if layer in self.config.layers:
                predictor = self.predictors[len(shares)]
                chances = predictor(x[:, first:], kept)
                ratio = self.config.keep_rate ** (len(shares) + 1)
                shares.append(ratio)
                if rngs is None:
                    at = best(chances[..., 0], max(int(count * ratio), 1))
                    x = jnp.concatenate([x[:, :first], take(x[:, first:], at)], axis=1)
                    kept = take(kept, at)
                else:
                    kept = kept * decide(chances, rngs)
                    self._ask((kept.mean(axis=1) - ratio) ** 2)
            if rngs is None or not shares:
                x = run(block, "mixer", x, given)
            else:
                policy = jnp.pad(kept, [(0, 0), (first, 0)], constant_values=1.0)
                x = x + masked_mixer(block, x, policy, rngs)
            x = run(block, "mlp", x, given)
        return self.stack.norm(x)

    def _ask(self, miss: Float[Array, " B"]) -> None:
        self.sow(Objective, "ratio", self.config.ratio_weight / len(self.config.layers) * miss)


def gelu(x: Array) -> Array:
    """GELU by erf."""
    return jax.nn.gelu(x, approximate=False)


def decide(chances: Float[Array, "B N 2"], rngs: nnx.Rngs) -> Float[Array, "B N"]:
    """1 to keep and 0 to drop, drawn; its gradient is that of the softmax it is the argmax of."""
    soft = jax.nn.softmax(chances + jax.random.gumbel(rngs.dropout(), chances.shape))[..., 0]
    hard = (soft > 0.5).astype(soft.dtype)
    return hard + soft - jax.lax.stop_gradient(soft)


def masked_mixer(
    block: Block, x: Float[Array, "B T E"], policy: Float[Array, "B T"], rngs: nnx.Rngs
) -> Float[Array, "B T E"]:
    """What the mixer adds where a token sees itself and those of policy 1 (section 3.3)."""
    mixer: Any = block.mixer
    q, k, v = mixer.project(block.normed("mixer", x))
    logits = attention_logits(mixer, q, k)
    itself = jnp.eye(x.shape[1])[None]
    seen = policy[:, None] + (1 - policy[:, None]) * itself
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    weights = weights * seen[:, None]
    total = weights.sum(axis=-1, keepdims=True) + EPSILON
    weights = (weights + EPSILON / x.shape[1]) / total
    v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
    y = jnp.einsum("bhts,bshd->bthd", weights.astype(v.dtype), v)
    return block.finished("mixer", mixer.out(rearrange(y, "b t h d -> b t (h d)")), rngs=rngs)


VARIANTS = variants(
    DynamicVit,
    {
        "dynamicvit_deit_256": "deit_small_patch16_224",
        "dynamicvit_deit_small": "deit_small_patch16_224",
        "dynamicvit_deit_base": "deit_base_patch16_224",
        "dynamicvit_lvvit_s": "lvvit_s",
        "dynamicvit_lvvit_m": "lvvit_m",
    },
    lambda name: CHANGES.get(name, {}),
)
