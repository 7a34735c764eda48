"""cosFormer: linear attention whose weights fall off as a cosine of the distance."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from efficient_attn.attention.kernelised import Kernelised
from efficient_attn.config import positive_or_none, require


class Cosformer(Kernelised):
    """w_ts = <relu(q_t), relu(k_s)> cos(pi (t - s) / 2M) (Qin et al. 2022, 2202.08791, eq. 10).

    The cosine of a difference is a sum of two products, so each feature is used twice, once with
    the cosine and once with the sine of its position (equations 11 and 12). Self-attention alone: a
    distance between two sequences has no meaning.
    """

    @dataclass(frozen=True)
    class Config:
        """horizon: M, the distance at which the weight is 0; None is the longest sequence of the
        model. The released code takes the length of each batch, by which padding changes the
        weights of what is valid.
        """

        horizon: int | None = None

        def __post_init__(self):
            positive_or_none(self, "horizon")

    paper = "cosFormer: Rethinking Softmax in Attention, arXiv 2202.08791"
    supports = Kernelised.supports - {"cross"}

    def __init__(self, config, site, *, rngs, shared):
        super().__init__(config, site, rngs=rngs, shared=shared)
        self.horizon = config.horizon or site.seq
        require(
            self.horizon >= site.seq,
            f"cosformer: horizon={self.horizon} is shorter than the sequence, {site.seq}: weights "
            "would be negative; raise it",
        )

    @classmethod
    def count(cls, config, site):
        """R = 2 D."""
        return 2 * site.head_dim

    def features(self, x, positions):
        """relu(x) times the cosine, and times the sine, of pi position / 2M."""
        x = jax.nn.relu(x.astype(jnp.float32))
        angle = (positions.astype(jnp.float32) * (math.pi / (2 * self.horizon)))[..., None, None]
        return jnp.concatenate([x * jnp.cos(angle), x * jnp.sin(angle)], axis=-1), None
