"""What blocks TPU's softmax attention goes by: of positions, and of heads in the lanes of memory.

[B,T,H,D] is read as [B,T,H*D]. Where D is less than the 128 lanes of a register, `pack` key-value
heads stand side by side in as many lanes as a register has.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels import tuned
from kernels.fused.softmax import RESIDENT, Tiles, Window
from kernels.pallas_tpu.chip import LANES
from kernels.pallas_tpu.softmax_layout import Heads, heads_of

HIDDEN = np.iinfo(np.int32).min
"""The segment of a key that is padding."""


class Sizes(NamedTuple):
    """At most. queries: in a block, of bfloat16.

    piece: keys, or in the gradient of keys queries, of a block that are taken at once: while one is
    exponentiated, the next is multiplied. edge: queries and keys taken at once where the edge of a
    window goes through a square block. gradient: queries and keys of a block in the backward pass.
    rows: queries taken at once where all keys are on chip.
    """

    queries: int = 1024
    piece: int = 512
    edge: int = 256
    gradient: int = 1024
    rows: int = 512


class Sides(NamedTuple):
    """A piece of a block: the first of its queries and how many, and of its keys."""

    query: int
    queries: int
    key: int
    keys: int

    def joins(self, other: "Sides", most: int) -> bool:
        """Whether the keys of `other` follow, for the same queries, both together up to `most`."""
        follows = self.query == other.query and self.key + self.keys == other.key
        return follows and self.keys + other.keys <= most


class Plan(NamedTuple):
    """What a kernel knows when it is traced.

    blocks: how many there are of queries and of keys. left, right: the window, None where it has no
    such end. masked: there are segments or hidden keys. own: queries have segments of their own.
    """

    tiles: Tiles
    blocks: tuple[int, int]
    heads: Heads
    scale: float
    left: int | None
    right: int | None
    masked: bool
    own: bool
    interpret: Any
    sizes: Sizes

    @property
    def windowed(self) -> bool:
        """Whether positions have a say in what is seen."""
        return self.left is not None or self.right is not None

    def keys_of(self, i):
        """First and last block of keys that the block i of queries sees."""
        (block_q, block_k), (_, count) = self.tiles, self.blocks
        first, last = 0, count - 1
        if self.left is not None:
            first = _floor(i * block_q - self.left, block_k)
        if self.right is not None:
            last = _least(last, _floor(i * block_q + block_q - 1 + self.right, block_k))
        return first, last

    def queries_of(self, j):
        """First and last block of queries that see the block j of keys."""
        (block_q, block_k), (count, _) = self.tiles, self.blocks
        first, last = 0, count - 1
        if self.right is not None:
            first = _floor(j * block_k - self.right, block_q)
        if self.left is not None:
            last = _least(last, _floor(j * block_k + block_k - 1 + self.left, block_q))
        return first, last

    def steps(self, *, across: bool = False) -> int:
        """Blocks of keys that a block of queries sees, at most; `across`, the other way round."""
        ends, blocks = (self.queries_of if across else self.keys_of), self.blocks[across]
        return max(last - first + 1 for first, last in map(ends, range(blocks)))

    @property
    def all(self) -> Sides:
        """A block in one piece."""
        return Sides(0, self.tiles.q, 0, self.tiles.k)

    def pieces(self, *, across: bool = False, most: int | None = None) -> list[Sides]:
        """The pieces of a block: of keys or, `across`, of queries."""
        size = self.tiles[not across]
        piece = _part(size, most or self.sizes.piece)
        if across:
            return [self.all._replace(query=at, queries=piece) for at in range(0, size, piece)]
        return [self.all._replace(key=at, keys=piece) for at in range(0, size, piece)]

    def ahead(self, i, j, sides: Sides):
        """Least and largest t - s in that piece of blocks i and j."""
        apart = i * self.tiles.q + sides.query - j * self.tiles.k - sides.key
        return apart - (sides.keys - 1), apart + sides.queries - 1

    def whole(self, i, j):
        """Whether every query of block i sees every key of block j, as far as the window goes."""
        least, most = self.ahead(i, j, self.all)
        return self.within(most, least)

    def distances(self) -> list[tuple[int, list[tuple[Sides, bool]]]]:
        """(i - j, `corners`) of the blocks that see each other, but are not whole; square blocks.

        What such blocks see of each other depends on i - j alone, and is known beforehand.
        """
        ends = [(i, *self.keys_of(i)) for i in range(self.blocks[0])]
        apart = {d for i, first, last in ends for d in range(i - last, i - first + 1)}
        return [(d, self.corners(d)) for d in sorted(apart) if not self.whole(d, 0)]

    def corners(self, distance: int) -> list[tuple[Sides, bool]]:
        """The pieces that are not hidden, and whether they are whole: those may be larger."""
        size, pieces = _part(self.tiles.q, self.sizes.edge), []
        for query in range(0, self.tiles.q, size):
            for key in range(0, self.tiles.k, size):
                sides = Sides(query, size, key, size)
                least, most = self.ahead(distance, 0, sides)
                before, whole = pieces[-1] if pieces else (sides, False)
                if not self.within(least, most):
                    continue
                if self.within(most, least) and whole and before.joins(sides, self.sizes.piece):
                    pieces[-1] = before._replace(keys=before.keys + size), True
                else:
                    pieces.append((sides, bool(self.within(most, least))))
        return pieces

    def some(self, i, j, sides: Sides):
        """Whether the window shows any of the keys of that piece to any of its queries."""
        return self.within(*self.ahead(i, j, sides))

    def within(self, before, after):
        """Whether t - s is `before` the window's left end and `after` its right end."""
        return both(
            None if self.left is None else before <= self.left,
            None if self.right is None else after >= -self.right,
        )

    def smaller(self) -> "Plan":
        """With the blocks of the backward pass, which divide the others."""
        tiles = Tiles(*(_part(size, self.sizes.gradient) for size in self.tiles))
        pairs = zip(self.blocks, self.tiles, tiles, strict=True)
        count_q, count_k = (count * (size // part) for count, size, part in pairs)
        return self._replace(tiles=tiles, blocks=(count_q, count_k))


def plan(q, k, *, scale, causal, window: Window, segments, keys, tiles: Tiles, interpret) -> Plan:
    """The plan of a call; see `kernels.fused.softmax` for its arguments."""
    left, right = window or (None, None)
    return Plan(
        tiles=tiles, blocks=(q.shape[1] // tiles.q, k.shape[1] // tiles.k),
        heads=heads_of(q, k, tiles), scale=scale, left=left, right=0 if causal else right,
        masked=segments is not None or keys is not None, own=segments is not None,
        interpret=interpret, sizes=sizes_of(q, k, window),
    )  # fmt: skip


def sizes_of(q, k, window: Window) -> Sizes:
    """Those for a window, rounded up to 256, for resident keys, or for `all` keys."""
    what = "resident" if k.shape[1] <= RESIDENT else "all"
    if window is not None:
        what = f"window {-(-max(window) // 256) * 256}"
    return tuned.sizes(f"softmax {what} D{q.shape[3]}", Sizes())


def tiles(q, k, *, causal: bool, window: Window, resident: bool) -> Tiles:
    """Queries and keys in a block; a product of float32 is six of bfloat16, and as long code."""
    queries, keys = q.shape[1], k.shape[1]
    most = 2 * sizes_of(q, k, window).queries // q.dtype.itemsize
    if resident and keys <= RESIDENT:
        return Tiles(_even(queries, most), _even(keys, RESIDENT))
    if window is not None:
        size = _even(queries, max(256, min(most, -(-max(window) // 256) * 256)))
        return Tiles(size, size)
    if queries == keys:
        size = _even(queries, most)
        return Tiles(size, size * (2 if -(-queries // size) % 2 == 0 and not causal else 1))
    return Tiles(_even(queries, most), _even(keys, 2 * most))


def _even(length: int, most: int) -> int:
    """The size of as few blocks as can be, of up to `most`, that fill up `length` with little."""
    count = -(-length // most)
    for unit in (512, 256, LANES):
        size = -(-length // (count * unit)) * unit
        if size <= most and 8 * count * size <= 9 * max(length, LANES):
            return size
    return -(-length // (count * LANES)) * LANES


def _part(size: int, most: int) -> int:
    """The largest part of `size` that divides it, up to `most`; whole lanes if `size` is."""
    unit = LANES if size % LANES == 0 else 1
    return next(n for n in range(min(size, most) // unit * unit, 0, -unit) if size % n == 0)


def _floor(x, size: int):
    """max(x, 0) // size, of numbers and of traced numbers."""
    return max(x, 0) // size if isinstance(x, int) else jax.lax.div(jnp.maximum(x, 0), size)


def _least(a, b):
    """The lesser of numbers and traced numbers."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def both(a, b):
    """a & b, where None says nothing."""
    return b if a is None else a if b is None else a & b


def numbers(segments, keys, k):
    """int32 [B,1,T] of the queries, if there are segments, and [B,1,S] of the keys, if any hides.

    A query sees the keys of its own number, 0 where there are no segments.
    """
    if segments is None and keys is None:
        return ()
    of_keys = jnp.zeros(k.shape[:2], jnp.int32) if segments is None else segments
    if keys is not None:
        of_keys = jnp.where(keys, of_keys, HIDDEN)
    return tuple(x[:, None] for x in (segments, of_keys) if x is not None)
