"""`kernels.tiled_linear`, a CPU's path of linear attention, against the reference in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import Mask, favor_attention, reference, slabs
from kernels import linear_attention as op
from kernels.target import use
from tests.kernels.compare import agree, arrays, both, mask_of
from tests.kernels.test_linear_attention import features, of_features, phi


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    monkeypatch.setattr(slabs, "NUMBERS", 1)
    monkeypatch.setattr(slabs, "FEWEST", 16)


HOW = {"backend": "tiled"}


@pytest.mark.parametrize("scale", [None, 300.0])
@pytest.mark.parametrize(("length", "mask"), [(7, "none"), (60, "none"), (67, "padding")])
def test_output_and_gradients_are_the_references(length, mask, scale):
    given, mask = features(length, scale=scale), mask_of(mask, length)
    loose = {"forward": 5e-5, "backward": 1e-4} if scale else {}
    agree(both(op, reference.linear_attention, given, mask, op_options=HOW), **loose)


@pytest.mark.parametrize("scale", [None, 1.0])
def test_features_are_made_slab_by_slab_where_they_stand(scale):
    given = features(67, keys=67, scale=scale)
    given |= {name: np.log(given[name]) for name in "qk"}
    mask = mask_of("padding", 67)
    agree(both(op, of_features, given, mask, op_options=HOW | {"features": phi}))


@pytest.mark.parametrize("made", [None, "features"])
@pytest.mark.parametrize(("length", "mask"), [(7, "causal"), (64, "causal"), (67, "ragged")])
def test_causal_is_the_references(length, mask, made, monkeypatch):
    monkeypatch.setattr(slabs, "FEWEST", 32 if made else 16)  # of two sequences, of one
    given, how = features(length), HOW | {"chunk": 16}
    visible = mask_of("causal", length)
    if mask == "ragged":
        visible["keys"] = mask_of("padding", length)["keys"]
    expected = reference.linear_attention
    if made:
        given |= {name: np.log(given[name]) for name in "qk"}
        how["features"] = lambda x, at: (jnp.exp(x + jnp.sin(at)[:, :, None, None]), None)

        def expected(q, k, v, *, mask):
            q, k = (how["features"](x, jnp.arange(length)[None])[0] for x in (q, k))
            return reference.linear_attention(q, k, v, mask=mask)

    agree(both(op, expected, given, visible, op_options=how))


def _learned(backend, w, length=37):
    given = {n: jnp.asarray(x) for n, x in arrays(q=(2, length, 2, 4), k=(2, length, 2, 4)).items()}
    made = lambda x, at: (jax.nn.softplus(x @ w), None)  # noqa: E731
    run = functools.partial(op, given["q"], given["k"], given["k"], features=made, backend=backend)
    return jnp.sum(jnp.sin(run()) + run(mask=Mask(causal=True)))


@pytest.mark.parametrize(
    "wrap", ["scan", *(pytest.param(x, marks=pytest.mark.slow) for x in ("grad", "jit", "vmap"))]
)
def test_what_features_close_over_gets_its_gradient(wrap):
    """Under each transformation that traces the op on its own."""
    w = jnp.asarray(arrays(w=(2, 4, 9))["w"])

    def gradient(backend):
        one = lambda w: _learned(backend, w)  # noqa: E731
        if wrap == "vmap":
            return jax.grad(lambda w: jnp.sum(jax.vmap(one)(w)))(w)
        if wrap == "scan":
            step = lambda total, w: (total + one(w), None)  # noqa: E731
            return jax.grad(lambda w: jax.lax.scan(jax.checkpoint(step), 0.0, w)[0])(w)
        inner = jax.jit(one) if wrap == "jit" else one
        return jnp.stack([jax.grad(inner)(x) for x in w])

    np.testing.assert_allclose(gradient("tiled"), gradient("xla"), rtol=1e-5, atol=1e-5)


def test_grouped_heads_and_other_lengths_of_keys():
    given = arrays(q=(2, 21, 4, 6), k=(2, 40, 2, 6), v=(2, 40, 2, 5), log_scale=(2, 40, 2))
    given = {name: jnp.asarray(x) for name, x in given.items()}
    made = lambda x, at: (jax.nn.softplus(x), x[..., 0])  # noqa: E731
    run = lambda backend: jax.grad(  # noqa: E731
        lambda x: jnp.sum(jnp.sin(op(**x, features=made, backend=backend)))
    )(given)
    expected = run("xla")
    for name, got in run("tiled").items():
        np.testing.assert_allclose(got, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_rows_without_a_normaliser_are_zero_and_nan_is_not_hidden():
    ones, hidden = jnp.ones((1, 40, 1, 2)), jnp.zeros((1, 40), bool)
    out, back = jax.vjp(lambda *x: op(*x, mask=Mask(keys=hidden), **HOW), ones, ones, ones)
    for x in (out, *back(out + 1)):
        np.testing.assert_array_equal(x, 0)
    out = op(ones.at[0, 1].set(jnp.nan), ones, ones, **HOW)
    assert jnp.isnan(out[0, 1]).all()
    assert not jnp.isnan(out[0, 2:]).any()


def test_bfloat16_is_a_rounding_away():
    given = features(67, scale=1.0)
    result = both(
        op, reference.linear_attention, given, mask_of("padding", 67), dtype=jnp.bfloat16,
        op_options=HOW,
    )  # fmt: skip
    agree(result, forward=5e-3, backward=1e-2)


def test_favor_is_the_same_by_slabs():
    given = {n: jnp.asarray(x) for n, x in arrays(q=(2, 40, 2, 8), k=(2, 40, 2, 8), v=(2, 40, 2, 5),
                                                  w=(24, 8)).items()}  # fmt: skip
    run = lambda backend: favor_attention(  # noqa: E731
        given["q"], given["k"], given["v"], given["w"], backend=backend
    )
    np.testing.assert_allclose(run("tiled"), run("xla"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "width", "tokens"), [(4096, 512, 256), (4096, 8192, 16), (1000, 512, 250),
                                    (67, 8192, 14), (13, 1, 13), (1, 512, 1)]
)  # fmt: skip
def test_slabs_divide_a_length_where_they_can(monkeypatch, length, width, tokens):
    monkeypatch.setattr(slabs, "NUMBERS", 1 << 17)
    assert slabs.slab_size(length, slabs.most_tokens(width)) == tokens


@pytest.mark.parametrize("causal", [False, True])
def test_segments_and_causal_scales_are_refused(causal):
    ones, numbers = jnp.ones((1, 4, 1, 2)), jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(NotImplementedError, match="no segments"):
        op(ones, ones, ones, mask=Mask(causal=causal, segments=numbers), **HOW)
    with pytest.raises(NotImplementedError, match="no log scales"):
        op(ones, ones, ones, log_scale=ones[..., 0], mask=Mask(causal=True), **HOW)


def test_it_is_for_a_cpu():
    ones = jnp.ones((1, 4, 1, 2))
    with use("gpu"), pytest.raises(NotImplementedError, match="for a CPU"):
        op(ones, ones, ones, **HOW)
