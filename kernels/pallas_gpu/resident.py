"""Softmax attention on Hopper with all keys of a head on chip; what becomes of a row's logits."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.pallas_gpu.launch import launch
from kernels.pallas_gpu.sweep import (
    HEIGHT,
    HIDDEN,
    REGISTERS,
    TILE,
    WARPGROUPS,
    over,
    part,
    store,
)
from kernels.pallas_gpu.wgmma import (
    COLUMNS,
    add_matmul,
    left,
    matmul,
    shared,
    spare,
)

PROCESSORS = 132
"""Streaming multiprocessors of an H100 or H200 (SXM)."""
LOG2E = math.log2(math.e)


def weigh(logits, top, total):
    """exp2(logits - new top), that top, and `total` with them; with the factor of what was before.

    Where nothing was before, top and total are None, and so is the factor.
    """
    if top is None:
        top, shrink = logits.max(axis=1), None
    else:
        top, before = jnp.maximum(top, logits.max(axis=1)), top
        shrink = jnp.exp2(before - top)
        total = total * shrink
    weights = jnp.exp2(logits - over(top, logits.shape, 0))
    sums = weights.sum(axis=1)
    return shrink, weights, top, sums if shrink is None else total + sums


def results(dim: int, dtype) -> list:
    """Shared memory for what `finish` writes."""
    return [shared((WARPGROUPS, HEIGHT, dim), dtype), plgpu.SMEM((WARPGROUPS, HEIGHT), jnp.float32)]


def types(q, dtype) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Of out and lse."""
    batch, queries, heads, _ = q.shape
    lse = jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32)
    return jax.ShapeDtypeStruct(q.shape, dtype), lse


def finish(acc, top, total, index, outputs, result, sums) -> None:
    """acc / total -> out and top + log total, in natural units, -> lse; 0 and -inf if unseen."""
    live = top > HIDDEN / 2
    inverse = jnp.where(live, 1 / total, 0.0)
    store(result, acc * over(inverse, acc.shape, 0), part(outputs[0], *index, HEIGHT))
    total = jnp.where(live, top / LOG2E + jnp.log(total), -jnp.inf)
    store(sums, total, part(outputs[1], *index, HEIGHT))


def resident_forward(q, k, v, *, scale: float, keys, interpret) -> tuple[jax.Array, jax.Array]:
    """`forward` with all keys of a head on chip while its queries pass."""
    batch, queries, heads, dim = q.shape
    count, share = k.shape[1], heads // k.shape[2]
    shape = HEIGHT, count
    stages = 1 if count * dim > 128 * 128 else 2  # what shared memory holds beside the keys
    hidden = HIDDEN / (scale * LOG2E)
    mask = () if keys is None else (jnp.where(keys, 0.0, hidden).astype(jnp.float32),)
    tiles = queries // TILE
    each = _even(tiles, heads * batch)
    scratch = _scratch(k, stages, len(mask), interpret)

    def kernel(*refs):
        q, *refs = refs
        whole, outputs, s = refs[: 2 + len(mask)], refs[-3:-1], refs[-1]
        batch, head, place, wg = (lax.axis_index(name) for name in ("b", "h", "t", "wg"))
        first = place * each
        last = jnp.minimum(first + each, tiles)
        slot = lambda i, wg: wg * stages + lax.rem(i - first, jnp.int32(stages))  # noqa: E731

        @pl.when(wg < WARPGROUPS)
        def _():
            plgpu.set_max_registers(REGISTERS["compute"], action="increase")
            plgpu.barrier_wait(s["loaded"])
            s["zero"].at[wg][...] = jnp.zeros((128,), jnp.int32)
            plgpu.commit_smem()
            result, sums, *operand = (x.at[wg] for x in (*s["out"], *s["operand"]))
            operand = operand[0] if operand else None

            def tile(i, _):
                at = slot(i, wg)
                plgpu.barrier_wait(s["full"].at[at])
                # 0, which the compiler does not know, or it would keep descriptors of all of them
                zero = s["zero"].at[wg][0]
                key, value = s["whole"].at[zero], s["whole"].at[zero + 1]
                product = s["queries"].at[at], key.transpose((1, 0))
                if s["mask"]:
                    hidden = over(plgpu.load(s["mask"][0], layout=COLUMNS), shape, 1)
                    logits = add_matmul(hidden, product, interpret=interpret)
                else:
                    logits = matmul(shape, product)
                plgpu.barrier_arrive(s["empty"].at[at])
                _, weights, top, total = weigh(logits * (scale * LOG2E), None, None)
                weights = left(weights.astype(v.dtype), operand)
                acc = matmul((HEIGHT, dim), (weights, value))
                index = batch, head, i * TILE + wg * HEIGHT
                finish(acc, top, total, index, outputs, result, sums)
                return ()

            lax.fori_loop(first, last, tile, ())
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == WARPGROUPS)
        def _():
            plgpu.set_max_registers(REGISTERS["fetch"], action="decrease")
            group = lax.div(head, jnp.int32(share))
            for ref, buffer in zip(
                whole, [*(s["whole"].at[n] for n in range(2)), *s["mask"]], strict=True
            ):
                piece = part(ref, batch, group, 0, count)
                plgpu.copy_gmem_to_smem(piece, buffer, s["loaded"])

            def tile(i, _):
                for wg in range(WARPGROUPS):
                    at = slot(i, wg)
                    pl.when(i - first >= stages)(
                        lambda at=at: plgpu.barrier_wait(s["empty"].at[at])
                    )
                    piece = part(q, batch, head, i * TILE + wg * HEIGHT, HEIGHT)
                    plgpu.copy_gmem_to_smem(piece, s["queries"].at[at], s["full"].at[at])
                return ()

            lax.fori_loop(first, last, tile, ())
            if interpret is not None:  # that of jax 0.11.2 wants every arrival waited for

                def drain(i, _):
                    for wg in range(WARPGROUPS):
                        plgpu.barrier_wait(s["empty"].at[slot(i, wg)])
                    return ()

                lax.fori_loop(jnp.maximum(last - stages, first), last, drain, ())

    return launch(
        kernel, q, k, v, *mask,
        out_type=types(q, v.dtype),
        grid=(-(-tiles // each), heads, batch),
        grid_names=("t", "h", "b"),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types=[scratch],
        interpret=interpret,
    )  # fmt: skip


def _scratch(keys, stages: int, masks: int, interpret) -> dict:
    count, dim, dtype = keys.shape[1], keys.shape[3], keys.dtype
    barrier = functools.partial(plgpu.Barrier, num_barriers=WARPGROUPS * stages)
    return {
        "whole": shared((2, count, dim), dtype),
        "mask": [plgpu.SMEM((count,), jnp.float32) for _ in range(masks)],
        "queries": shared((WARPGROUPS * stages, HEIGHT, dim), dtype),
        "loaded": plgpu.Barrier(num_arrivals=2 + masks),
        "full": barrier(), "empty": barrier(),
        "zero": plgpu.SMEM((WARPGROUPS, 128), jnp.int32),
        "out": results(dim, dtype),
        "operand": spare((WARPGROUPS, HEIGHT, count), dtype, interpret),
    }  # fmt: skip


def _even(tiles: int, heads: int) -> int:
    """Tiles of a block of threads so that the last of them ends soonest; 2 tiles' time to begin."""

    def end(each: int) -> int:
        return -(-heads * -(-tiles // each) // PROCESSORS) * (each + 2)

    return min(range(1, tiles + 1), key=end)
