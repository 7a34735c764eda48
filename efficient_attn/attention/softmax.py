"""Exact scaled dot-product attention."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from efficient_attn.attention.base import Core, Cost, kv_heads
from efficient_attn.config import positive_or_none, require
from kernels import Mask, softmax_attention

SHORTEST = 128


class KeyValueCache(NamedTuple):
    """Keys and values of the tokens so far; rows past the present are zero.

    Whatever the backend, a step reads them by XLA: one query fills no tile of a kernel.
    """

    keys: Float[Array, "B S G D"]
    values: Float[Array, "B S G D"]


class Softmax(Core):
    """softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017, equation 1); quadratic in the length."""

    @dataclass(frozen=True)
    class Config:
        """kv_heads: G key-value heads for H query heads; None is H, 1 is multi-query attention
        (arXiv 1911.02150), between them grouped-query attention (arXiv 2305.13245).
        logit_cap: c in l -> c tanh(l / c) (Gemma 2, arXiv 2408.00118), or None.
        """

        kv_heads: int | None = None
        logit_cap: float | None = None

        def __post_init__(self):
            positive_or_none(self, "kv_heads")
            require(
                self.logit_cap is None or self.logit_cap > 0,
                f"logit_cap={self.logit_cap} must be positive; None turns it off",
            )

    paper = "Attention Is All You Need, arXiv 1706.03762"
    supports = frozenset(
        {"padding", "causal", "bidirectional", "cross", "segments", "decode", "alibi"}
    )

    @classmethod
    def cost(cls, config, site, length):
        """2 T^2 E multiply-adds; the cache holds T keys and values per key-value head."""
        kept = 2 * length * kv_heads(config, site) * site.head_dim
        return Cost(2 * length**2 * site.width, 4 * kept)

    def __call__(self, q, k, v, *, mask, shared):
        """See `kernels.softmax_attention`."""
        return softmax_attention(q, k, v, mask=mask, backend=self.site.backend, **self._how)

    def init_state(self, batch, dtype):
        """An empty cache of the site's longest sequence."""
        shape = (batch, self.site.seq, self.kv_heads, self.site.head_dim)
        return KeyValueCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def step(self, q, k, v, state, *, position):
        """Write this token's key and value at `position`, attend to all up to it.

        What is read is the shortest beginning of the cache, of `SHORTEST` rows, twice or four times
        as many and so on, that holds every example's tokens.
        """
        rows = jnp.arange(len(position))
        keys = state.keys.at[rows, position].set(k[:, 0].astype(state.keys.dtype))
        values = state.values.at[rows, position].set(v[:, 0].astype(state.values.dtype))
        counts = _beginnings(keys.shape[1])
        which = jnp.searchsorted(jnp.asarray(counts), jnp.max(position), side="right")
        reads = [functools.partial(self._read, count) for count in counts]
        out = jax.lax.switch(which, reads, q, keys, values, position)
        return out, KeyValueCache(keys, values)

    def _read(self, count, q, keys, values, position):
        """q [B,1,H,D] attends to the first `count` rows, up to its position [B]."""
        past = jnp.arange(count)[None] <= position[:, None]
        return softmax_attention(
            q, keys[:, :count], values[:, :count],
            mask=Mask(keys=past), positions=position[:, None], backend="xla", **self._how,
        )  # fmt: skip

    def prefill(self, q, k, v, state, *, keys):
        """All tokens at once; what lies behind a row's last one is overwritten by its steps."""
        start = (0, 0, 0, 0)
        cache = (
            jax.lax.dynamic_update_slice(whole, new.astype(whole.dtype), start)
            for whole, new in zip(state, (k, v), strict=True)
        )
        mask = Mask(causal=True, keys=keys)
        return self(q, k, v, mask=mask, shared={}), KeyValueCache(*cache)

    @property
    def _how(self):
        return {"logit_cap": self.config.logit_cap, "slopes": self.slopes()}


def _beginnings(length: int) -> list[int]:
    """`SHORTEST` and its doubles below `length`, and that."""
    count, counts = SHORTEST, []
    while count < length:
        counts.append(count)
        count *= 2
    return [*counts, length]
