"""What is special to FAVOR+: its estimator's closed forms, and the faults that others have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import attention
from efficient_attn.attention import Site
from efficient_attn.attention.features import GENERALISED, draw_projection, feature_map
from efficient_attn.attention.performer import SOFTMAX_MAPS, Performer
from kernels import Mask
from tests import support

HEADS, DIM, LENGTH = 2, 64, 256
POSITIVE_KERNELS = ["positive", "hyperbolic", "relu", "exp", "elu", "abs", "sigmoid"]


def performer(*, dtype=jnp.float32, dim=DIM, **options):
    site = Site(width=HEADS * dim, heads=HEADS, seq=LENGTH, dtype=dtype)
    config = Performer.Config(**options)
    return Performer(config, site, rngs=nnx.Rngs(0), shared={})


def draw(seed, *, std, batch=2, length=LENGTH, dim=DIM, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    shape = (batch, length, HEADS, dim)
    q, k, v = (jax.random.normal(key, shape) for key in keys)
    return (std * q).astype(dtype), (std * k).astype(dtype), v.astype(dtype)


def run(core, q, k, v, mask=None):
    return jax.jit(lambda *x: core(*x, mask=mask or Mask(), shared={}))(q, k, v)


def softmax_kernel(x, y):
    return np.exp(x @ y)


def estimates(kind, projection, x, y, *, features, draws):
    """`draws` independent estimates of the softmax kernel of the vectors x and y."""

    def one(key):
        w = draw_projection(key, features, len(x), projection)
        scaled = jnp.stack([x, y])[None, :, None] * len(x) ** 0.25
        phi, log_scale = feature_map(scaled, w, kind=kind, epsilon=0.0)
        return jnp.sum(phi[0, 0, 0] * phi[0, 1, 0]) * jnp.exp(jnp.sum(log_scale))

    return np.asarray(
        jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(7), draws)), np.float64
    )


X = np.array([0.6, -0.3, 0.2, 0.1])
Y = np.array([0.2, 0.5, -0.4, 0.3])


def lemma_2(kind, x, y, m):
    """Variance of the estimates with m independent rows (paper, lemma 2)."""
    plus, minus = np.exp(np.sum((x + y) ** 2)), np.exp(-np.sum((x - y) ** 2))
    kernel = softmax_kernel(x, y)
    positive = plus * kernel**2 * (1 - 1 / plus) / m
    return {
        "trigonometric": plus * kernel**-2 * (1 - minus) ** 2 / (2 * m),
        "positive": positive,
        "hyperbolic": (1 - 1 / plus) * positive / 2,
    }[kind]


@pytest.mark.parametrize("kind", SOFTMAX_MAPS)
def test_the_estimate_is_unbiased_and_has_the_variance_of_lemma_2(kind):
    draws, features = 40_000, 8
    values = estimates(kind, "iid", X, Y, features=features, draws=draws)
    expected = lemma_2(kind, X, Y, features)
    assert abs(values.mean() - softmax_kernel(X, Y)) < 5 * np.sqrt(expected / draws)
    np.testing.assert_allclose(values.var(), expected, rtol=0.1)


def test_orthogonal_rows_are_unbiased_and_lower_the_variance_by_theorem_2s_gap_at_least():
    draws, m, d = 40_000, 4, 4
    iid = estimates("positive", "iid", X, Y, features=m, draws=draws)
    orthogonal = estimates("positive", "orthogonal", X, Y, features=m, draws=draws)
    kernel = softmax_kernel(X, Y)
    gap = 2 * (m - 1) / (m * (d + 2)) * (kernel - np.exp(-(X @ X + Y @ Y) / 2)) ** 2
    assert abs(orthogonal.mean() - kernel) < 5 * orthogonal.std() / np.sqrt(draws)
    assert iid.var() - orthogonal.var() > 0.9 * gap


@pytest.mark.parametrize("kind", ["orthogonal", "regularised"])
def test_rows_are_orthogonal_within_a_block_with_the_stated_norms(kind):
    w = np.asarray(draw_projection(jax.random.key(0), 40, 16, kind))
    for block in (w[:16], w[16:32], w[32:]):
        gram = block @ block.T
        np.testing.assert_allclose(gram - np.diag(np.diag(gram)), 0, atol=1e-4)
    norms = np.linalg.norm(w, axis=1)
    if kind == "regularised":
        np.testing.assert_allclose(norms, 4.0, rtol=1e-5)
    else:
        many = draw_projection(jax.random.key(0), 4096, 16, kind)
        squares = np.sum(np.asarray(many) ** 2, axis=1)  # chi^2 with 16 degrees of freedom
        np.testing.assert_allclose([squares.mean(), squares.var()], [16, 32], rtol=0.1)


@pytest.mark.parametrize("kind", ["orthogonal", "regularised", "iid"])
def test_the_output_approaches_softmax_attention_as_one_over_the_root_of_features(kind):
    """Sixteen times the features, a quarter of the error; "regularised" keeps a bias of a few %."""
    q, k, v = draw(1, std=0.5, length=64, dim=16)
    exact = np.asarray(jax.nn.dot_product_attention(q, k, v))
    errors = []
    for features in (16, 256, 4096):
        out = run(performer(features=features, projection=kind, dim=16), q, k, v)
        errors.append(np.linalg.norm(out - exact) / np.linalg.norm(exact))
    assert errors[0] > 2 * errors[1]
    assert errors[2] < 0.06 and (kind == "regularised" or errors[1] > 3 * errors[2])


@pytest.mark.parametrize("kind", POSITIVE_KERNELS)
def test_redrawing_the_second_half_of_the_keys_moves_nothing_in_the_first(kind):
    core, half = performer(feature_map=kind, features=64), LENGTH // 2
    stds = np.array([0.5, 1.0, 2.0], np.float32)[:, None, None, None]  # one for each example
    q, k, v = draw(2, std=stds, batch=3)
    other = draw(3, std=stds, batch=3)
    before = run(core, q, k, v, Mask(causal=True))
    for factor in (1.0, 10.0):
        changed = (
            jnp.concatenate([x[:, :half], factor * y[:, half:]], 1)
            for x, y in zip((q, k, v), other, strict=True)
        )
        after = run(core, *changed, Mask(causal=True))
        np.testing.assert_array_equal(before[:, :half], after[:, :half])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", POSITIVE_KERNELS)
def test_rows_sum_to_one(kind, causal):
    stds = np.array([0.25, 0.5, 1.0, 2.0, 4.0], np.float32)[:, None, None, None]
    q, k, v = draw(4, std=stds, length=512, batch=5)
    keys = jnp.arange(512)[None] < jnp.array([512, 300, 400, 1, 200])[:, None]
    core = performer(feature_map=kind)
    for mask in (Mask(causal=causal), Mask(causal=causal, keys=keys)):
        out = run(core, q, k, jnp.ones_like(v), mask)
        np.testing.assert_allclose(out, 1.0, atol=1e-5)


def test_no_collapse_to_uniform_attention_where_the_estimate_can_hold():
    """performer-pytorch is at the error of plain mean pooling here, whatever its features."""
    q, k, v = draw(5, std=0.5, length=1024, batch=1)
    exact = np.asarray(jax.nn.dot_product_attention(q, k, v))
    uniform = np.mean(v, axis=1, keepdims=True)
    few, many = (np.linalg.norm(run(performer(features=f), q, k, v) - exact) for f in (256, 4096))
    assert many < 0.4 * few and many < 0.6 * np.linalg.norm(uniform - exact)
    wild = run(performer(features=256), 2 * q, 2 * k, v)  # beyond FAVOR+, and it does not hide it
    assert np.linalg.norm(wild - uniform) > 2 * np.linalg.norm(uniform - exact)


def test_scaling_all_features_changes_nothing():
    """An eps in the normaliser would show: keys whose features are e^-60 times smaller."""
    q, k, v = draw(6, std=1.0)
    q = q.at[..., 0].set(0.0)
    core = performer(features=64)
    w = core.projection[...].at[:, 0].set(0.0)
    core.projection[...] = w
    near_out, far_out = (
        run(core, q, k.at[..., 0].set(0.0), v),
        run(core, q, k.at[..., 0].set(30.0), v),  # |k|^2 / 2 grows alike for every key
    )
    np.testing.assert_allclose(near_out, far_out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_padded_keys_are_in_neither_numerator_nor_denominator(causal):
    q, k, v = draw(7, std=1.0, batch=1)
    keys = (jnp.arange(LENGTH) < 100)[None]
    core = performer(features=64)
    masked = run(core, q, 1e3 * k * ~keys[..., None, None] + k, v, Mask(causal=causal, keys=keys))
    cut = run(core, q[:, :100], k[:, :100], v[:, :100], Mask(causal=causal))
    np.testing.assert_allclose(masked[:, :100], cut, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_one_example_never_changes_another(causal):
    q, k, v = draw(8, std=1.0)
    core = performer(features=64)
    before = run(core, q, k, v, Mask(causal=causal))
    after = run(core, q, k.at[1].multiply(6.0), v, Mask(causal=causal))
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1] - after[1]).max() > 1e-3


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_neither_overflows_nor_loses_the_normaliser(dtype):
    stds = np.array([1.0, 4.0, 16.0], np.float32)[:, None, None, None]
    q, k, v = draw(9, std=stds, dtype=dtype, batch=3)
    core = performer(features=64, dtype=dtype)
    out = run(core, q, k, v, Mask(causal=True))
    assert out.dtype == dtype
    wide = run(core, *(x.astype(jnp.float32) for x in (q, k, v)), Mask(causal=True))
    bound = 4 * float(jnp.finfo(dtype).eps) * float(jnp.abs(v).max())
    np.testing.assert_allclose(np.asarray(out, np.float32), wide, atol=bound)
    grads = jax.grad(lambda *x: jnp.sum(core(*x, mask=Mask(), shared={}).astype(jnp.float32)))(
        q, k, v
    )
    assert bool(jnp.isfinite(grads).all())


@functools.partial(jax.jit, static_argnums=0)
def refreshed(graph, state, step):
    core = nnx.merge(graph, state)
    attention.refresh(core, step)
    return nnx.state(core)


def refresh(core, step):
    nnx.update(core, refreshed(*nnx.split(core), jnp.int32(step)))
    return np.asarray(core.projection[...])


def test_redraw_is_a_pure_function_of_step_and_key():
    seen = {}
    for start in (0, 5):  # a run left alone, and one resumed at step 5 from what it had saved
        core = performer(features=16, redraw=3, dim=8)
        if start:
            core.projection[...] = seen[start - 1]
        for step in range(start, 10):
            w = refresh(core, step)
            np.testing.assert_array_equal(w, seen.setdefault(step, w))
    assert [bool((seen[s] == seen[s + 1]).all()) for s in range(9)] == [
        s % 3 != 2 for s in range(9)
    ]
    fixed = performer(features=16, redraw=0, dim=8)
    first = np.asarray(fixed.projection[...])
    np.testing.assert_array_equal(first, refresh(fixed, 3))


def test_redraws_differ_between_layers_and_counts():
    site = Site(width=16, heads=2, seq=8)
    rngs = nnx.Rngs(3)
    layers = [
        Performer(Performer.Config(features=16), site, rngs=rngs, shared={}) for _ in range(2)
    ]
    assert np.abs(layers[0].projection[...] - layers[1].projection[...]).max() > 0.1
    core = performer(features=16, redraw=1, dim=8)
    draws = [refresh(core, step).ravel() for step in range(20)]
    correlation = np.corrcoef(draws) - np.eye(20)
    assert np.abs(correlation).max() < 0.45  # 128 numbers each: 5 sigma


@pytest.mark.parametrize("kind", sorted(GENERALISED))
def test_generalised_kernels_are_the_kernels_they_say(kind):
    q, k, v = draw(10, std=0.5, length=32, dim=8)
    core = performer(feature_map=kind, projection="none", epsilon=0.5, dim=8)
    add = 0.0 if kind in ("exp", "elu", "sigmoid") else 0.5
    phi = [np.asarray(GENERALISED[kind](x * 8**-0.25), np.float64) + add for x in (q, k)]
    weights = np.einsum("bthr,bshr->bhts", *phi)
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhts,bshd->bthd", weights, np.asarray(v))
    np.testing.assert_allclose(run(core, q, k, v), expected, rtol=2e-3, atol=2e-4)


def compiled_memory(length, *, backward, causal):
    core = performer(features=256)
    shape = jax.ShapeDtypeStruct((1, length, HEADS, DIM), jnp.float32)

    def forward(q, k, v):
        return core(q, k, v, mask=Mask(causal=causal), shared={})

    function = jax.grad(lambda *qkv: jnp.sum(forward(*qkv)), (0, 1, 2)) if backward else forward
    as_users_have_it = dict.fromkeys(support.fast(), True) | {"xla_backend_optimization_level": 3}
    return jax.jit(function).lower(shape, shape, shape).compile(as_users_have_it).memory_analysis()


@pytest.mark.parametrize("causal", [True, False])
def test_memory_grows_linearly_and_holds_no_array_of_all_features(causal):
    of = functools.partial(compiled_memory, causal=causal)
    once, twice = (of(length, backward=True).temp_size_in_bytes for length in (8192, 16_384))
    assert twice < 2.05 * once
    features = 16_384 * HEADS * 256 * 4
    assert of(16_384, backward=False).temp_size_in_bytes < features
    assert twice < 2 * features, "of the queries and of the keys"


def test_the_diagnostic_knows_a_good_estimate_from_a_collapsed_one():
    def quality(std, **options):
        q, k, v = draw(11, std=std, length=128, dim=16)
        core = performer(dim=16, **options)
        core.watched = True
        _, said = nnx.capture(core, attention.Diagnostic)(q, k, v, mask=Mask(), shared={})
        (numbers,) = (v.get_value()[0] for _, v in nnx.to_flat_state(said))
        return {name: float(value) for name, value in numbers.items()}

    good = quality(0.5, features=4096)
    assert good["error"] < 0.05 < good["uniform_error"] and good["features"] > 100
    assert not attention.collapsed(good)
    bad = quality(4.0, features=8)
    assert bad["error"] > 0.5 and attention.collapsed(bad)
    assert attention.collapsed(good | {"error": float("nan")})
