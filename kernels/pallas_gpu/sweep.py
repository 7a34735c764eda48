"""Tiles of rows that meet blocks of columns on Hopper: what attention's kernels have in common.

Each block of threads has two compute warpgroups, which own `HEIGHT` rows of a tile each, and one
that fetches. The rows stay in shared memory while the columns that they may see stream through a
ring. Blocks of columns that lie wholly outside the band are not fetched; those inside it are not
masked.

A slot of the ring is full when all its copies have arrived, and empty when both warpgroups have
arrived after the last product that read it was over. The interpreter does not check the reads of
products; that they lie between `Block.wait` and `Block.free` has to be read off a kernel's step.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.pallas_gpu.launch import launch
from kernels.pallas_gpu.wgmma import COLUMNS, ROWS, shared, spare

WARPGROUPS, HEIGHT = 2, 64
TILE = WARPGROUPS * HEIGHT
"""Rows of a tile."""
REGISTERS = {"compute": 232, "fetch": 40}
"""A thread's, by warpgroup: no more in all than three warpgroups start with, 168 each."""
HIDDEN = -1e30
"""A logit that is not seen: finite, so that a row without any stays free of NaN."""


class Band(NamedTuple):
    """Row t sees the columns s with t - left <= s <= t + right; None is no bound."""

    left: int | None = None
    right: int | None = None

    def turned(self) -> "Band":
        """The same band with rows for columns."""
        return Band(self.right, self.left)

    def reach(self, at, rows: int, block: int, count: int):
        """Blocks [from, to) out of `count` that rows [at, at + rows) may see any column of."""
        start, stop = jnp.int32(0), jnp.int32(count)
        if self.left is not None:
            start = lax.div(jnp.maximum(at - self.left, 0), jnp.int32(block))
        if self.right is not None:
            last = lax.div(at + rows + self.right + block - 1, jnp.int32(block))
            stop = jnp.minimum(last, stop)
        return start, stop

    def parts(self, at, rows: int, block: int, start, stop) -> list[tuple[Any, Any, bool]]:
        """[start, stop) cut into runs of blocks (from, to, whether the band cuts through them)."""
        first, last = start, stop
        if self.left is not None:
            first = lax.div(jnp.maximum(at + rows + block - 2 - self.left, 0), jnp.int32(block))
            first = jnp.clip(first, start, stop)
        if self.right is not None:
            last = jnp.clip(lax.div(at + self.right + 1, jnp.int32(block)), first, stop)
        parts = [(start, first, True), (first, last, False), (last, stop, True)]
        return parts[self.left is None : 3 - (self.right is None)]


class Sweep(NamedTuple):
    """How tiles of rows meet the columns.

    band: who sees whom, rows first. ids: rows and columns have numbers that must agree.
    tiles: of rows. span: tiles of a block of threads, one after the other. block, count: columns
    of a step and how many there are. stages: steps in flight. repeat, share: row head h meets the
    column heads (h repeat) / share and the `repeat` - 1 after it. splits: blocks of threads among
    which the columns of a tile are divided.
    """

    band: Band
    ids: bool
    tiles: int
    span: int
    block: int
    count: int
    stages: int
    repeat: int
    share: int
    splits: int
    interpret: Any


class Block(NamedTuple):
    """A step: the columns [at, at + block) in one slot of the ring, and what to hide of them."""

    sweep: Sweep
    slot: Any
    row: Any
    at: Any
    cut: bool
    ring: Any
    places: Any
    again: Callable[[], list]

    def wait(self, group: int) -> list:
        """The references of one group of streamed arrays, once they are there."""
        plgpu.barrier_wait(self.ring["full"][group].at[self.slot])
        return [buffer.at[self.slot] for buffer in self.ring["buffers"][group]]

    def rows(self) -> list:
        """The references of the rows, where the compiler cannot foresee that they are the same.

        Else it keeps a descriptor for every 16 columns of them in registers, all through the loop.
        """
        return self.again()

    def free(self, group: int) -> None:
        """Let the next columns into what `wait` gave.

        A plain load is fenced from the copy that overwrites what it read; products need no fence.
        """
        if any(len(buffer.shape) == 2 for buffer in self.ring["buffers"][group]):
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.ring["empty"][group].at[self.slot])

    def hide(self, logits: jax.Array, rows: jax.Array | None, columns: list) -> jax.Array:
        """`HIDDEN` where a row does not see a column; rows, columns: numbers that must agree."""
        seen = []
        if self.cut:
            own = plgpu.broadcasted_iota(jnp.int32, (HEIGHT,), 0, layout=ROWS) + (
                self.row - self.at
            )
            own = over(own, logits.shape, 0)
            other = over(plgpu.load(self.places, layout=COLUMNS), logits.shape, 1)
            bounds = self.sweep.band
            seen += [] if bounds.left is None else [other >= own - bounds.left]
            seen += [] if bounds.right is None else [other <= own + bounds.right]
        if rows is not None:
            columns = plgpu.load(columns[0], layout=COLUMNS)
            seen.append(over(rows, logits.shape, 0) == over(columns, logits.shape, 1))
        return (
            jnp.where(functools.reduce(jnp.logical_and, seen), logits, HIDDEN) if seen else logits
        )


def over(x: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    """A number per row (axis 0) or column (axis 1), over the whole matrix."""
    return lax.broadcast_in_dim(x, shape, [axis])


def part(ref, batch, head, at, size: int):
    """Positions [at, at + size) of an array [B,T,H,D], [B,H,T] or [B,T]."""
    at = pl.ds(at, size)
    match len(ref.shape):
        case 4:
            return ref.at[batch, at, head]
        case 3:
            return ref.at[batch, head, at]
    return ref.at[batch, at]


def _buffer(array: jax.Array, count: int, rows: int):
    """Shared memory for `count` pieces of `array`, as `_part` cuts them."""
    if array.ndim == 4:
        return shared((count, rows, array.shape[-1]), array.dtype)
    return plgpu.SMEM((count, rows), array.dtype)


def run(sweep: Sweep, body: Callable, resident, streamed, *, out_type, out, operand=None):
    """Run `body` on every tile of rows.

    body(rows, loop, index, out, scratch): `rows` are the references of this warpgroup's part of
    the arrays `resident`; loop(step, carry) runs carry = step(block, carry) over its columns;
    index is (batch, head, first row, split). streamed: groups of arrays, each with barriers of
    its own. out: shared memory of one warpgroup's results. operand: the type of what `left` takes.
    """
    groups = range(len(streamed))
    barrier = functools.partial(plgpu.Barrier, num_barriers=sweep.stages)
    scratch = {
        "rows": [_buffer(x, WARPGROUPS, HEIGHT) for x in resident],
        "ready": plgpu.Barrier(num_arrivals=len(resident), num_barriers=WARPGROUPS),
        "spent": plgpu.Barrier(num_barriers=WARPGROUPS),
        "ring": {
            "buffers": [[_buffer(x, sweep.stages, sweep.block) for x in g] for g in streamed],
            "full": [barrier(num_arrivals=len(group)) for group in streamed],
            "empty": [barrier(num_arrivals=WARPGROUPS) for _ in groups],
        },
        "out": out,
        "places": plgpu.SMEM((WARPGROUPS, sweep.block), jnp.int32),
        "zero": plgpu.SMEM((WARPGROUPS, 128), jnp.int32),
        "operand": spare((WARPGROUPS, HEIGHT, sweep.block), operand, sweep.interpret),
    }
    inputs, tree = jax.tree.flatten((tuple(resident), tuple(streamed)))
    each = -(-sweep.tiles // sweep.span)

    def kernel(*refs):
        resident, streamed = jax.tree.unflatten(tree, refs[: len(inputs)])
        outputs, scratch = refs[len(inputs) : -1], refs[-1]
        batch, head, place = (lax.axis_index(name) for name in "bht")
        split, first = lax.div(place, jnp.int32(each)), lax.rem(place, jnp.int32(each)) * sweep.span
        tiles = jnp.minimum(sweep.tiles - first, sweep.span)

        def walk(tile):
            """tile(first row, steps before it, start, stop) for each tile -> steps in all."""

            def one(i, taken):
                at = (first + i) * TILE
                start, stop = sweep.band.reach(at, TILE, sweep.block, sweep.count)
                if sweep.splits > 1:
                    all_of = stop - start
                    stop = start + lax.div(all_of * (split + 1), jnp.int32(sweep.splits))
                    start = start + lax.div(all_of * split, jnp.int32(sweep.splits))
                tile(i, at, taken, start, stop)
                return taken + sweep.repeat * (stop - start)

            if sweep.span == 1:
                return one(jnp.int32(0), jnp.int32(0))
            return lax.fori_loop(0, tiles, one, jnp.int32(0))

        wg = lax.axis_index("wg")

        @pl.when(wg < WARPGROUPS)
        def _():
            plgpu.set_max_registers(REGISTERS["compute"], action="increase")
            places, zero = scratch["places"].at[wg], scratch["zero"].at[wg]
            places[...] = plgpu.broadcasted_iota(jnp.int32, (sweep.block,), 0, layout=COLUMNS)
            zero[...] = jnp.zeros((128,), jnp.int32)
            plgpu.commit_smem()

            def again():
                return [buffer.at[wg + zero[0]] for buffer in scratch["rows"]]

            def tile(i, at, taken, start, stop):
                row = at + wg * HEIGHT
                plgpu.barrier_wait(scratch["ready"].at[wg])
                rows = [buffer.at[wg] for buffer in scratch["rows"]]
                loop = functools.partial(
                    _loop, sweep, scratch["ring"], places, again, taken, row, start, stop
                )
                spares = [buffer.at[wg] for buffer in scratch["operand"]]
                out = [buffer.at[wg] for buffer in scratch["out"]]
                body(rows, loop, (batch, head, row, split), outputs, (*out, *(spares or [None])))
                plgpu.barrier_arrive(scratch["spent"].at[wg])

            walk(tile)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == WARPGROUPS)
        def _():
            plgpu.set_max_registers(REGISTERS["fetch"], action="decrease")
            _fetch(sweep, walk, scratch, resident, streamed, batch, head)

    return launch(
        kernel, *inputs,
        out_type=out_type,
        grid=(sweep.splits * each, resident[0].shape[2], resident[0].shape[0]),
        grid_names=("t", "h", "b"),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types=[scratch],
        interpret=sweep.interpret,
    )  # fmt: skip


def _loop(sweep: Sweep, ring, places, again, taken, row, start, stop, step: Callable, carry):
    """carry = step(block, carry) over the columns of the rows [row, row + HEIGHT)."""
    parts = [(start, stop, sweep.band != Band())]
    if not sweep.ids:  # with numbers every block is masked anyway
        parts = sweep.band.parts(row, HEIGHT, sweep.block, start, stop)

    def head(n, carry):
        before = taken + n * (stop - start) - start
        for first, last, cut in parts:

            def one(j, carry, cut=cut):
                slot = lax.rem(before + j, jnp.int32(sweep.stages))
                return step(
                    Block(sweep, slot, row, j * sweep.block, cut, ring, places, again), carry
                )

            carry = lax.fori_loop(first, last, one, carry)
        return carry

    if sweep.repeat == 1:
        return head(jnp.int32(0), carry)
    return lax.fori_loop(0, sweep.repeat, head, carry)


def _fetch(sweep: Sweep, walk, scratch, resident, streamed, batch, head) -> None:
    """What the third warpgroup does: rows tile by tile, columns as the ring has room."""
    ring = scratch["ring"]

    def wait(x, group):
        slot = lax.rem(x, jnp.int32(sweep.stages))
        plgpu.barrier_wait(ring["empty"][group].at[slot])

    def tile(i, at, taken, start, stop):
        for wg in range(WARPGROUPS):
            pl.when(i > 0)(functools.partial(plgpu.barrier_wait, scratch["spent"].at[wg]))
            for ref, buffer in zip(resident, scratch["rows"], strict=True):
                piece = part(ref, batch, head, at + wg * HEIGHT, HEIGHT)
                plgpu.copy_gmem_to_smem(piece, buffer.at[wg], scratch["ready"].at[wg])

        def column_head(n, _):
            other = lax.div(head * sweep.repeat, jnp.int32(sweep.share)) + n

            def one(j, _):
                x = taken + n * (stop - start) + j - start
                slot = lax.rem(x, jnp.int32(sweep.stages))
                for group, refs in enumerate(streamed):
                    pl.when(x >= sweep.stages)(functools.partial(wait, x, group))
                    full = ring["full"][group].at[slot]
                    for ref, buffer in zip(refs, ring["buffers"][group], strict=True):
                        piece = part(ref, batch, other, j * sweep.block, sweep.block)
                        plgpu.copy_gmem_to_smem(piece, buffer.at[slot], full)
                return ()

            return lax.fori_loop(start, stop, one, ())

        lax.fori_loop(0, sweep.repeat, column_head, ())

    total = walk(tile)
    if sweep.interpret is None:
        return

    def drain(x, _):  # the interpreter of jax 0.11.2 wants every arrival waited for
        for group in range(len(streamed)):
            wait(x, group)
        return ()

    lax.fori_loop(jnp.maximum(total - sweep.stages, 0), total, drain, ())
    for wg in range(WARPGROUPS):
        plgpu.barrier_wait(scratch["spent"].at[wg])


def store(buffer, value: jax.Array, ref) -> None:
    """Registers -> shared memory -> `ref`, once what was stored from there before is read."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    buffer[...] = value.astype(buffer.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, ref)
