"""Local attention: exact attention within a window or a block of neighbours."""

import functools
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from efficient_attn.attention.base import Core, Cost, kv_heads
from efficient_attn.attention.softmax import KeyValueCache
from efficient_attn.config import positive_or_none, require
from kernels import Blocks, Mask, block_attention, softmax_attention, window_attention
from kernels.block_attention import runs
from kernels.window_attention import window_blocks


class Local(Core):
    """softmax(q k^T / sqrt(D)) v over the keys near each query; linear in the length.

    Sliding windows are Longformer's (arXiv 2004.05150, section 3.1) and Mistral's
    (arXiv 2310.06825, section 2), blocks the local attention of Long Range Arena.
    """

    @dataclass(frozen=True)
    class Config:
        """window: W, the number of tokens in a window or block.
        pattern: "sliding" sees the last W tokens, its own among them, where it is causal, and
        W // 2 on each side where it is not; "blocked" sees the block of W neighbours that the token
        is in, blocks not overlapping; "interleaved" sees the tokens whose positions agree modulo n,
        n = one more than seq // W: what Long Range Arena's released code computes under the name of
        local attention, because it reshapes to [W, n] and attends along the first axis.
        kv_heads: G key-value heads for H query heads, as in softmax; None is H.
        """

        window: int = 128
        pattern: Literal["sliding", "blocked", "interleaved"] = "sliding"
        kv_heads: int | None = None

        def __post_init__(self):
            require(self.window > 0, f"window={self.window} must be positive")
            positive_or_none(self, "kv_heads")

    paper = "Long Range Arena, arXiv 2011.04006; Mistral 7B, arXiv 2310.06825"
    supports = frozenset({"padding", "causal", "bidirectional", "segments", "decode", "alibi"})

    @classmethod
    def capabilities(cls, config):
        """Blocks lie at fixed places, wherever a segment begins."""
        lacks = {"sliding": set(), "blocked": {"segments"}, "interleaved": {"segments", "decode"}}
        return cls.supports - lacks[config.pattern]

    @classmethod
    def cost(cls, config, site, length):
        """2 E for each pair of tokens compared (in both directions); the cache holds W tokens."""
        kept = min(config.window, site.seq) * kv_heads(config, site) * site.head_dim
        return Cost(
            2 * _blocks(config, site.seq, length, causal=False).logits * site.width,
            None if config.pattern == "interleaved" else 4 * 2 * kept,
        )

    def __call__(self, q, k, v, *, mask, shared):
        """See `kernels.window_attention` and `kernels.block_attention`."""
        mask.check(q.shape[1], k.shape[1])
        given = {"mask": mask, "slopes": self.slopes(), "backend": self.site.backend}
        if self.config.pattern == "sliding":
            left, right = reach(self.config.window, causal=mask.causal)
            out = window_attention(q, k, v, left=left, right=right, **given).out
        else:
            blocks = _blocks(self.config, self.site.seq, q.shape[1], causal=mask.causal)
            out = block_attention(q, k, v, blocks=blocks, **given).out
        return out.astype(q.dtype)

    def init_state(self, batch, dtype):
        """The last W tokens, the newest last; none yet."""
        if self.config.pattern == "interleaved":
            return super().init_state(batch, dtype)
        shape = (batch, self._window, self.kv_heads, self.site.head_dim)
        return KeyValueCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def step(self, q, k, v, state, *, position):
        """Drop the oldest token, add this one, attend to those of its window or block."""
        state = shifted(state, k, v)
        window = self._window
        seen = position if self.config.pattern == "sliding" else position % window
        there = jnp.arange(window)[None] >= window - 1 - seen[:, None]
        out = softmax_attention(
            q, *state, mask=Mask(keys=there), slopes=self.slopes(),
            positions=jnp.full((1, 1), window - 1), backend="xla",
        )  # fmt: skip
        return out, state

    def prefill(self, q, k, v, state, *, keys):
        """All tokens at once; the last W of each row stay."""
        out = self(q, k, v, mask=Mask(causal=True, keys=keys), shared={})
        return out, newest(state, k, v, keys=keys)

    @property
    def _window(self) -> int:
        return min(self.config.window, self.site.seq)


def shifted(state: KeyValueCache, k: Array, v: Array) -> KeyValueCache:
    """A cache of the last tokens without its oldest and with one more, k and v [B,1,G,D]."""
    return KeyValueCache(
        *(
            jnp.concatenate([old[:, 1:], new.astype(old.dtype)], axis=1)
            for old, new in zip(state, (k, v), strict=True)
        )
    )


def newest(state: KeyValueCache, k: Array, v: Array, *, keys: Array) -> KeyValueCache:
    """The last tokens that `keys` [B,T], a beginning of each row, shows, as many as `state` has.

    Where there are fewer, what stands before the first is anything.
    """
    kept = state.keys.shape[1]
    at = jnp.sum(keys, axis=1, dtype=jnp.int32)[:, None] - kept + jnp.arange(kept)[None]
    rows, at = jnp.arange(len(at))[:, None], jnp.maximum(at, 0)
    return KeyValueCache(
        *(new[rows, at].astype(old.dtype) for old, new in zip(state, (k, v), strict=True))
    )


def reach(window: int, *, causal: bool) -> tuple[int, int]:
    """Keys before and after a token: the last W with its own, or W // 2 on each side."""
    return (window - 1, 0) if causal else (window // 2, window // 2)


@functools.lru_cache(maxsize=64)
def _blocks(config: Local.Config, seq: int, length: int, *, causal: bool) -> Blocks:
    if config.pattern == "sliding":
        left, right = reach(config.window, causal=causal)
        return window_blocks(length, left=left, right=right)
    if config.pattern == "blocked":
        at = runs(length, min(config.window, length))
    else:
        stride = seq // config.window + 1
        at = (
            np.arange(-(-length // stride))[None] * stride + np.arange(min(stride, length))[:, None]
        )
        at = np.where(at < length, at, -1)
    return Blocks(queries=at, keys=at, table=np.arange(len(at))[None, :, None])
