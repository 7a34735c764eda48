"""A-ViT (arXiv 2112.07658): each token halts by itself when it has thought enough."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from efficient_attn.backbones.base import Objective
from efficient_attn.backbones.images.sparse import SparseVit, best, run, take, variants
from efficient_attn.config import at_least, require
from kernels import Mask


class Avit(SparseVit):
    """Token k halts after the layer n where its scores h_k^l have summed to 1 - epsilon,

        h_k^l = sigmoid(gate_scale * x_k^l[0] - gate_center),  h_k^L = 1

    x_k^l[0] being its first channel, so that nothing is added to the network. A token that has
    halted is not seen any more. The class token's output is sum_l h^l x^l over the layers before n,
    and (1 - sum_l h^l) x^n (section 3). Training asks for

        ponder * mean_k (n_k + r_k), r_k the weight of its last layer
        prior * KL(target || H) / L, H the mean scores of the layers over their sum, the target a
        Gaussian around layer `depth_prior`, summing to 0.98 before it (as released)

    Shapes are fixed, so halting alone saves nothing: in evaluation there is room for keep_rate^s of
    the patches from the s-th of `layers` on, given to those that are furthest from halting. With
    room for all that run the result is the paper's.
    """

    needs = frozenset({"bidirectional", "padding"})

    @dataclass(frozen=True)
    class Config(SparseVit.Config):
        """And:
        gate_scale, gate_center: of the halting scores; the centre keeps them small at first.
        ponder, prior: weights of the two losses.
        depth_prior: the layer, counted from 0, around which tokens should halt.
        epsilon: how near to 1 is enough.
        """

        keep_rate: float = 1.0
        gate_scale: float = 10.0
        gate_center: float = 30.0
        ponder: float = 5e-4
        prior: float = 1e-3
        depth_prior: int = 8
        epsilon: float = 0.01

        def __post_init__(self):
            super().__post_init__()
            at_least(self, 0, "ponder", "prior")
            at_least(self, 1, "depth_prior")
            require(
                self.pool != "dense",
                "pool='dense' scores every patch, and avit keeps none; use pool='cls'",
            )
            require(0 < self.epsilon < 1, f"epsilon must be in (0, 1), not {self.epsilon}")

    config: Config

    def mix(self, x: Float[Array, "B T E"], *, rngs: nnx.Rngs | None) -> Float[Array, "B S E"]:
        """The first tokens alone."""
        config, first = self.config, self.config.first
        count, stage, last = x.shape[1] - first, 0, len(self.stack.blocks)
        spent, cost = jnp.zeros(x.shape[:2]), jnp.zeros(x.shape[:2])
        out, means = jnp.zeros((x.shape[0], first, x.shape[2])), []
        for layer, block in enumerate(self.stack.blocks, start=1):
            if layer in config.layers:
                stage += 1
                if rngs is None:
                    room = max(int(count * config.keep_rate**stage), 1)
                    x, spent, cost = self._make_room(room, x, spent, cost)
            running = spent < 1 - config.epsilon
            x = x * running[..., None].astype(x.dtype)
            given = {"mask": Mask(keys=running), "rngs": rngs, "shared": self.stack.shared}
            x = run(block, "mlp", run(block, "mixer", x, given), given)
            h = config.gate_scale * x[..., 0].astype(jnp.float32) - config.gate_center
            h = jax.nn.sigmoid(h) * running
            means.append(h.mean())
            after = spent + (h if layer < last else 1.0)
            halts = running & (after >= 1 - config.epsilon)
            weight = jnp.where(halts, 1 - spent, h)
            cost = cost + running + jnp.where(halts, 1 - spent, 0.0)
            out = out + weight[:, :first, None] * x[:, :first].astype(jnp.float32)
            spent = after
        if rngs is not None:
            self._ask(cost, jnp.stack(means))
        return self.stack.norm(out.astype(x.dtype))

    def _make_room(self, room, *tokens):
        """The arrays [B, T, ...] with the first tokens and `room` patches."""
        first = self.config.first
        if tokens[0].shape[1] - first <= room:
            return tokens
        at = best(-tokens[1][:, first:], room)
        return tuple(jnp.concatenate([x[:, :first], take(x[:, first:], at)], 1) for x in tokens)

    def _ask(self, cost: Float[Array, "B T"], means: Float[Array, " L"]) -> None:
        config, layers = self.config, np.arange(len(means))
        self.sow(Objective, "ponder", config.ponder * cost.mean(axis=1))
        target = np.exp(-0.5 * (layers - config.depth_prior) ** 2)
        target = 0.98 * target / target[: config.depth_prior].sum()
        found = jnp.clip(means / jnp.maximum(means.sum(), 1e-30), 0.01, 0.99)
        apart = jnp.mean(target * (np.log(target) - jnp.log(found)))
        each = jnp.full((cost.shape[0],), config.prior) * jnp.maximum(apart, 0.0)
        self.sow(Objective, "prior", each)


VARIANTS = variants(
    Avit,
    {f"avit_{size}": f"deit_{size}_patch16_224" for size in ("tiny", "small")},
    lambda name: {"gate_center": 75.0} if name.endswith("small") else {},
)
