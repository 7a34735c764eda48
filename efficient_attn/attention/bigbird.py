"""BigBird: a window, some global and some random blocks of keys for each block of queries."""

import functools
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from efficient_attn.attention.base import Core, Cost
from efficient_attn.config import at_least, require
from kernels import Blocks, block_attention
from kernels.block_attention import compact, runs


class BigBird(Core):
    """softmax(q k^T / sqrt(D)) v over a graph of blocks (Zaheer et al., 2007.14062, section 2).

    The sequence of `seq` positions is cut into blocks. A block sees the window around it, the
    global blocks and `random` others, drawn once for each head and layer; global blocks see all
    blocks and are seen by all: the paper's internal construction, ITC; ETC, with tokens added in
    front, is left out. Everything follows from `seq`, so a padded sequence gives what the sequence
    cut to its length gives. A list holds each block once, and all of them where few are left. (The
    released code may draw a block of the window again in its last rows, and draws among the first
    1,024 tokens alone where there are 1,024, 3,072 or 4,096.)
    """

    @dataclass(frozen=True)
    class Config:
        """block: tokens of a block.
        window: blocks of the window, an odd number, the block itself the middle one.
        random: random blocks; other ones in each head and layer.
        first, last: global blocks at the beginning and at the end of `seq` positions.
        seed: of the random blocks.
        """

        block: int = 64
        window: int = 3
        random: int = 3
        first: int = 1
        last: int = 1
        seed: int = 0

        def __post_init__(self):
            at_least(self, 1, "block", "window")
            at_least(self, 0, "random", "first", "last", "seed")
            require(self.window % 2 == 1, f"window={self.window} must be odd: blocks on both sides")

    paper = "Big Bird: Transformers for Longer Sequences, arXiv 2007.14062"
    supports = frozenset({"padding", "bidirectional", "alibi"})

    @classmethod
    def cost(cls, config, site, length):
        """2 E for each pair of tokens of blocks compared; linear in the length."""
        pairs = sum(
            blocks.logits
            for blocks in bigbird_blocks(config, site.seq, length, site.heads, site.layer)
        )
        return Cost(2 * pairs * site.width, None)

    def __call__(self, q, k, v, *, mask, shared):
        """The blocks that see some, and those that see all; see `kernels.block_attention`."""
        mask.check(q.shape[1], k.shape[1])
        site = self.site
        slopes = self.slopes()
        parts = [
            block_attention(q, k, v, blocks=blocks, mask=mask, slopes=slopes, backend=site.backend)
            for blocks in bigbird_blocks(self.config, site.seq, q.shape[1], site.heads, site.layer)
        ]
        return functools.reduce(jnp.add, (part.out for part in parts)).astype(q.dtype)


@functools.lru_cache(maxsize=64)
def bigbird_blocks(
    config: BigBird.Config, seq: int, length: int, heads: int, layer: int
) -> tuple[Blocks, ...]:
    """The queries of ordinary and of global blocks, those that exist, with the blocks they see."""
    listed, dense = _graph(config, max(seq, length), heads, layer)
    at = runs(length, min(config.block, length))
    count = len(at)
    table = np.where(listed[:, :count, :count], np.arange(count)[None, None], -1)
    kinds = []
    for chosen in (np.flatnonzero(~dense[:count]), np.flatnonzero(dense[:count])):
        if len(chosen):
            some = compact(table[: 1 if dense[chosen[0]] else heads, chosen])
            kinds.append(Blocks(queries=at[chosen], keys=at, table=some))
    return tuple(kinds)


def _graph(config, length: int, heads: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """[H,N,N]: whether block n sees block m; [N]: whether a block is global."""
    count = -(-length // config.block)
    number = np.arange(count)
    dense = (number < config.first) | (number >= count - config.last)
    near = np.abs(number[:, None] - number[None, :]) <= config.window // 2
    listed = np.broadcast_to(near | dense[:, None] | dense[None, :], (heads, count, count))
    draws = np.random.default_rng((config.seed, layer)).random((heads, count, count))
    rank = np.argsort(np.argsort(np.where(listed, 2.0, draws), axis=-1), axis=-1)
    return listed | (rank < config.random), dense
