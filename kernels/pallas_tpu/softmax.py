"""Softmax attention on TPU: one pass over the keys, no logits in memory (arXiv 2205.14135).

A head's dimension may be less than the 128 lanes of a register. Then `pack` key-value heads lie
side by side in a block, as they do in [B,T,H*D], which is read as it is; each head's product is
taken over all lanes, those of the others set to zero: to the matrix unit, 128 or more deep, that is
the same work. With grouped heads a block of keys meets up to `HEADS` query heads.

Softmax is in base 2, the scale times log2(e) folded into one factor of the logits.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.fused_softmax import RESIDENT, Tiles, Window

LANES = 128
HEADS = 8
"""Query heads, or pairs and so on of them, that one block of keys meets at once."""
FLOOR = -1e30
"""No logit is below it; where a row has seen no key yet, its maximum."""
LOG2E = math.log2(math.e)
HIDDEN = np.iinfo(np.int32).min
"""The segment of a key that is padding."""
PIECE = 512
"""Keys, or in the gradient of keys queries, of a tile that are taken at once: while one piece is
exponentiated, the next is multiplied."""
GRADIENT = 1024
"""Queries and keys of a tile in the backward pass, at most."""
VMEM = 64 << 20


class Plan(NamedTuple):
    """What a kernel knows when it is traced.

    heads: (pack, reps, parts). A block holds `pack` key-value heads and `reps` query heads of each;
        `parts` blocks of queries make up the groups of one block of keys. width: lanes of a head.
    left, right: the window, None where it has no such end. masked: there are segments or hidden
        keys. own: the queries have segments of their own.
    """

    tiles: Tiles
    blocks: tuple[int, int]
    heads: tuple[int, int, int]
    width: int
    scale: float
    left: int | None
    right: int | None
    masked: bool
    own: bool
    interpret: Any

    @property
    def lanes(self) -> int:
        """Lanes of a block of keys."""
        return self.heads[0] * self.width

    @property
    def members(self) -> list[tuple[int, slice, int]]:
        """(index, lanes in a block of queries, place in these lanes) of each query head."""
        pack, reps, _ = self.heads
        return [
            (j * pack + g, slice(j * self.lanes, (j + 1) * self.lanes), g)
            for j in range(reps)
            for g in range(pack)
        ]

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

    def pieces(self, across: bool) -> list[tuple[int, int, int, int]]:
        """(first, count) of the queries and of the keys in each piece of a tile.

        Pieces are of keys or, `across`, of queries.
        """
        queries, keys = self.tiles
        if across:
            return [(at, _at_most(queries, PIECE), 0, keys) for at in _starts(queries)]
        return [(0, queries, at, _at_most(keys, PIECE)) for at in _starts(keys)]

    def ahead(self, i, j, sides):
        """Least and largest t - s in that piece of blocks i and j."""
        query, queries, key, keys = sides
        apart = i * self.tiles.q + query - j * self.tiles.k - key
        return apart - (keys - 1), apart + queries - 1

    def whole(self, i, j):
        """Whether every query of block i sees every key of block j, as far as the window goes."""
        least, most = self.ahead(i, j, (0, self.tiles.q, 0, self.tiles.k))
        return _both(
            None if self.left is None else most <= self.left,
            None if self.right is None else least >= -self.right,
        )

    def some(self, i, j, sides):
        """Whether the window shows any of the keys of that piece to any of its queries."""
        least, most = self.ahead(i, j, sides)
        return _both(
            None if self.left is None else least <= self.left,
            None if self.right is None else most >= -self.right,
        )


def _at_most(size: int, most: int) -> int:
    """`size`, or if that is more than `most` what divides both."""
    return size if size <= most else math.gcd(size, most)


def _starts(size: int) -> range:
    return range(0, size, _at_most(size, PIECE))


def _both(a, b):
    """a & b, where None says nothing."""
    return b if a is None else a if b is None else a & b


def _floor(x, size: int):
    """max(x, 0) // size, of numbers and of traced numbers."""
    return max(x, 0) // size if isinstance(x, int) else jax.lax.div(jnp.maximum(x, 0), size)


def _least(a, b):
    """The lesser of numbers and traced numbers."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def _steps(ends, blocks: int) -> int:
    """How many blocks the longest list of one side has."""
    return max(last - first + 1 for first, last in map(ends, range(blocks)))


def tiles(q, k, *, causal: bool, window: Window, resident: bool) -> Tiles:
    """Queries and keys in a block."""
    del causal
    queries, keys = (-(-x.shape[1] // LANES) * LANES for x in (q, k))
    if resident and keys <= RESIDENT:
        return Tiles(min(queries, 512), keys)
    if window is not None:
        return Tiles(min(queries, 512), min(keys, 512))
    return Tiles(min(queries, 512), min(keys, 1024))


def refuse(q, k, v, *, causal, window, segments, keys, resident) -> str | None:
    """Why not, if not."""
    del k, v, causal, window, segments, keys, resident
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the TPU kernels take bfloat16 or float32, not {q.dtype}"
    if q.shape[-1] > 256:
        return f"the TPU softmax kernels take a head dim up to 256, not {q.shape[-1]}"
    return None


def forward(q, k, v, *, scale, causal, window, segments, keys, tiles: Tiles, interpret):
    """See `kernels.fused_softmax`."""
    plan = _plan(q, k, scale, causal, window, segments, keys, tiles, interpret)
    arranged = _queries(plan, q), _keys(plan, k), _keys(plan, v)
    (block_q, block_k), count = plan.tiles, len(plan.members)
    pack, reps, parts = plan.heads
    steps = _steps(plan.keys_of, plan.blocks[0])
    query = pl.BlockSpec((1, block_q, reps * plan.lanes), lambda b, h, i, _: (b, i, h))
    key = pl.BlockSpec(
        (1, block_k, plan.lanes),
        lambda b, h, i, s: (b, _key_block(plan, i, s), jax.lax.div(h, parts)),
    )
    row = pl.BlockSpec((1, 1, count, block_q), lambda b, h, i, _: (b, h, 0, i))
    ids, id_specs = _ids(
        plan, segments, keys, lambda b, h, i, s: (b, 0, i),
        lambda b, h, i, s: (b, 0, _key_block(plan, i, s)), k,
    )  # fmt: skip
    batch, blocks = q.shape[0], arranged[0].shape[2] // (reps * plan.lanes)
    stats = pltpu.VMEM((count, block_q, LANES), jnp.float32)
    scratch = [stats, stats, pltpu.VMEM((block_q, reps * plan.lanes), jnp.float32)]
    once = steps == 1
    out, lse = _call(
        functools.partial(_forward_once if once else _forward_steps, plan=plan),
        plan,
        grid=(batch, blocks, plan.blocks[0], steps),
        in_specs=[query, key, key, *id_specs],
        out_specs=[query, row],
        outs=[(arranged[0].shape, v.dtype), ((batch, blocks, count, q.shape[1]), jnp.float32)],
        scratch=[*([] if once else scratch), *_id_scratch(plan)],
        operands=(*arranged, *ids),
    )
    return _from_queries(plan, out, q), _from_rows(plan, lse, q)


def backward(
    q, k, v, out, lse, dout, dlse, *, scale, causal, window, segments, keys, tiles: Tiles, interpret
):
    """See `kernels.fused_softmax`."""
    plan = _plan(q, k, scale, causal, window, segments, keys, tiles, interpret)
    total = jnp.einsum("bthd,bthd->bht", out, dout, preferred_element_type=jnp.float32)
    rows = _rows(plan, jnp.where(jnp.isfinite(lse), lse, 0.0) * LOG2E), _rows(plan, total - dlse)
    plan = _smaller(plan)
    given = _queries(plan, q), _keys(plan, k), _keys(plan, v), _queries(plan, dout), *rows
    how = {"plan": plan, "given": given, "segments": segments, "keys": keys}
    if plan.blocks[1] == 1:
        dq, dk, dv = _backward_resident(**how)
    else:
        dq, (dk, dv) = _backward_queries(**how), _backward_keys(**how)
    return _from_queries(plan, dq, q), _from_keys(plan, dk, k), _from_keys(plan, dv, v)


def _backward_queries(plan: Plan, given, segments, keys):
    (block_q, block_k), count = plan.tiles, len(plan.members)
    _, reps, parts = plan.heads
    steps = _steps(plan.keys_of, plan.blocks[0])
    query = pl.BlockSpec((1, block_q, reps * plan.lanes), lambda b, h, i, _: (b, i, h))
    key = pl.BlockSpec(
        (1, block_k, plan.lanes),
        lambda b, h, i, s: (b, _key_block(plan, i, s), jax.lax.div(h, parts)),
    )
    row = pl.BlockSpec((1, 1, count, block_q), lambda b, h, i, _: (b, h, 0, i))
    ids, id_specs = _ids(
        plan, segments, keys, lambda b, h, i, s: (b, 0, i),
        lambda b, h, i, s: (b, 0, _key_block(plan, i, s)), given[1],
    )  # fmt: skip
    stats = pltpu.VMEM((count, block_q, LANES), jnp.float32)
    q = given[0]
    (dq,) = _call(
        functools.partial(_query_grads, plan=plan),
        plan,
        grid=(q.shape[0], given[4].shape[1], plan.blocks[0], steps),
        in_specs=[query, key, key, query, row, row, *id_specs],
        out_specs=[query],
        outs=[(q.shape, q.dtype)],
        scratch=[
            pltpu.VMEM((block_q, reps * plan.lanes), jnp.float32), stats, stats, *_id_scratch(plan)
        ],
        operands=(*given, *ids),
    )  # fmt: skip
    return dq


def _backward_keys(plan: Plan, given, segments, keys):
    (block_q, block_k), count = plan.tiles, len(plan.members)
    _, reps, parts = plan.heads
    steps = _steps(plan.queries_of, plan.blocks[1])

    def at(h, j, s):
        """The blocks of queries and of their heads at step s."""
        first, last = plan.queries_of(j)
        return jnp.minimum(first + jax.lax.rem(s, steps), last), h * parts + jax.lax.div(s, steps)

    query = pl.BlockSpec((1, block_q, reps * plan.lanes), lambda b, h, j, s: (b, *at(h, j, s)))
    key = pl.BlockSpec((1, block_k, plan.lanes), lambda b, h, j, _: (b, j, h))
    row = pl.BlockSpec(
        (1, 1, count, block_q), lambda b, h, j, s: (b, at(h, j, s)[1], 0, at(h, j, s)[0])
    )
    ids, id_specs = _ids(
        plan, segments, keys, lambda b, h, j, s: (b, 0, at(h, j, s)[0]),
        lambda b, h, j, s: (b, 0, j), given[1],
    )  # fmt: skip
    k, v = given[1:3]
    total = pltpu.VMEM((block_k, plan.lanes), jnp.float32)
    return _call(
        functools.partial(_key_grads, plan=plan, steps=steps),
        plan,
        grid=(k.shape[0], k.shape[2] // plan.lanes, plan.blocks[1], parts * steps),
        in_specs=[query, key, key, query, row, row, *id_specs],
        out_specs=[key, key],
        outs=[(k.shape, k.dtype), (v.shape, v.dtype)],
        scratch=[total, total, *_id_scratch(plan, keys=True)],
        operands=(*given, *ids),
    )


def _backward_resident(plan: Plan, given, segments, keys):
    (block_q, block_k), count = plan.tiles, len(plan.members)
    _, reps, parts = plan.heads
    blocks = plan.blocks[0]

    def at(h, s):
        return jax.lax.rem(s, blocks), h * parts + jax.lax.div(s, blocks)

    query = pl.BlockSpec((1, block_q, reps * plan.lanes), lambda b, h, s: (b, *at(h, s)))
    key = pl.BlockSpec((1, block_k, plan.lanes), lambda b, h, s: (b, 0, h))
    row = pl.BlockSpec((1, 1, count, block_q), lambda b, h, s: (b, at(h, s)[1], 0, at(h, s)[0]))
    ids, id_specs = _ids(
        plan, segments, keys, lambda b, h, s: (b, 0, at(h, s)[0]), lambda b, h, s: (b, 0, 0),
        given[1],
    )  # fmt: skip
    q, k, v = given[:3]
    total = pltpu.VMEM((block_k, plan.lanes), jnp.float32)
    return _call(
        functools.partial(_all_grads, plan=plan),
        plan,
        grid=(k.shape[0], k.shape[2] // plan.lanes, parts * blocks),
        in_specs=[query, key, key, query, row, row, *id_specs],
        out_specs=[query, key, key],
        outs=[(q.shape, q.dtype), (k.shape, k.dtype), (v.shape, v.dtype)],
        scratch=[total, total, *_id_scratch(plan, keys=True)],
        operands=(*given, *ids),
    )


def _call(kernel, plan: Plan, *, grid, in_specs, out_specs, outs, scratch, operands):
    like = jax.typeof(operands[0])
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=[
            jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=like.manual_axis_type)
            for shape, dtype in outs
        ],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * (len(grid) - 1) + ("arbitrary",),
            vmem_limit_bytes=VMEM,
        ),
        interpret=plan.interpret or False,
    )(*operands)


# --------------------------------------------------------------------------- arrays and blocks


def _plan(q, k, scale, causal, window, segments, keys, tiles: Tiles, interpret) -> Plan:
    groups, dim = k.shape[2:]
    repeat = q.shape[2] // groups
    width = -(-dim // LANES) * LANES if dim > LANES else max(8, 1 << (dim - 1).bit_length())
    pack = min(max(1, LANES // width), groups)
    reps = next(n for n in range(min(repeat, max(1, HEADS // pack)), 0, -1) if repeat % n == 0)
    left, right = window or (None, None)
    return Plan(
        tiles=tiles, blocks=(q.shape[1] // tiles.q, k.shape[1] // tiles.k),
        heads=(pack, reps, repeat // reps), width=width, scale=scale, left=left,
        right=0 if causal else right, masked=segments is not None or keys is not None,
        own=segments is not None, interpret=interpret,
    )  # fmt: skip


def _smaller(plan: Plan) -> Plan:
    """Tiles of the backward pass, which divide the others."""
    tiles = Tiles(*(_at_most(size, GRADIENT) for size in plan.tiles))
    (most_q, most_k), (count_q, count_k) = plan.tiles, plan.blocks
    blocks = count_q * (most_q // tiles.q), count_k * (most_k // tiles.k)
    return plan._replace(tiles=tiles, blocks=blocks)


def _key_block(plan: Plan, i, step):
    first, last = plan.keys_of(i)
    return jnp.minimum(first + step, last)


def _fit(plan: Plan, x, groups: int):
    """x [B,T,G,r,D] with whole blocks of groups and lanes."""
    short = -groups % plan.heads[0], plan.width - x.shape[-1]
    return jnp.pad(x, [(0, 0), (0, 0), (0, short[0]), (0, 0), (0, short[1])]) if any(short) else x


def _queries(plan: Plan, x):
    """x [B,T,H,D] as [B,T,lanes]: the query heads of one block of keys side by side."""
    pack, reps, parts = plan.heads
    batch, length, heads, dim = x.shape
    groups = heads // (reps * parts)
    x = _fit(plan, x.reshape(batch, length, groups, reps * parts, dim), groups)
    if pack > 1 and reps * parts > 1:
        x = x.reshape(batch, length, -1, pack, reps * parts, plan.width).swapaxes(3, 4)
    return x.reshape(batch, length, -1)


def _from_queries(plan: Plan, x, like):
    """The way back."""
    pack, reps, parts = plan.heads
    batch, length, heads, dim = like.shape
    groups = heads // (reps * parts)
    if pack > 1 and reps * parts > 1:
        x = x.reshape(batch, length, -1, reps * parts, pack, plan.width).swapaxes(3, 4)
    x = x.reshape(batch, length, -1, reps * parts, plan.width)
    return x[:, :, :groups, :, :dim].reshape(like.shape)


def _keys(plan: Plan, x):
    """x [B,S,G,D] as [B,S,lanes]."""
    batch, length, groups, _ = x.shape
    return _fit(plan, x[:, :, :, None], groups).reshape(batch, length, -1)


def _from_keys(plan: Plan, x, like):
    batch, length, groups, dim = like.shape
    return x.reshape(batch, length, -1, plan.width)[:, :, :groups, :dim]


def _rows(plan: Plan, x):
    """x [B,H,T] as [B, blocks of query heads, heads in a block, T]."""
    pack, reps, parts = plan.heads
    batch, heads, length = x.shape
    groups = heads // (reps * parts)
    x = x.reshape(batch, groups, reps * parts, length)
    x = jnp.pad(x, [(0, 0), (0, -groups % pack), (0, 0), (0, 0)])
    x = x.reshape(batch, -1, pack, reps * parts, length).swapaxes(2, 3)
    return x.reshape(batch, -1, reps * pack, length)


def _from_rows(plan: Plan, x, like):
    pack, reps, parts = plan.heads
    batch, length, heads = like.shape[:3]
    x = x.reshape(batch, -1, reps * parts, pack, length).swapaxes(2, 3)
    return x.reshape(batch, -1, length)[:, :heads]


def _ids(plan: Plan, segments, keys, query_at, key_at, k):
    """Numbers of queries [B,1,T] (with segments), of keys [B,1,S]: those alike see each other."""
    if not plan.masked:
        return (), ()
    of_keys = jnp.zeros(k.shape[:2], jnp.int32) if segments is None else segments
    if keys is not None:
        of_keys = jnp.where(keys, of_keys, HIDDEN)
    block_q, block_k = plan.tiles
    given = [(of_keys, block_k, key_at)]
    if plan.own:
        given = [(segments, block_q, query_at), *given]
    specs = [pl.BlockSpec((1, 1, size), at) for _, size, at in given]
    return tuple(x[:, None] for x, _, _ in given), specs


def _id_scratch(plan: Plan, keys: bool = False):
    """Where the numbers of the rows of logits stand as a column."""
    if not (plan.masked if keys else plan.own):
        return []
    return [pltpu.VMEM((plan.tiles.k if keys else plan.tiles.q, LANES), jnp.int32)]


# ------------------------------------------------------------------------------ inside a kernel


def _dot(a, b, over=(1, 0)):
    """float32 product of a and b over their axes `over`; float32 operands are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((over[0],), (over[1],)), ((), ())),
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip


def _own(plan: Plan, x, place: int):
    """x [n, lanes] with zeros in the lanes of other heads."""
    if plan.heads[0] == 1:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    mine = (lane >= place * plan.width) & (lane < (place + 1) * plan.width)
    return jnp.where(mine, x, jnp.zeros_like(x))


def _wide(x, lanes: int):
    """x [n,LANES], alike in all lanes, with that many."""
    return jnp.tile(x, (1, -(-lanes // LANES)))[:, :lanes]


def _spread(plan: Plan, columns):
    """[n, lanes] of the columns [n,LANES], one for each place, in the lanes of its head."""
    columns = [_wide(x, plan.lanes) for x in columns]
    lane = jax.lax.broadcasted_iota(jnp.int32, columns[0].shape, 1)
    spread = columns[-1]
    for place in reversed(range(plan.heads[0] - 1)):
        spread = jnp.where(lane < (place + 1) * plan.width, columns[place], spread)
    return spread


def _column(row):
    """The row [1,n] as a column, over all lanes: [n,LANES]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _row(column):
    """The column [n,LANES], alike in all lanes, as a row [1,n]."""
    return column.T[:1]


def _seen(plan: Plan, i, j, edge: bool, ids, column, across: bool, sides):
    """Which logits of a piece count, [queries, keys] or, `across`, the transpose; None for all.

    ids: what `_ids` gave, as references. column: the numbers of the rows as a column.
    """
    query, queries, key, keys = sides
    shape = (keys, queries) if across else (queries, keys)
    seen = None
    if edge:
        ahead = plan.ahead(i, j, (query, 1, key, 1))[0]
        ahead += jax.lax.broadcasted_iota(jnp.int32, shape, int(across))
        ahead -= jax.lax.broadcasted_iota(jnp.int32, shape, 1 - int(across))
        seen = _both(
            None if plan.left is None else ahead <= plan.left,
            None if plan.right is None else ahead >= -plan.right,
        )
    if plan.masked:
        rows = _wide(column[0][...], shape[1]) if column else 0
        columns = (
            (ids[0][0, :, query : query + queries] if plan.own else 0)
            if across
            else (ids[-1][0, :, key : key + keys])
        )
        seen = _both(seen, jnp.broadcast_to(rows == columns, shape))
    return seen


def _logits(plan: Plan, a, b, seen):
    logits = _dot(a, b, (1, 1)) * (plan.scale * LOG2E)
    return logits if seen is None else jnp.where(seen, logits, -jnp.inf)


def _pieces(plan: Plan, i, j, run, body, across: bool = False) -> None:
    """body(edge, sides) of each piece of the blocks i and j if `run`, `edge` where a mask is due.

    What the window hides altogether is left out.
    """
    parts = plan.pieces(across)

    def all_of(edge: bool):
        for sides in parts:
            if edge and len(parts) > 1:
                pl.when(plan.some(i, j, sides))(functools.partial(body, True, sides))
            else:
                body(edge, sides)

    if plan.left is None and plan.right is None:
        all_of(False)
        return
    whole = plan.whole(i, j)
    pl.when(run & whole)(lambda: all_of(False))
    pl.when(run & jnp.logical_not(whole))(lambda: all_of(True))


def _forward_once(*refs, plan: Plan):
    """All keys at once: one softmax, nothing rescaled."""
    q_ref, k_ref, v_ref, *ids, out_ref, lse_ref = refs[: len(refs) - plan.own]
    scratch, i = refs[len(refs) - plan.own :], pl.program_id(2)
    if plan.own:
        scratch[0][...] = _column(ids[0][0])
    edge = plan.left is not None or plan.right is not None
    sides = (0, plan.tiles.q, 0, plan.tiles.k)
    seen = _seen(plan, i, _key_block(plan, i, 0), edge, ids, scratch, False, sides)
    k, v = k_ref[0], v_ref[0]
    sums = {}
    for index, at, place in plan.members:
        logits = _logits(plan, _own(plan, q_ref[0, :, at], place), k, seen)
        top = jnp.maximum(jnp.max(logits, axis=1, keepdims=True), FLOOR)
        weights = jnp.exp2(logits - top)
        total = jnp.sum(weights, axis=1, keepdims=True)
        part = _dot(weights.astype(v.dtype), _own(plan, v, place))
        _finish(lse_ref, index, *(jnp.broadcast_to(x, (len(x), LANES)) for x in (top, total)))
        sums.setdefault(at.start, []).append(part / jnp.where(total > 0, total, 1.0))
    for _, at, place in plan.members:
        if place == 0:
            out_ref[0, :, at] = sum(sums[at.start][1:], sums[at.start][0]).astype(out_ref.dtype)


def _finish(lse_ref, index: int, top, total) -> None:
    some = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, top / LOG2E + jnp.log(some), -jnp.inf)
    lse_ref[0, 0, index : index + 1, :] = _row(lse)


def _forward_steps(*refs, plan: Plan):
    """One block of keys: the sums so far, over a new maximum."""
    count = 3 + plan.masked + plan.own
    (q_ref, k_ref, v_ref, *ids), (out_ref, lse_ref, *scratch) = refs[:count], refs[count:]
    top_ref, total_ref, sum_ref, *number = scratch
    i, step = pl.program_id(2), pl.program_id(3)
    first, last = plan.keys_of(i)
    j = first + step

    @pl.when(step == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, FLOOR)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        if plan.own:
            number[0][...] = _column(ids[0][0])

    def absorb(edge: bool, sides):
        keys = pl.ds(*sides[2:])
        seen = _seen(plan, i, j, edge, ids, number, False, sides)
        k, v = k_ref[0, keys], v_ref[0, keys]
        fades, parts = [], []
        for index, at, place in plan.members:
            logits = _logits(plan, _own(plan, q_ref[0, :, at], place), k, seen)
            top = top_ref[index]
            new = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
            weights = jnp.exp2(logits - _wide(new, logits.shape[1]))
            fades.append(jnp.exp2(top - new))
            top_ref[index] = new
            total_ref[index] = fades[-1] * total_ref[index] + _by_lane(weights)
            parts.append(_dot(weights.astype(v.dtype), _own(plan, v, place)))
            if place == plan.heads[0] - 1:
                sum_ref[:, at] = _spread(plan, fades) * sum_ref[:, at] + sum(parts[1:], parts[0])
                fades, parts = [], []

    _pieces(plan, i, j, j <= last, absorb)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        totals = []
        for index, at, place in plan.members:
            total = jnp.sum(total_ref[index], axis=1, keepdims=True)
            total = jnp.broadcast_to(total, top_ref.shape[1:])
            _finish(lse_ref, index, top_ref[index], total)
            totals.append(jnp.where(total > 0, total, 1.0))
            if place == plan.heads[0] - 1:
                out_ref[0, :, at] = (sum_ref[:, at] / _spread(plan, totals)).astype(out_ref.dtype)
                totals = []


def _by_lane(weights):
    """Sums of weights [n,m] that still are to be summed over LANES lanes."""
    if weights.shape[1] % LANES:
        total = jnp.sum(weights, axis=1, keepdims=True)
        lane = jax.lax.broadcasted_iota(jnp.int32, (weights.shape[0], LANES), 1)
        return jnp.where(lane == 0, total, 0.0)
    pieces = [weights[:, at : at + LANES] for at in range(0, weights.shape[1], LANES)]
    return sum(pieces[1:], pieces[0])


def _query_grads(*refs, plan: Plan):
    """dq = scale sum_s p_ts (<dout_t, v_s> - rest_t) k_s over the blocks of keys."""
    count = 6 + plan.masked + plan.own
    (q_ref, k_ref, v_ref, dout_ref, lse_ref, rest_ref, *ids) = refs[:count]
    dq_ref, sum_ref, lse_column, rest_column, *number = refs[count:]
    i, step = pl.program_id(2), pl.program_id(3)
    first, last = plan.keys_of(i)
    j = first + step

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        for index in range(len(plan.members)):
            lse_column[index] = _column(lse_ref[0, 0, index : index + 1, :])
            rest_column[index] = _column(rest_ref[0, 0, index : index + 1, :])
        if plan.own:
            number[0][...] = _column(ids[0][0])

    def absorb(edge: bool, sides):
        keys = pl.ds(*sides[2:])
        seen = _seen(plan, i, j, edge, ids, number, False, sides)
        k, v = k_ref[0, keys], v_ref[0, keys]
        parts = []
        for index, at, place in plan.members:
            logits = _logits(plan, _own(plan, q_ref[0, :, at], place), k, seen)
            weights = jnp.exp2(logits - _wide(lse_column[index], logits.shape[1]))
            dweights = _dot(_own(plan, dout_ref[0, :, at], place), v, (1, 1))
            dlogits = weights * (dweights - _wide(rest_column[index], logits.shape[1]))
            parts.append(_dot(dlogits.astype(k.dtype), _own(plan, k, place)))
            if place == plan.heads[0] - 1:
                sum_ref[:, at] += sum(parts[1:], parts[0])
                parts = []

    _pieces(plan, i, j, j <= last, absorb)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        dq_ref[0] = (sum_ref[...] * plan.scale).astype(dq_ref.dtype)


def _key_grads(*refs, plan: Plan, steps: int):
    """dk and dv over the blocks of queries, and over those of the heads of a group."""
    count = 6 + plan.masked + plan.own
    given, (dk_ref, dv_ref, *scratch) = refs[:count], refs[count:]
    j, step = pl.program_id(2), pl.program_id(3)
    first, last = plan.queries_of(j)
    i = first + jax.lax.rem(step, steps)
    pl.when(step == 0)(lambda: _clear(plan, given, scratch))

    def absorb(edge: bool, sides):
        for _ in _transposed(plan, i, j, edge, sides, given, scratch):
            pass

    _pieces(plan, i, j, i <= last, absorb, across=True)
    last_step = step == pl.num_programs(3) - 1
    pl.when(last_step)(lambda: _write(plan, scratch, dk_ref, dv_ref))


def _all_grads(*refs, plan: Plan):
    """All three, the keys being one block."""
    count = 6 + plan.masked + plan.own
    given, (dq_ref, dk_ref, dv_ref, *scratch) = refs[:count], refs[count:]
    step = pl.program_id(2)
    i, k = jax.lax.rem(step, plan.blocks[0]), given[1][0]
    pl.when(step == 0)(lambda: _clear(plan, given, scratch))

    def absorb(edge: bool, sides):
        parts, queries = [], pl.ds(*sides[:2])
        for at, place, dlogits in _transposed(plan, i, 0, edge, sides, given, scratch):
            parts.append(_dot(dlogits, _own(plan, k, place), (0, 0)))
            if place == plan.heads[0] - 1:
                dq = sum(parts[1:], parts[0]) * plan.scale
                dq_ref[0, queries, at] = dq.astype(dq_ref.dtype)
                parts = []

    edge = plan.left is not None or plan.right is not None
    for sides in plan.pieces(across=True):
        absorb(edge, sides)
    last_step = step == pl.num_programs(2) - 1
    pl.when(last_step)(lambda: _write(plan, scratch, dk_ref, dv_ref))


def _clear(plan: Plan, given, scratch) -> None:
    for total in scratch[:2]:
        total[...] = jnp.zeros_like(total)
    if plan.masked:
        scratch[2][...] = _column(given[-1][0])


def _write(plan: Plan, scratch, dk_ref, dv_ref) -> None:
    dk_ref[0] = (scratch[0][...] * plan.scale).astype(dk_ref.dtype)
    dv_ref[0] = scratch[1][...].astype(dv_ref.dtype)


def _transposed(plan: Plan, i, j, edge: bool, sides, given, scratch):
    """Adds to dk and dv what a piece gives; yields (lanes, place, gradient of the logits).

    Logits are [keys, queries] here: log-sum-exp and the rest are rows as they are stored.
    """
    q_ref, k_ref, v_ref, dout_ref, lse_ref, rest_ref, *ids = given
    dk_sum, dv_sum, *number = scratch
    seen = _seen(plan, i, j, edge, ids, number, True, sides)
    k, v, queries = k_ref[0], v_ref[0], pl.ds(*sides[:2])
    for index, at, place in plan.members:
        q, dout = q_ref[0, queries, at], dout_ref[0, queries, at]
        logits = _logits(plan, _own(plan, k, place), q, seen)
        weights = jnp.exp2(logits - lse_ref[0, 0, index : index + 1, queries])
        dv_sum[...] += _dot(weights.astype(v.dtype), _own(plan, dout, place))
        dweights = _dot(_own(plan, v, place), dout, (1, 1))
        dlogits = weights * (dweights - rest_ref[0, 0, index : index + 1, queries])
        dlogits = dlogits.astype(q.dtype)
        dk_sum[...] += _dot(dlogits, _own(plan, q, place))
        yield at, place, dlogits
