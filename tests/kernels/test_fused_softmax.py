"""The fused softmax, window and Linformer attention of TPU, simulated, against their references.

`interpret=True` runs a kernel block by block, with NaN in what it has not written; the simulator of
TPU has asynchronous copies as well, and a detector of races.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kernels import Mask, reference
from kernels.fused import softmax as fused_softmax
from kernels.fused.softmax import Tiles
from kernels.linformer_attention import linformer_attention
from kernels.target import use
from tests import support
from tests.kernels.compare import MASKS, agree, arrays, both, mask_of

pallas = pytest.mark.skipif(
    tuple(int(x) for x in jax.__version__.split(".")[:2]) < (0, 11), reason="Pallas from jax 0.11"
)
pytestmark = pallas
WINDOWS = ((0, 0), (3, 2), (16, 0), (1000, 5), (1000, 1000))
SMALL, NONE = Tiles(16, 8), Mask()


def qkv(length, *, keys=None, heads=2, groups=2, dim=64, batch=4, seed=0):
    keys = length if keys is None else keys
    like = (batch, keys, groups, dim)
    return arrays(seed, q=(batch, length, heads, dim), k=like, v=like)


def softmax(q, k, v, *, mask=NONE, tiles=SMALL, interpret=True):
    with use("tpu", interpret):
        how = {"mask": mask, "scale": q.shape[-1] ** -0.5}
        assert fused_softmax.refuse_softmax(q, k, v, **how) is None
        return fused_softmax.softmax(q, k, v, tiles=tiles, **how)


def linformer(q, k, v, *, mask=NONE, tiles=None, interpret=True):
    with use("tpu", interpret):
        assert fused_softmax.refuse_linformer(q, k, v, alive=mask.keys) is None
        return fused_softmax.linformer(q, k, v, alive=mask.keys, tiles=tiles)


def window(q, k, v, *, mask=NONE, left, right, tiles=SMALL, interpret=True):
    with use("tpu", interpret):
        how = {"mask": mask, "left": left, "right": right}
        assert fused_softmax.refuse_window(q, k, v, **how) is None
        return together(fused_softmax.window(q, k, v, tiles=tiles, **how))


def expected_window(q, k, v, **how):
    return together(reference.window_attention(q, k, v, **how))


def together(part):
    """out, and log-sum-exp as a channel of its own: both have a gradient."""
    out, lse = part
    return jnp.concatenate([out, jnp.where(jnp.isfinite(lse), lse, -9.0)[..., None]], axis=-1)


def simulator():
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def races_found() -> bool:
    """Before jax 0.12, which raises."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return bool(interpret_pallas_call.races and interpret_pallas_call.races.races_found)


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
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


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
    with pytest.raises(NotImplementedError, match="not on a cpu"):
        linformer_attention(q, k, v, alive=alive, backend="pallas")


def test_a_causal_row_of_keys_that_are_all_on_chip():
    given, how = qkv(40, groups=1), {"op_options": {"tiles": Tiles(8, 40)}}
    agree(both(softmax, reference.softmax_attention, given, mask_of("all", 40), **how))


def test_more_query_heads_than_meet_a_block_of_keys_at_once(monkeypatch):
    from kernels.pallas_tpu import softmax_plan as module

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

    monkeypatch.setattr(module, "PIECE", 8)
    monkeypatch.setattr(module, "EDGE", 8)
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


@pytest.mark.parametrize(
    ("op", "length", "keys", "mask", "how"),
    [
        (window, 23, 23, "all", {"left": 7, "right": 0}),
        (linformer, 23, 12, "padding", {"tiles": Tiles(8, 12)}),
        slow(window, 23, 23, "segments", {"left": 7, "right": 4}),
        slow(window, 40, 40, "none", {"left": 3, "right": 20}),
        slow(softmax, 40, 40, "causal", {}),
        slow(softmax, 23, 23, "padding", {}),
        slow(softmax, 40, 17, "padding", {}),
    ],
)
def test_the_simulator_of_a_tpu_finds_no_race(op, length, keys, mask, how):
    """Asynchronous copies done as late as may be, NaN in fresh memory."""
    given = qkv(length, keys=keys, heads=4)
    given = {name: x[1:2] for name, x in given.items()}
    mask = {
        k: v[1:2] if k != "causal" and v is not None else v for k, v in mask_of(mask, keys).items()
    }
    expected = expected_window if op is window else reference.softmax_attention
    options = {"interpret": simulator()} | {k: v for k, v in how.items() if k == "tiles"}
    rest = {k: v for k, v in how.items() if k != "tiles"}
    agree(both(op, expected, given, mask, op_options=options, **rest))
    assert not races_found()


def loss(q, k, v, keys, segments):
    mask = Mask(causal=True, keys=keys, segments=segments)
    return jnp.sum(jnp.sin(window(q, k, v, mask=mask, left=9, right=0)))


@functools.cache
def problem():
    q, k, v = map(jnp.asarray, qkv(23, dim=32).values())
    keys, segments = support.ragged_keys(23), support.ragged_segments(23)
    given = q, k, v, jnp.asarray(keys), jnp.asarray(segments)
    return given, graded(loss)(*given)


def graded(function):
    return jax.jit(jax.value_and_grad(function, (0, 1, 2)), compiler_options=support.fast())


def same(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_vmap_and_checkpoint():
    given, expected = problem()

    def mapped(*given):
        two = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), given)
        return jnp.sum(jax.vmap(jax.checkpoint(loss))(*two))

    same(graded(mapped)(*given), expected)


def test_shards_of_batch_and_heads():
    given, expected = problem()
    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split, rows = PartitionSpec("data", None, "heads"), PartitionSpec("data")

    def total(*given):
        return jax.lax.psum(loss(*given), ("data", "heads"))

    mapped = jax.shard_map(  # the interpreter does not know how values vary over a mesh
        total, mesh=mesh, in_specs=(split,) * 3 + (rows,) * 2, out_specs=PartitionSpec(),
        check_vma=False,
    )  # fmt: skip
    got = jax.jit(mapped, compiler_options=support.fast())(*given)
    np.testing.assert_allclose(got, expected[0], rtol=1e-5)


def for_tpu(function, *shapes):
    """`function` and its gradients exported for TPU."""
    given = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    with use("tpu"):
        step = jax.jit(jax.grad(lambda *x: jnp.sum(function(*x).astype(jnp.float32)), (0, 1, 2)))
        return jax.export.export(step, platforms=["tpu"])(*given)


@pytest.mark.parametrize(
    ("dim", "heads", "groups", "dtype"),
    [
        (64, 4, 2, jnp.bfloat16),
        slow(128, 4, 1, jnp.bfloat16),
        slow(32, 4, 4, jnp.bfloat16),
        slow(256, 2, 2, jnp.bfloat16),
        slow(64, 4, 4, jnp.float32),
    ],
)
def test_it_is_exported_for_tpu(dim, heads, groups, dtype):
    """With the tiles that a TPU gets: 1300 positions, several tiles."""
    q, k = ((2, 1300, n, dim) for n in (heads, groups))
    masks = ((2, 1300), bool), ((2, 1300), jnp.int32)

    def attend(q, k, v, keys, segments):
        mask = Mask(keys=keys, segments=segments)
        near = window(q, k, v, mask=mask, left=200, right=100, tiles=None, interpret=None)
        mask = Mask(causal=True)
        far = softmax(q, k, v, mask=mask, tiles=None, interpret=None)
        few = linformer(q, k[:, :256], v[:, :256], interpret=None)
        return near[..., :-1] + far + few

    exported = for_tpu(attend, (q, dtype), (k, dtype), (k, dtype), *masks)
    # forward, dq and dk, dv of two; forward and one backward of linformer
    assert exported.mlir_module().count("tpu_custom_call") == 8
    assert "1300x1300" not in exported.mlir_module()


def test_shards_are_lowered_for_tpu():
    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = PartitionSpec("data", None, "heads")

    def attend(q, k, v):
        return softmax(q, k, v, tiles=None, interpret=None)

    mapped = jax.shard_map(attend, mesh=mesh, in_specs=split, out_specs=split)
    shape = (4, 256, 4, 128), jnp.bfloat16
    assert for_tpu(mapped, shape, shape, shape).mlir_module().count("tpu_custom_call") == 2


def refusal(name, *, chip="tpu", dims=(64, 64, 64), dtypes=(jnp.float32,) * 3, keys=23, **how):
    q, k, v = (
        jnp.zeros((2, n, 2, dim), dtype)
        for n, dim, dtype in zip((23, keys, keys), dims, dtypes, strict=True)
    )
    with use(chip):
        return getattr(fused_softmax, f"refuse_{name}")(q, k, v, **how)


PLAIN = {"mask": NONE, "scale": 0.125}
SIDES = {"mask": NONE, "left": 3, "right": 0}


@pytest.mark.parametrize(
    ("name", "how", "reason"),
    [
        ("softmax", PLAIN, None),
        ("softmax", PLAIN | {"chip": "cpu"}, "not on a cpu"),
        ("softmax", PLAIN | {"logit_cap": 30.0}, "no logit_cap"),
        ("softmax", PLAIN | {"bias": ()}, "no slopes"),
        ("softmax", PLAIN | {"scale": np.zeros(2)}, "Python number"),
        ("softmax", PLAIN | {"dims": (64, 64, 32)}, "32 channels"),
        ("softmax", PLAIN | {"dims": (512,) * 3}, "up to 256"),
        ("softmax", PLAIN | {"dtypes": (jnp.float16,) * 3}, "bfloat16 or float32"),
        ("softmax", PLAIN | {"dtypes": (jnp.bfloat16, jnp.float32, jnp.float32)}, "one dtype"),
        ("window", SIDES, None),
        ("window", SIDES | {"dilation": 2}, "no dilation"),
        ("window", SIDES | {"slopes": np.ones(2)}, "no slopes"),
        ("linformer", {"keys": 512}, None),
        ("linformer", {"keys": 513}, "lower rank"),
        ("cudnn", PLAIN, "not on a tpu"),
        ("cudnn", PLAIN | {"chip": "hopper"}, "bfloat16 or float16"),
    ],
)
def test_refusals(name, how, reason):
    said = refusal(name, **how)
    assert said is None if reason is None else reason in said


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({}, None),
        ({"left": 5, "mask": Mask(causal=True)}, None),
        ({"left": 5}, "causal"),
        ({"mask": "padding"}, "padding"),
        ({"dims": (60,) * 3}, "multiple of 8"),
        ({"dims": (264,) * 3}, "up to 256"),
        ({"logit_cap": 3.0}, "no logit_cap"),
    ],
)
def test_what_cudnn_takes(how, reason):
    half = {"chip": "hopper", "dtypes": (jnp.bfloat16,) * 3}
    if how.get("mask") == "padding":
        how = how | {"mask": Mask(keys=jnp.ones((2, 23), bool))}
    said = refusal("cudnn", **PLAIN | half | how)
    assert said is None if reason is None else reason in said
