"""The fused softmax, window and Linformer attention of TPU, simulated, against their references.

`interpret=True` runs a kernel block by block, with NaN in what it has not written; the simulator of
TPU has asynchronous copies as well, and a detector of races.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import Mask, reference
from kernels.fused import softmax as fused_softmax
from kernels.fused.softmax import Tiles
from kernels.linformer_attention import linformer_attention
from kernels.target import use
from tests import support
from tests.kernels.compare import MASKS, agree, both, mask_of
from tests.kernels.fused_softmax import (
    NONE,
    SMALL,
    WINDOWS,
    expected_window,
    linformer,
    qkv,
    slow,
    softmax,
    window,
)
from tests.kernels.simulated import pallas

pytestmark = pallas

COVER = [
    # length, mask, heads, key-value heads, dim: every value of each, many pairs
    (1, "all", 2, 2, 64),
    (7, "none", 2, 1, 32),
    (63, "padding", 4, 2, 128),
    (63, "segments", 3, 3, 64),
    (100, "all", 4, 4, 32),
]
EVERY = [
    (length, mask, 4, (4, 2, 1)[n % 3], (32, 64, 128)[n // 3 % 3])
    for n, (length, mask) in enumerate(itertools.product((1, 7, 63, 100, 257), MASKS))
]


@pytest.mark.parametrize(
    ("length", "mask", "heads", "groups", "dim"), COVER + [slow(*case) for case in EVERY]
)
def test_softmax_is_the_references(length, mask, heads, groups, dim):
    given = qkv(length, heads=heads, groups=groups, dim=dim)
    agree(both(softmax, reference.softmax_attention, given, mask_of(mask, length)))


@pytest.mark.parametrize(
    ("length", "mask", "heads", "groups", "dim", "sides"),
    [
        (63, "all", 2, 2, 64, (0, 0)),
        (63, "none", 4, 2, 128, (3, 2)),
        slow(63, "padding", 4, 2, 64, (16, 0)),
        slow(63, "segments", 2, 2, 32, (1000, 5)),
    ]
    + [slow(*case, sides) for case, sides in itertools.product(EVERY, WINDOWS)],
)
def test_window_and_its_log_sum_exp_are_the_references(length, mask, heads, groups, dim, sides):
    given = qkv(length, heads=heads, groups=groups, dim=dim)
    how = {"left": sides[0], "right": sides[1]}
    agree(both(window, expected_window, given, mask_of(mask, length), **how))


@pytest.mark.parametrize(
    ("length", "keys", "mask", "heads", "groups", "dim"),
    [(63, 24, "padding", 4, 2, 64), (7, 40, "none", 2, 2, 128)]
    + [
        slow(*case, 4, (4, 2, 1)[n % 3], (32, 64, 128)[n // 3 % 3])
        for n, case in enumerate(itertools.product((1, 63, 257), (1, 24, 100), ("none", "padding")))
    ],
)
def test_linformer_is_the_references(length, keys, mask, heads, groups, dim):
    given = qkv(length, keys=keys, heads=heads, groups=groups, dim=dim)
    how = {"op_options": {"tiles": Tiles(16, keys)}}
    agree(both(linformer, reference.softmax_attention, given, mask_of(mask, keys), **how))


def test_linformer_attention_on_a_chip_and_on_none():
    q, k, v = map(jnp.asarray, qkv(23, keys=12).values())
    alive = jnp.asarray(support.ragged_keys(12))
    on_cpu = linformer_attention(q, k, v, alive=alive)
    np.testing.assert_array_equal(on_cpu[3], 0)
    with use("tpu", True):
        on_tpu = linformer_attention(q, k, v, alive=alive, backend="pallas")
    assert support.relative(on_tpu, on_cpu) < 1e-5
    with pytest.raises(NotImplementedError, match="not for this cpu"):
        linformer_attention(q, k, v, alive=alive, backend="pallas")


def test_a_causal_row_of_keys_that_are_all_on_chip():
    given, how = qkv(40, groups=1), {"op_options": {"tiles": Tiles(8, 40)}}
    agree(both(softmax, reference.softmax_attention, given, mask_of("all", 40), **how))


def test_more_query_heads_than_meet_a_block_of_keys_at_once(monkeypatch):
    from kernels.pallas_tpu import softmax_layout as module

    monkeypatch.setattr(module, "REPEATS", 2)
    given = qkv(23, heads=12, groups=2, dim=64, batch=4)  # pairs of groups, 6 heads in parts of 1
    agree(both(window, expected_window, given, mask_of("all", 23), left=9, right=0))


@pytest.mark.parametrize(
    ("sides", "tiles", "mask"),
    [
        ((11, 3), Tiles(16, 16), "all"),
        slow((11, 3), Tiles(16, 32), "none"),
        slow((25, 16), Tiles(16, 16), "none"),
        slow((39, 0), Tiles(24, 24), "segments"),
        slow((1000, 9), Tiles(16, 16), "padding"),
        slow((1000, 0), Tiles(32, 32), "all"),
        slow((1000, 1000), Tiles(16, 32), "padding"),
    ],
)
def test_blocks_go_in_pieces(monkeypatch, sides, tiles, mask):
    """Where the edge of a window goes through square blocks, only what is seen is computed."""
    from kernels.pallas_tpu import softmax_plan as module

    monkeypatch.setattr(module, "sizes_of", lambda *_: module.Sizes(piece=8, edge=8))
    how = {"left": sides[0], "right": sides[1], "op_options": {"tiles": tiles}}
    agree(both(window, expected_window, qkv(63), mask_of(mask, 63), **how))


def test_the_pieces_of_a_window_are_those_that_it_shows():
    from kernels.pallas_tpu import softmax_plan as module

    q = jnp.zeros((1, 4096, 2, 128))
    how = {"scale": 1.0, "segments": None, "keys": None, "interpret": None}
    given = {"causal": False, "window": (700, 100), "tiles": Tiles(512, 512)}
    plan = module.plan(q, q, **given, **how)
    ahead = np.arange(4096)[:, None] - np.arange(4096)
    seen = (ahead <= 700) & (ahead >= -100)
    shown, masked = np.zeros_like(seen), np.zeros_like(seen)
    pieces = dict(plan.distances())
    for i in range(8):
        first, last = plan.keys_of(i)
        for j in range(first, last + 1):
            whole = [(plan.all, True)] if plan.whole(i, j) else pieces[i - j]
            for sides, clear in whole:
                rows = slice(512 * i + sides.query, 512 * i + sides.query + sides.queries)
                columns = slice(512 * j + sides.key, 512 * j + sides.key + sides.keys)
                assert not shown[rows, columns].any()
                shown[rows, columns], masked[rows, columns] = True, not clear
    assert shown[seen].all() and seen[shown & ~masked].all()
    assert shown.sum() < 1.7 * seen.sum()


@pytest.mark.parametrize(
    ("op", "expected", "how"),
    [
        (softmax, reference.softmax_attention, {}),
        slow(window, expected_window, {"left": 16, "right": 3}),
        slow(linformer, reference.softmax_attention, {"op_options": {"tiles": Tiles(16, 63)}}),
    ],
)
def test_bfloat16(op, expected, how):
    mask = mask_of("padding", 63)
    agree(both(op, expected, qkv(63), mask, dtype=jnp.bfloat16, **how), forward=5e-3, backward=1e-2)


@pytest.mark.parametrize("keys", [63, slow(24)])
def test_logits_of_ten_thousand(keys):
    given = qkv(63, keys=keys)
    given["q"] *= 1e4 / np.abs(np.einsum("bthd,bshd->bhts", given["q"], given["k"])).max() * 8
    mask = mask_of("all" if keys == 63 else "padding", keys)
    tiles = {"op_options": {"tiles": Tiles(16, 16 if keys == 63 else keys)}}
    # the logits themselves are right to 1e-7 of 1e4
    agree(
        both(softmax, reference.softmax_attention, given, mask, **tiles),
        forward=1e-3,
        backward=1e-2,
    )


def test_a_row_that_sees_nothing_is_zero_and_gives_no_gradient():
    result = both(window, expected_window, qkv(23), mask_of("all", 23), left=5, right=0)
    np.testing.assert_array_equal(result.out[3, ..., :-1], 0)
    np.testing.assert_array_equal(result.out[3, ..., -1], -9)
    for grad in result.grads.values():
        np.testing.assert_array_equal(grad[3], 0)


def test_parts_join_to_the_whole():
    """Keys before the window, and those within it."""
    q, k, v = map(jnp.asarray, qkv(23, batch=1).values())

    def parted(q, k, v):
        with use("tpu", True):
            how = {"left": 4, "right": 0, "mask": NONE, "tiles": SMALL}
            near = fused_softmax.window(q, k, v, **how)
            how = {"left": 4, "right": 0, "mask": Mask(segments=jnp.arange(23)[None] // 5)}
            same = fused_softmax.window(q, k, v, tiles=SMALL, **how)
        weight = jnp.exp(same.lse - near.lse)  # of what both saw
        return jnp.sum(jnp.sin(near.out)) + jnp.sum(weight * same.out[..., 0])

    def expected(q, k, v):
        near = reference.window_attention(q, k, v, left=4, right=0)
        mask = Mask(segments=jnp.arange(23)[None] // 5)
        same = reference.window_attention(q, k, v, left=4, right=0, mask=mask)
        return jnp.sum(jnp.sin(near[0])) + jnp.sum(jnp.exp(same[1] - near[1]) * same[0][..., 0])

    ours, theirs = (jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v) for f in (parted, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert support.relative(a, b) < 2e-5
