"""What is special to those that work on pictures alone: pool, window, spatial_reduction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import attention
from efficient_attn.attention.base import nearly_square
from efficient_attn.errors import UserError
from kernels import Mask
from tests import support

ROWS, COLUMNS = 6, 9


LENGTH = ROWS * COLUMNS
SITE = {"grid": (ROWS, COLUMNS), "seq": LENGTH}


def run(expression, x):
    made = support.holder(expression, **SITE)
    call = jax.jit(lambda x: made(x, mask=Mask()), compiler_options=support.fast())
    return np.asarray(call(jnp.asarray(x)))


def picture(batch=2):
    return support.draw((batch, LENGTH, support.WIDTH), seed=0)


def moved_by(expression):
    """[T,T]: whether what place s holds moves the output of place t."""
    each = np.repeat(picture(batch=1), LENGTH + 1, axis=0)
    each[np.arange(LENGTH), np.arange(LENGTH)] += 1.0
    out = run(expression, each)
    return (np.abs(out[:-1] - out[-1:]) > 1e-6).any(-1).T


def test_pooling_does_not_see_a_constant():
    """Not even at the edges, where fewer places are averaged."""
    x = np.broadcast_to(support.draw((2, 1, 32), seed=0), (2, LENGTH, 32))
    np.testing.assert_allclose(run("pool(size=5)", x), 0, atol=1e-6)


def test_pooling_over_more_than_the_picture_is_the_mean_of_all():
    x = picture()
    expected = x.mean(1, keepdims=True) - x
    np.testing.assert_allclose(run("pool(size=19)", x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("expression", "rows", "columns"),
    [
        ("window(window=3)", [3, 3], [3, 3, 3]),
        ("window(window=3, shift=1)", [1, 3, 2], [1, 3, 3, 2]),
        ("window(window=4)", [4, 2], [4, 4, 1]),
        ("window(window=4, shift=3)", [3, 3], [3, 4, 2]),
        ("window(window=7, shift=3)", [6], [3, 6]),
        ("window(window=9, shift=4)", [6], [9]),
    ],
)
def test_places_see_each_other_in_the_same_window_alone(expression, rows, columns):
    """Swin's figure 2; a window as large as a side is not shifted along it."""
    row, column = (np.repeat(np.arange(len(cuts)), cuts) for cuts in (rows, columns))
    number = (row[:, None] * len(columns) + column[None, :]).ravel()
    np.testing.assert_array_equal(moved_by(expression), number[:, None] == number[None, :])


def test_one_window_without_a_bias_is_softmax_attention():
    """Both have the same parameters, and `holder` draws the same numbers for them."""
    x = picture()
    expected = run("softmax", x)
    got = run("window(window=9, bias='none')", x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_shift_costs_no_window_more():
    costs = [
        attention.cost(f"window(window=3, shift={shift})", support.site(**SITE), LENGTH)
        for shift in (0, 1)
    ]
    assert costs[0] == costs[1]


def test_reduction_by_one_is_softmax_attention():
    x = picture()
    np.testing.assert_allclose(run("spatial_reduction(ratio=1)", x), run("softmax", x), atol=1e-5)


def test_what_no_whole_window_holds_is_not_seen():
    """9 columns make two windows of 4; as in the released code the last column is a query alone."""
    expected = np.eye(LENGTH, dtype=bool).reshape(LENGTH, ROWS, COLUMNS)
    expected[:, :4, :8] = True
    np.testing.assert_array_equal(
        moved_by("spatial_reduction(ratio=4)"), expected.reshape(LENGTH, LENGTH)
    )


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("pool(size=2)", "size=2 must be odd"),
        ("window(shift=7)", r"shift=7 is not in \[0, 7\)"),
        ("window(window=0)", "window must be at least 1, not 0"),
        ("spatial_reduction(ratio=0)", "ratio must be at least 1, not 0"),
        ("spatial_reduction(reduction='mean')", "one of 'convolution', 'pool', not 'mean'"),
    ],
)
def test_what_cannot_be_says_why(expression, message):
    with pytest.raises(UserError, match=message):
        attention.build(expression, support.site(**SITE), needs=(), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("expression", ["pool", "lsra(attention=window)"])
def test_a_sequence_that_is_no_picture_is_refused(expression):
    with pytest.raises(UserError, match="mixes the rows and columns of a picture"):
        attention.build(expression, support.site(), needs=(), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("expression", ["pool", "window", "spatial_reduction"])
def test_a_picture_of_another_size_is_refused(expression):
    with pytest.raises(ValueError, match="50 places, but the mixer was built for 6 x 9"):
        run(expression, picture()[:, :50])


def test_pictures_are_as_square_as_can_be():
    assert [nearly_square(n) for n in (1, 7, 63, 100, 512)] == [
        (1, 1), (1, 7), (7, 9), (10, 10), (16, 32),
    ]  # fmt: skip
