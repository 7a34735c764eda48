"""The Hopper kernels of softmax attention in the interpreter that looks for races.

Inputs are rounded to bfloat16 for both sides; the references are in float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

VERSION = tuple(int(n) for n in jax.__version__.split(".")[:3])
if VERSION < (0, 11, 2):
    pytest.skip("GPU kernels are interpreted from jax 0.11.2 on", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu  # noqa: E402

from kernels import Mask, reference  # noqa: E402
from kernels.fused import softmax as fused_softmax  # noqa: E402
from kernels.pallas_gpu import resident  # noqa: E402
from kernels.pallas_gpu import softmax as module  # noqa: E402
from kernels.pallas_gpu.sweep import Band  # noqa: E402
from kernels.target import use  # noqa: E402
from tests.kernels.compare import agree, arrays, both, mask_of  # noqa: E402

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
NONE = Mask()


@pytest.fixture(autouse=True)
def no_races(capfd):
    """jax 0.11.2 prints them only."""
    yield
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def qkv(length, *, keys=None, heads=2, groups=1, dim=64):
    """Two examples, of which the mask "all" hides the second's keys."""
    like = (2, keys or length, groups, dim)
    return arrays(0, q=(2, length, heads, dim), k=like, v=like)


def two(mask: str, length: int):
    """The first and last row of `mask_of`."""
    made = mask_of(mask, length)
    return {k: x if k == "causal" or x is None else x[jnp.array([0, -1])] for k, x in made.items()}


def softmax(q, k, v, *, mask=NONE):
    with use("hopper", INTERPRET):
        how = {"mask": mask, "scale": q.shape[-1] ** -0.5}
        assert fused_softmax.refuse_softmax(q, k, v, **how) is None
        return fused_softmax.softmax(q, k, v, **how)


def linformer(q, k, v, *, mask=NONE):
    with use("hopper", INTERPRET):
        assert fused_softmax.refuse_linformer(q, k, v, alive=mask.keys) is None
        return fused_softmax.linformer(q, k, v, alive=mask.keys)


def window(q, k, v, *, mask=NONE, left, right):
    with use("hopper", INTERPRET):
        how = {"mask": mask, "left": left, "right": right}
        assert fused_softmax.refuse_window(q, k, v, **how) is None
        return together(fused_softmax.window(q, k, v, **how))


def together(part):
    """out, and log-sum-exp as a channel of its own: both have a gradient."""
    out, lse = part
    return jnp.concatenate([out, jnp.where(jnp.isfinite(lse), lse, -9.0)[..., None]], axis=-1)


def expected_window(q, k, v, **how):
    return together(reference.window_attention(q, k, v, **how))


def compare(op, against, given, mask, **options):
    result = both(op, against, given, mask, dtype=jnp.bfloat16, **options)
    agree(result, forward=5e-3, backward=1e-2)


@pytest.mark.parametrize(
    ("length", "keys", "mask", "dim", "groups"),
    [
        (200, 100, "padding", 64, 1),
        (70, 30, "none", 24, 1),
        slow(257, 256, "none", 64, 2),
        slow(257, 200, "padding", 128, 1),
        slow(130, 128, "none", 128, 2),
        slow(63, 300, "padding", 64, 1),
        slow(1, 1, "none", 64, 2),
    ],
)
def test_linformer_is_the_references(length, keys, mask, dim, groups):
    given = qkv(length, keys=keys, dim=dim, groups=groups)
    compare(linformer, reference.softmax_attention, given, two(mask, keys))


@pytest.mark.parametrize(
    ("length", "mask", "dim", "groups", "sides"),
    [
        (257, "causal", 64, 2, (100, 0)),
        slow(257, "all", 64, 1, (130, 70)),
        slow(257, "none", 128, 1, (130, 70)),
        slow(257, "segments", 128, 2, (3, 0)),
        slow(100, "padding", 64, 2, (0, 0)),
        slow(385, "padding", 128, 1, (0, 200)),
        (7, "segments", 64, 1, (3, 2)),
        slow(100, "all", 32, 1, (9, 0)),
        slow(1, "none", 64, 1, (3, 2)),
    ],
)
def test_window_and_its_log_sum_exp_are_the_references(length, mask, dim, groups, sides):
    given = qkv(length, dim=dim, groups=groups)
    how = {"left": sides[0], "right": sides[1]}
    compare(window, expected_window, given, two(mask, length), **how)


@pytest.mark.parametrize(
    ("length", "mask", "dim", "groups"),
    [
        (257, "all", 128, 1),
        slow(257, "none", 64, 1),
        slow(257, "causal", 128, 2),
        slow(300, "segments", 64, 2),
        slow(257, "padding", 64, 1),
        slow(63, "all", 64, 2),
        slow(100, "padding", 96, 1),
        slow(600, "none", 64, 1),
        slow(600, "padding", 128, 1),
    ],
)
def test_softmax_is_the_references(length, mask, dim, groups):
    given = qkv(length, dim=dim, groups=groups)
    compare(softmax, reference.softmax_attention, given, two(mask, length))


def test_dk_and_dv_split_among_blocks_of_threads(monkeypatch):
    monkeypatch.setattr(module, "LEAST", 2)  # 5 steps of queries: two parts, of 2 and 3
    given = qkv(300, keys=64, heads=1)
    compare(linformer, reference.softmax_attention, given, two("none", 64))


@pytest.mark.slow
def test_several_tiles_of_queries_in_a_block_of_threads(monkeypatch):
    monkeypatch.setattr(module, "PROCESSORS", 1)
    assert module._span(4, 4, (100, 0)) == 4
    compare(window, expected_window, qkv(385), two("causal", 385), left=100, right=0)
    compare(window, expected_window, qkv(600), two("padding", 600), left=9, right=170)


@pytest.mark.slow
def test_large_logits():
    given = qkv(130)
    given["q"] = 30 * given["q"]
    result = both(softmax, reference.softmax_attention, given, two("none", 130), dtype=jnp.bfloat16)
    agree(result, forward=5e-3, backward=2e-2)


def sees(band: Band, row: int, column: int) -> bool:
    return (band.left is None or row - column <= band.left) and (
        band.right is None or column - row <= band.right
    )


@pytest.mark.parametrize("left", [None, 0, 1, 63, 64, 100, 1000])
@pytest.mark.parametrize("right", [None, 0, 1, 65, 1000])
def test_blocks_of_a_band_are_all_that_it_sees_and_those_not_cut_lie_inside(left, right):
    band, block, count, rows = Band(left, right), 64, 5, 64
    seen = np.array(
        [[sees(band, t, s) for s in range(count * block)] for t in range(count * block)]
    )
    for turned, grid in ((band, seen), (band.turned(), seen.T)):
        for at in range(0, count * block, rows):
            tile = grid[at : at + rows].reshape(rows, count, block)
            start, stop = (int(x) for x in turned.reach(at, rows, block, count))
            assert [start <= n < stop for n in range(count)] == list(tile.any(axis=(0, 2)))
            parts = turned.parts(jnp.int32(at), rows, block, jnp.int32(start), jnp.int32(stop))
            whole = [n for a, b, cut in parts if not cut for n in range(int(a), int(b))]
            assert whole == list(np.flatnonzero(tile.all(axis=(0, 2))))
            assert sum(max(0, int(b - a)) for a, b, _ in parts) == stop - start


def test_blocks_of_threads_end_together():
    assert resident._even(128, 32) == 32  # 4 x 32 on 132 processors
    assert resident._even(1, 1) == 1
    for tiles, heads in ((7, 100), (64, 131), (256, 8)):
        each = resident._even(tiles, heads)
        assert 1 <= each <= tiles
        assert -(-heads * -(-tiles // each) // 132) * each <= 1.3 * (tiles * heads / 132) + 2


def test_what_the_kernels_do_not_take_is_refused():
    shape = lambda dim, dtype: jax.ShapeDtypeStruct((1, 128, 2, dim), dtype)  # noqa: E731
    for x, words in (
        (shape(64, jnp.float32), "are float32; cast them to bfloat16 or take backend='xla'"),
        (shape(256, jnp.bfloat16), "a head dim of up to 128, not 256"),
    ):
        with use("hopper", INTERPRET):
            said = fused_softmax.refuse_softmax(x, x, x, mask=NONE, scale=1.0)
        assert words in said
