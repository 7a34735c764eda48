"""Sparse Transformer: two sparse sets of keys that together reach every position in two steps."""

import functools
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn.attention.base import Core, Cost
from efficient_attn.attention.softmax import KeyValueCache
from efficient_attn.config import require
from kernels import Blocks, Mask, block_attention, join, softmax_attention
from kernels.block_attention import compact, runs
from kernels.window_attention import window_blocks


class Sparse(Core):
    """softmax(q k^T / sqrt(D)) v over the keys in A1, A2 or both (arXiv 1904.10509, section 4).

        strided    A1 = {j <= i: i - j <= l}                  A2 = {j <= i: (i - j) mod l = 0}
        fixed      A1 = {j <= i: floor(j / l) = floor(i / l)}  A2 = {j <= i: j mod l >= l - c}

    The paper's attention is causal. Without a causal mask the sets lose the condition j <= i, and
    i - j <= l becomes |i - j| <= l. (Long Range Arena's encoder keeps the causal sets instead, its
    classification token apart.) A query whose set is empty, as A2 of "fixed" is at first, gets 0.
    """

    @dataclass(frozen=True)
    class Config:
        """pattern: "fixed" suits text, "strided" what has a period l, as images have.
        block: l; None is the square root of the longest length. With c fixed, work is then T^1.5.
        summary: c of "fixed", tokens at the end of a block that later blocks see; None is 8, or l.
        heads (section 5.1): "merged" sees the union of A1 and A2; "separate" gives A1 to the first
        half of the heads and A2 to the others; "interleaved" gives A1 to the layers 0, 2, ... and
        A2 to 1, 3, ...
        subblocks: "same" lets all heads see the last c tokens of a block, "distinct" gives each
        head another c tokens of it, from the end on, as the paper found better.
        """

        pattern: Literal["fixed", "strided"] = "fixed"
        block: int | None = None
        summary: int | None = None
        heads: Literal["merged", "separate", "interleaved"] = "merged"
        subblocks: Literal["same", "distinct"] = "same"

        def __post_init__(self):
            for name in ("block", "summary"):
                value = getattr(self, name)
                require(value is None or value > 0, f"{name}={value} must be positive")
            require(
                self.block is None or self.summary is None or self.summary <= self.block,
                f"summary={self.summary} exceeds block={self.block}; lower it",
            )

    paper = "Generating Long Sequences with Sparse Transformers, arXiv 1904.10509"
    supports = frozenset({"padding", "causal", "bidirectional", "segments", "decode", "alibi"})
    remedy = "pattern='strided'"

    def __init__(self, config, site, *, rngs, shared):
        super().__init__(config, site, rngs=rngs, shared=shared)
        require(
            config.heads != "separate" or site.heads > 1,
            "sparse: heads='separate' needs two heads or more; use 'merged'",
        )
        size, summary = _sizes(config, site.seq)
        require(
            summary <= size,
            f"sparse: summary={summary} exceeds the block of {size}; lower it or set block",
        )

    @classmethod
    def capabilities(cls, config):
        """Fixed blocks lie at fixed places, wherever a segment begins."""
        return cls.supports - ({"segments"} if config.pattern == "fixed" else set())

    @classmethod
    def cost(cls, config, site, length):
        """2 D for each pair compared in a head, in both directions; the cache holds T tokens."""
        pairs = sum(
            blocks.logits * (group.last - group.first)
            for group in _groups(config, site.heads, site.seq, site.layer)
            for blocks in _blocks(config, group, site.seq, length, causal=False)
        )
        return Cost(2 * pairs * site.head_dim, 4 * 2 * length * site.width)

    def __call__(self, q, k, v, *, mask, shared):
        """Both sets for each group of heads, joined; see `kernels.block_attention`."""
        mask.check(q.shape[1], k.shape[1])
        outs = []
        for group in self._groups:
            heads = slice(group.first, group.last)
            parts = [
                block_attention(
                    q[:, :, heads], k[:, :, heads], v[:, :, heads], blocks=blocks, mask=mask,
                    slopes=self.slopes(heads), backend=self.site.backend,
                )
                for blocks in _blocks(
                    self.config, group, self.site.seq, q.shape[1], causal=mask.causal
                )
            ]  # fmt: skip
            outs.append(join(*parts))
        return jnp.concatenate(outs, axis=2).astype(q.dtype)

    def init_state(self, batch, dtype):
        """An empty cache of the site's longest sequence: later tokens may see any of it."""
        shape = (batch, self.site.seq, self.site.heads, self.site.head_dim)
        return KeyValueCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def step(self, q, k, v, state, *, position):
        """Write this token's key and value at `position`, attend to its sets."""
        rows = jnp.arange(len(position))
        state = KeyValueCache(
            *(
                old.at[rows, position].set(new[:, 0].astype(old.dtype))
                for old, new in zip(state, (k, v), strict=True)
            )
        )
        outs = []
        for group in self._groups:
            heads = slice(group.first, group.last)
            seen = _sees(self.config, group, self.site.seq, position)
            outs.append(
                softmax_attention(
                    q[:, :, heads], state.keys[:, :, heads], state.values[:, :, heads],
                    mask=Mask(keys=seen), slopes=self.slopes(heads),
                    positions=position[:, None], backend="xla",
                )
            )  # fmt: skip
        return jnp.concatenate(outs, axis=2), state

    def prefill(self, q, k, v, state, *, keys):
        """All tokens at once; what lies behind a row's last one is overwritten by its steps."""
        state = KeyValueCache(
            *(
                jax.lax.dynamic_update_slice(whole, new.astype(whole.dtype), (0, 0, 0, 0))
                for whole, new in zip(state, (k, v), strict=True)
            )
        )
        return self(q, k, v, mask=Mask(causal=True, keys=keys), shared={}), state

    @property
    def _groups(self):
        return _groups(self.config, self.site.heads, self.site.seq, self.site.layer)


class Group(NamedTuple):
    """Heads first ... last - 1, which see the same: the sets, and which c tokens of a block."""

    first: int
    last: int
    sets: frozenset[int]
    subblock: int


def _sizes(config: Sparse.Config, seq: int) -> tuple[int, int]:
    """(l, c)."""
    size = config.block or max(1, round(seq**0.5))
    return size, config.summary or min(size, 8)


def _groups(config: Sparse.Config, heads: int, seq: int, layer: int) -> list[Group]:
    size, summary = _sizes(config, seq)
    split = {
        "merged": [(0, heads, {1, 2})],
        "separate": [(0, heads // 2, {1}), (heads // 2, heads, {2})],
        "interleaved": [(0, heads, {layer % 2 + 1})],
    }[config.heads]
    groups = []
    for first, last, sets in split:
        distinct = config.pattern == "fixed" and config.subblocks == "distinct" and 2 in sets
        kinds = min(last - first, size // summary) if distinct else 1
        edges = [first + (last - first) * i // kinds for i in range(kinds + 1)]
        groups += [
            Group(a, b, frozenset(sets), i)
            for i, (a, b) in enumerate(zip(edges[:-1], edges[1:], strict=True))
        ]
    return groups


@functools.lru_cache(maxsize=256)
def _blocks(
    config: Sparse.Config, group: Group, seq: int, length: int, *, causal: bool
) -> tuple[Blocks, ...]:
    """The sets as lists of blocks that have no key in common."""
    size, summary = _sizes(config, seq)
    make = _strided if config.pattern == "strided" else _fixed
    both = make(length, size, summary, group.subblock, merged=len(group.sets) == 2, causal=causal)
    return tuple(both[which - 1] for which in sorted(group.sets))


def _strided(length: int, size: int, summary: int, subblock: int, *, merged: bool, causal: bool):
    right = 0 if causal else length
    near = window_blocks(length, left=size, right=min(size, right))
    far = window_blocks(length, left=length, right=right, dilation=size)
    return near, replace(far, band=(size, size), side="outside") if merged else far


def _fixed(length: int, size: int, summary: int, subblock: int, *, merged: bool, causal: bool):
    at = runs(length, min(size, length))
    number = np.arange(len(at))
    near = Blocks(queries=at, keys=at, table=number[None, :, None])
    start = size - (subblock + 1) * summary
    ends = number[:, None] * size + start + np.arange(summary)[None]
    ends = np.where(ends < length, ends, -1)
    ahead = number[:, None] - number[None, :]
    listed = np.any(ends >= 0, axis=1)[None] & ~((ahead < 0) & causal) & ~((ahead == 0) & merged)
    table = compact(np.where(listed, number[None], -1)[None])
    return near, Blocks(queries=at, keys=ends, table=table)


def _sees(config: Sparse.Config, group: Group, seq: int, position: jax.Array) -> jax.Array:
    """[B,S]: which positions s the token at `position` [B] sees, by the definition of the sets."""
    size, summary = _sizes(config, seq)
    t, s = position[:, None], jnp.arange(seq)[None]
    if config.pattern == "strided":
        sets = (t - s <= size, (t - s) % size == 0)
    else:
        start = size - (group.subblock + 1) * summary
        sets = (t // size == s // size, (s % size >= start) & (s % size < start + summary))
    seen = functools.reduce(jnp.logical_or, (sets[which - 1] for which in sorted(group.sets)))
    return seen & (s <= t)
