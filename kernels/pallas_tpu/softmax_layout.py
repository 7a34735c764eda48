"""How heads lie in blocks of TPU's softmax attention; arrays brought into that order, and back."""

import math
from typing import NamedTuple

import jax.numpy as jnp

from kernels.fused.softmax import Tiles
from kernels.pallas_tpu.chip import LANES

LOGITS = 1 << 20
"""Logits of a block, over its heads."""
REPEATS = 8
"""Query heads that meet a key-value head in one block, at most."""


class Head(NamedTuple):
    """A query head of a block.

    index: among these. q, k: lanes of the blocks of queries and of keys that hold it and the heads
    beside it. place: which of these it is. last: whether no other one follows.
    """

    index: int
    q: slice
    k: slice
    place: int
    last: bool


class Heads(NamedTuple):
    """How heads are laid out.

    width: lanes of a head. pack: key-value heads beside each other. sets: of such packs in a block
    of keys. repeats: query heads of each key-value head in a block of queries; parts: such blocks
    of queries to a block of keys.
    """

    width: int
    pack: int
    sets: int
    repeats: int
    parts: int

    @property
    def lanes(self) -> int:
        """Lanes of a pack."""
        return self.pack * self.width

    @property
    def key_lanes(self) -> int:
        """Lanes of a block of keys."""
        return self.sets * self.lanes

    @property
    def query_lanes(self) -> int:
        """Lanes of a block of queries."""
        return self.sets * self.repeats * self.lanes

    @property
    def count(self) -> int:
        """Query heads in a block."""
        return self.sets * self.repeats * self.pack

    @property
    def members(self) -> list[Head]:
        """The query heads of a block."""
        heads = []
        for index in range(self.count):
            pair, place = divmod(index, self.pack)
            q, k = pair * self.lanes, pair // self.repeats * self.lanes
            q, k = (slice(at, at + self.lanes) for at in (q, k))
            heads.append(Head(index, q, k, place, place == self.pack - 1))
        return heads


def heads_of(q, k, tiles: Tiles) -> Heads:
    """As many heads to a block as there is room for beside these tiles."""
    groups, dim = k.shape[2:]
    repeat = q.shape[2] // groups
    width = -(-dim // LANES) * LANES if dim > LANES else max(8, 1 << (dim - 1).bit_length())
    pack = min(max(1, LANES // width), groups)
    repeats = _divisor(repeat, max(1, REPEATS // pack))
    room = LOGITS // (math.prod(tiles) * repeats * pack)
    sets = _divisor(-(-groups // pack), max(1, room)) if repeats == repeat else 1
    return Heads(width, pack, sets, repeats, repeat // repeats)


def _divisor(n: int, most: int) -> int:
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)


def to_queries(heads: Heads, x):
    """x [B,T,H,D] as [B,T,lanes]: the query heads of a pack beside each other, repeat by repeat."""
    batch, length, count, dim = x.shape
    repeat = heads.repeats * heads.parts
    x = _fit(heads, x.reshape(batch, length, count // repeat, repeat, dim))
    if heads.pack > 1 and repeat > 1:
        x = x.reshape(batch, length, -1, heads.pack, repeat, heads.width).swapaxes(3, 4)
    return x.reshape(batch, length, -1)


def from_queries(heads: Heads, x, like):
    """The way back to the shape of `like`."""
    batch, length, count, dim = like.shape
    repeat = heads.repeats * heads.parts
    if heads.pack > 1 and repeat > 1:
        x = x.reshape(batch, length, -1, repeat, heads.pack, heads.width).swapaxes(3, 4)
    x = x.reshape(batch, length, -1, repeat, heads.width)
    return x[:, :, : count // repeat, :, :dim].reshape(like.shape)


def to_keys(heads: Heads, x):
    """x [B,S,G,D] as [B,S,lanes]."""
    return _fit(heads, x[:, :, :, None]).reshape(*x.shape[:2], -1)


def from_keys(heads: Heads, x, like):
    """The way back to the shape of `like`."""
    batch, length, groups, dim = like.shape
    return x.reshape(batch, length, -1, heads.width)[:, :, :groups, :dim]


def to_rows(heads: Heads, x):
    """x [B,H,T] as [B, blocks of query heads, heads of a block, T]."""
    batch, count, length = x.shape
    repeat = heads.repeats * heads.parts
    x = x.reshape(batch, count // repeat, repeat, length)
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % heads.pack), (0, 0), (0, 0)])
    x = x.reshape(batch, -1, heads.pack, repeat, length).swapaxes(2, 3)
    return x.reshape(batch, -1, heads.count, length)


def from_rows(heads: Heads, x, like):
    """The way back, to [B,H,T] of `like` [B,T,H,D]."""
    batch, length, count = like.shape[:3]
    x = x.reshape(batch, -1, heads.repeats * heads.parts, heads.pack, length).swapaxes(2, 3)
    return x.reshape(batch, -1, length)[:, :count]


def _fit(heads: Heads, x):
    """x [B,T,G,n,D] with whole packs of heads and all lanes."""
    more = -x.shape[2] % heads.pack, heads.width - x.shape[-1]
    return jnp.pad(x, [(0, 0), (0, 0), (0, more[0]), (0, 0), (0, more[1])]) if any(more) else x
