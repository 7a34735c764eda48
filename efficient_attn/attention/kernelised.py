"""Attention by a feature map: what Performer, linear attention and cosFormer have in common."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float, Int

from efficient_attn.attention.base import Core, Cost
from efficient_attn.attention.recurrent import tokens_run
from kernels import (
    Mask,
    causal_linear_attention,
    linear_attention,
    linear_attention_init,
    linear_attention_read,
    linear_attention_step,
    linear_attention_sum,
)
from kernels.linear_attention import even

CHUNK = 128


class Kernelised(Core):
    """out_t = sum_s <phi(q_t), phi(k_s)> v_s / sum_s <phi(q_t), phi(k_s)>, linear in the length.

    A subclass gives phi (`features`) and the number of features R (`count`).
    """

    supports = frozenset({"padding", "causal", "bidirectional", "cross", "segments", "decode"})

    @classmethod
    def count(cls, config: Any, site: Any) -> int:
        """The number of features, R."""
        raise NotImplementedError

    def features(
        self, x: Float[Array, "B T H D"], positions: Int[Array, "#B T"]
    ) -> tuple[Float[Array, "B T H R"], Float[Array, "B T H"] | None]:
        """phi(x) = features exp(log_scale) of queries or keys that stand at `positions`."""
        raise NotImplementedError

    @classmethod
    def tokens(cls, config, site, length: int) -> int:
        """How many are run over where nothing is causal: chunks, the last one filled, or all."""
        many = cls.count(config, site) > site.head_dim
        return tokens_run(length, even(length, 4 * CHUNK)) if many else length

    @classmethod
    def cost(cls, config, site, length):
        """T R D multiply-adds a head, twice; decoding holds R (D + 1) numbers for any T."""
        rows = cls.count(config, site)
        attend = 2 * cls.tokens(config, site, length) * rows * site.head_dim * site.heads
        return Cost(attend, 4 * site.heads * (rows * (site.head_dim + 1) + 1))

    def __call__(self, q, k, v, *, mask: Mask, shared: Mapping[str, Any]):
        """See `kernels.linear_attention`."""
        return linear_attention(
            q, k, v, features=self.features, mask=mask, chunk=CHUNK, backend=self.site.backend
        )

    def init_state(self, batch, dtype):
        """Sums over the past, float32 whatever `dtype`; their size does not grow with it."""
        rows = self.count(self.config, self.site)
        return linear_attention_init(batch, self.site.heads, rows, self.site.head_dim)

    def step(self, q, k, v, state, *, position):
        """See `kernels.linear_attention_step`."""
        q_features, _ = self.features(q, position[:, None])
        k_features, scale = self.features(k, position[:, None])
        return linear_attention_step(
            q_features, k_features, v, state, log_scale=scale, backend=self.site.backend
        )

    def prefill(self, q, k, v, state, *, keys):
        """See `kernels.causal_linear_attention`."""
        return causal_linear_attention(
            q, k, v, state,
            features=self.features, mask=Mask(causal=True, keys=keys), chunk=CHUNK,
            backend=self.site.backend,
        )  # fmt: skip

    def init_cross(self, k, v, *, mask, shared):
        """Sums over the context; see `kernels.linear_attention_sum`."""
        return linear_attention_sum(
            k, v, heads=self.site.heads, features=self.features, mask=mask, chunk=CHUNK
        )

    def cross(self, q, memory, *, shared):
        """See `kernels.linear_attention_read`."""
        return linear_attention_read(q, memory, features=self.features, chunk=CHUNK)
