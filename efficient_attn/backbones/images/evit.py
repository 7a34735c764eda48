"""EViT (arXiv 2202.07800): patches that the class token looks at little become one token."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient_attn.backbones.images.sparse import (
    SparseVit,
    attention_logits,
    best,
    run,
    take,
    variants,
)
from kernels import Mask


class Evit(SparseVit):
    """In some layers, between attention and feed-forward, the patches with the highest

        a_j = mean over heads of softmax_j(q_class . k_j / sqrt(D))

    are kept, ceil(keep_rate N) of N (N counts a token fused before), and the others
    become one, sum_j a_j x_j (section 3). It adds no parameters, and does so in training as well.

    q and k are the mixer's own, whatever it does with them. The paper lets keep_rate fall while it
    trains; here it stays, since shapes are fixed when a step is compiled.
    """

    why = "evit ranks patches by the class token's attention"

    @dataclass(frozen=True)
    class Config(SparseVit.Config):
        """And:
        rest: what becomes of the other patches: "fuse" into one token, or "drop".
        """

        rest: Literal["fuse", "drop"] = "fuse"

    config: Config

    def mix(self, x: Float[Array, "B T E"], *, rngs: nnx.Rngs | None) -> Float[Array, "B S E"]:
        """The first tokens, and the patches that are left."""
        given = {"mask": Mask(), "rngs": rngs, "shared": self.stack.shared}
        for layer, block in enumerate(self.stack.blocks, start=1):
            if layer in self.config.layers and self.config.keep_rate < 1:
                x = self._attend_and_shrink(block, x, rngs)
            else:
                x = run(block, "mixer", x, given)
            x = run(block, "mlp", x, given)
        return self.stack.norm(x)

    def _attend_and_shrink(self, block, x, rngs):
        q, k, v = block.mixer.project(block.normed("mixer", x))
        added = block.mixer.attend(q, k, v, Mask(), self.stack.shared)
        logits = attention_logits(block.mixer, q[:, :1], k)
        scores = jax.nn.softmax(logits, axis=-1).mean(axis=1)[:, 0, self.config.first :]
        return self._shrink(x + block.finished("mixer", added, rngs=rngs), scores)

    def _shrink(self, x, scores):
        first, patches = x[:, : self.config.first], x[:, self.config.first :]
        count = math.ceil(self.config.keep_rate * patches.shape[1])
        if count == patches.shape[1]:
            return x
        at = best(scores, count)
        parts = [first, take(patches, at)]
        if self.config.rest == "fuse":
            others = jnp.put_along_axis(scores, at, 0.0, axis=1, inplace=False)
            fused = jnp.einsum("bn,bne->be", others.astype(x.dtype), patches)
            parts.append(fused[:, None])
        return jnp.concatenate(parts, axis=1)


VARIANTS = variants(
    Evit,
    {f"evit_{size}": f"deit_{size}_patch16_224" for size in ("small", "base")},
    lambda name: {},
)
