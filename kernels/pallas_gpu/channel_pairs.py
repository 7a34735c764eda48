"""What tokens of one chunk are to each other where every channel fades by itself, on Hopper.

A pair i > j belongs to the level whose `half` is the highest bit of i ^ j: j lies in the first, i
in the second half of 2 half neighbours, and what fades on the way is that from j to the middle
times that from the middle to i (the blocks of GLA, arXiv 2312.06635, section 4.3, down to single
tokens; as `kernels.pallas_tpu.gated_linear` has it). So each level is one product of matrices, and
every exponent a sum of log decays over the tokens in between, at most 0: a matrix of ones and zeros
times the log decays, which the tensor cores make as well, of two bfloat16 parts.

All chunks are taken at once, one to a warpgroup; `channel_passes` is what goes from chunk to chunk.
Between i and j, start and end of their chunk, with what is left on the way, by channel,

    weights      p_ij = sum_c q_ic k_jc left_ijc,   reading_i = q_i start_i,   leaving_j = k_j end_j
    gradients    dp_ij = <dout_i, v_j>
                 dq_i = sum_{j <= i} dp_ij left_ij k_j + start_i read_i
                 dk_j = sum_{i >= j} dp_ij left_ij q_i + end_j held_j
                 later_t = sum_{i >= t} (q_i dq_i - k_i dk_i), the pairs i = j left out of both

whose two sums are of the same rounded numbers, so that what cancels cancels.
"""

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.pallas_gpu.launch import launch
from kernels.pallas_gpu.pipeline import PARAMS
from kernels.pallas_gpu.plan import CHUNK, WIDTH
from kernels.pallas_gpu.wgmma import (
    COLUMNS,
    LAYOUT,
    ROWS,
    by_column,
    by_row,
    constant,
    in_two,
    left,
    matmul,
    rounded,
    shared,
)

MATRIX = CHUNK, WIDTH
LEVELS = CHUNK.bit_length() - 1
"""Of a chunk: half is 1, 2, ... 32."""


class Weights(NamedTuple):
    """Of whole sequences, in bfloat16."""

    pairs: jax.Array  # p [B, H, N, C, C]
    reading: jax.Array  # [B, T, H, R]
    leaving: jax.Array


class Gradients(NamedTuple):
    """Of whole sequences, [B, T, H, R]: in bfloat16 but `later`, which is float32 and a chunk's."""

    dq: jax.Array
    dk: jax.Array
    later: jax.Array


def weights(q: jax.Array, k: jax.Array, log_decay: jax.Array, *, interpret: Any) -> Weights:
    """See the module's formulas.

    q, k: bfloat16 [B, T, G, R], R 64 or 128 and G a divisor of H. log_decay: bfloat16
    [2, B, T, H, R], the sum of two parts, each at least -1e30.
    """
    _, batch, length, heads, rank = log_decay.shape
    parts, make = rank // WIDTH, jax.ShapeDtypeStruct
    tokens = make((batch, length, heads, rank), jnp.bfloat16)
    pairs = make((batch, heads, length // CHUNK, CHUNK, CHUNK), jnp.bfloat16)
    matrices = {"x_s": (parts, 2), "log_decay_s": (parts, 2), "scaled_s": (parts, 2), "pairs_s": ()}
    grid = {"chunk": length // CHUNK, "head": heads, "batch": batch}
    made = _launch(
        _weights, (q, k, log_decay), (pairs, tokens, tokens), grid, matrices, arrivals=4 * parts,
        interpret=interpret,
    )  # fmt: skip
    return Weights(*made)


def gradients(
    q: jax.Array, k: jax.Array, log_decay: jax.Array, *, dout: jax.Array, v: jax.Array,
    read: jax.Array, held: jax.Array, interpret: Any,
) -> Gradients:  # fmt: skip
    """See the module's formulas.

    q, k, log_decay: as of `weights`. dout, v: bfloat16 [B, T, H, Dv], Dv whole 64s up to 512.
    read, held: float32 [B, T, H, R], what dout_i and v_j get of the state and of its gradient.
    """
    _, batch, length, heads, rank = log_decay.shape
    blocks, make = v.shape[3] // WIDTH, jax.ShapeDtypeStruct
    tokens = make((batch, length, heads, rank), jnp.bfloat16)
    matrices = {"x_s": (2,), "log_decay_s": (2,), "scaled_s": (2,), "values_s": (blocks, 2)}
    matrices |= {"asked_s": (2,)}
    grid = {"part": rank // WIDTH, "chunk": length // CHUNK, "head": heads, "batch": batch}
    made = _launch(
        _gradients, (q, k, log_decay, dout, v, read, held),
        (tokens, tokens, make(tokens.shape, jnp.float32)), grid, matrices,
        arrivals=4 + 2 * blocks, interpret=interpret,
    )  # fmt: skip
    return Gradients(*made)


def _launch(body, arrays, out_type, grid, matrices, *, arrivals: int, interpret):
    """`body`, with shared memory for `matrices`: as many as are said, of 64 rows and columns."""
    scratch = {name: shared((*many, *MATRIX), jnp.bfloat16) for name, many in matrices.items()}
    scratch["numbers_s"] = plgpu.SMEM((CHUNK,), jnp.int32)
    if interpret:
        scratch["spare_s"] = shared(MATRIX, jnp.bfloat16)
    return launch(
        functools.partial(body, interpret),
        *arrays,
        jnp.arange(CHUNK, dtype=jnp.int32),
        out_type=out_type,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        scratch_types=scratch | {"full": plgpu.Barrier(num_arrivals=arrivals)},
        compiler_params=PARAMS,
        interpret=interpret,
    )


def _weights(interpret, q, k, log_decay, numbers, pairs, reading, leaving, **scratch):
    r = SimpleNamespace(**scratch)
    at, parts = _place(q, reading), range(r.x_s.shape[0])
    for part in parts:
        columns = pl.ds(part * WIDTH, WIDTH)
        _fetch(r, at, (q, k), log_decay, columns, r.x_s.at[part], r.log_decay_s.at[part])
    _introduce(r, numbers)
    plgpu.barrier_wait(r.full)

    def scale(part: int, there, operands=(0, 1)):
        """Puts q and k times what is left over the tokens that are `there`."""
        over = _left_over(r, there, r.log_decay_s.at[part])
        for n in operands:
            r.scaled_s.at[part, n][...] = (over * _load(r.x_s.at[part, n])).astype(jnp.bfloat16)

    def products(x_s):
        plgpu.commit_smem()
        operands = ((x_s.at[part, 0], x_s.at[part, 1].transpose((1, 0))) for part in parts)
        made = matmul((CHUNK, CHUNK), *operands)
        plgpu.commit_smem()  # all four warps have read what is about to be overwritten
        return made

    def level(number, made):
        half = lax.shift_left(jnp.int32(1), number)
        for part in parts:
            scale(part, _between(r, half))
        i, j = _order(r)
        return jnp.where((i ^ j) >= half, products(r.scaled_s), made)

    made = lax.fori_loop(0, LEVELS, level, products(r.x_s))
    i, j = _order(r)
    r.pairs_s[...] = jnp.where(i >= j, made, 0.0).astype(jnp.bfloat16)
    for part in parts:
        scale(part, i >= j, (0,))
        scale(part, i < j, (1,))
    plgpu.commit_smem()
    for n, to in enumerate((reading, leaving)):
        for part in parts:
            columns = pl.ds(part * WIDTH, WIDTH)
            plgpu.copy_smem_to_gmem(r.scaled_s.at[part, n], to.at[at.b, at.rows, at.h, columns])
    plgpu.copy_smem_to_gmem(r.pairs_s, pairs.at[at.b, at.h, at.n])
    plgpu.wait_smem_to_gmem(0)


def _gradients(interpret, q, k, log_decay, dout, v, read, held, numbers, dq, dk, later, **scratch):
    r = SimpleNamespace(**scratch)
    at = _place(q, dq)
    columns = pl.ds(lax.axis_index("part") * WIDTH, WIDTH)
    _fetch(r, at, (q, k), log_decay, columns, r.x_s, r.log_decay_s)
    blocks = range(r.values_s.shape[0])
    for block in blocks:
        for n, a in enumerate((dout, v)):
            there = a.at[at.b, at.rows, at.h, pl.ds(block * WIDTH, WIDTH)]
            plgpu.copy_gmem_to_smem(there, r.values_s.at[block, n], r.full)
    _introduce(r, numbers)
    plgpu.barrier_wait(r.full)
    for n in range(2):  # dp, with rows for queries, and with rows for keys
        of = r.values_s
        operands = ((of.at[b, n], of.at[b, 1 - n].transpose((1, 0))) for b in blocks)
        r.asked_s.at[n][...] = matmul((CHUNK, CHUNK), *operands).astype(jnp.bfloat16)
    plgpu.commit_smem()

    def through(n: int, where, x_s):
        """What queries (0) or keys (1) get of the others in x_s."""
        asked = plgpu.load(r.asked_s.at[n], layout=LAYOUT)
        return matmul(MATRIX, (_left(r, jnp.where(where, asked, 0.0)), x_s.at[1 - n]))

    def level(number, carry):
        of_q, of_k, passed = carry
        half = lax.shift_left(jnp.int32(1), number)
        over = _left_over(r, _between(r, half), r.log_decay_s)
        for n in range(2):
            r.scaled_s.at[n][...] = (over * _load(r.x_s.at[n])).astype(jnp.bfloat16)
        plgpu.commit_smem()
        i, j = _order(r)
        apart = i ^ j
        there = (apart >= half) & (apart < 2 * half)
        part = through(0, there & (i > j), r.scaled_s)
        of_q, passed = of_q + over * part, passed + _load(r.scaled_s.at[0]) * part
        part = through(1, there & (i < j), r.scaled_s)
        of_k, passed = of_k + over * part, passed - _load(r.scaled_s.at[1]) * part
        plgpu.commit_smem()  # all four warps have read what is about to be overwritten
        return of_q, of_k, passed

    def beyond(n: int, there, a, passed):
        """What queries (0) or keys (1) get of themselves and, from a, of other chunks."""
        over = _left_over(r, there, r.log_decay_s)
        part = plgpu.load(a.at[at.b, at.rows, at.h, columns], layout=LAYOUT, optimized=False)
        given = rounded(over * _load(r.x_s.at[n]), interpret) * part
        i, j = _order(r)
        return over * part + through(n, i == j, r.x_s), passed - given if n else passed + given

    i, j = _order(r)
    of_q, passed = beyond(0, i >= j, read, constant(0.0, MATRIX))
    of_k, passed = beyond(1, i < j, held, passed)
    of_q, of_k, passed = lax.fori_loop(0, LEVELS, level, (of_q, of_k, passed))
    for n, (made, to) in enumerate(((of_q, dq), (of_k, dk))):
        r.scaled_s.at[n][...] = made.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(r.scaled_s.at[n], to.at[at.b, at.rows, at.h, columns])
    in_two((r.x_s.at[0], r.x_s.at[1]), passed)
    i, j = _order(r)
    later.at[at.b, at.rows, at.h, columns][...] = _sums(r, i <= j, r.x_s)
    plgpu.wait_smem_to_gmem(0)


def _place(x, of_heads) -> SimpleNamespace:
    """Which chunk this is of, and the head of x that serves its own."""
    b, h, n = (lax.axis_index(name) for name in ("batch", "head", "chunk"))
    group = lax.div(h, jnp.int32(of_heads.shape[2] // x.shape[2]))
    return SimpleNamespace(b=b, h=h, n=n, group=group, rows=pl.ds(n * CHUNK, CHUNK))


def _fetch(r, at, xs, log_decay, columns, x_s, log_decay_s):
    """Begins to copy q, k and both parts of the log decays."""
    for n, x in enumerate(xs):
        plgpu.copy_gmem_to_smem(x.at[at.b, at.rows, at.group, columns], x_s.at[n], r.full)
        there = log_decay.at[n, at.b, at.rows, at.h, columns]
        plgpu.copy_gmem_to_smem(there, log_decay_s.at[n], r.full)


def _introduce(r, numbers):
    """Puts the numbers of rows where they are read anew each time: registers are few."""
    r.numbers_s[...] = plgpu.load(numbers, layout=ROWS, optimized=False)
    plgpu.commit_smem()


def _order(r):
    """The number of the row and of the column at every place of a matrix [C, C]."""
    rows = by_row(plgpu.load(r.numbers_s, layout=ROWS), CHUNK)
    return rows, by_column(plgpu.load(r.numbers_s, layout=COLUMNS), CHUNK)


def _between(r, half):
    """[i, j]: whether token j lies between i and the middle of its pair of neighbours."""
    i, j = _order(r)
    return ((i ^ j) < half) & jnp.where((i & half) != 0, j <= i, j > i)


def _sums(r, there, parts):
    """[i, c]: the sum over the tokens j that are `there` of what two matrices [j, c] add up to."""
    ones = _left(r, jnp.where(there, 1.0, 0.0).astype(jnp.bfloat16))
    return matmul(MATRIX, (ones, parts.at[0]), (ones, parts.at[1]))


def _left_over(r, there, log_decay_s):
    """[i, c]: what is left, of 1, over the tokens that are `there`."""
    return jnp.exp(_sums(r, there, log_decay_s))


def _left(r, a):
    return left(a, getattr(r, "spare_s", None))


def _load(ref):
    return plgpu.load(ref, layout=LAYOUT).astype(jnp.float32)
