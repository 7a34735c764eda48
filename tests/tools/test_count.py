"""Multiply-adds of functions whose number is known."""

import jax
import jax.numpy as jnp
import pytest

from efficient_attn.tools.count import multiply_adds

A, B = jnp.ones((3, 4)), jnp.ones((4, 5))
SQUARE = jnp.ones((4, 4))


def looped(x):
    return jax.lax.scan(lambda c, _: (c @ c, None), x, length=7)[0]


def nested(x):
    return jax.lax.scan(lambda c, _: (looped(c), c @ c), x, length=3)


def conv(x, w, groups=1):
    return jax.lax.conv_general_dilated(
        x, w, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups
    )


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        (jnp.matmul, (A, B), 3 * 4 * 5),
        (lambda x: jnp.einsum("bij,bjk->bik", x, x), (jnp.ones((2, 3, 3)),), 2 * 27),
        (lambda x, y: jnp.sin(x) + y, (A, A), 0),
        (looped, (SQUARE,), 7 * 64),
        (nested, (SQUARE,), 3 * (7 + 1) * 64),
        (lambda x: jax.lax.map(lambda r: r @ SQUARE, x), (jnp.ones((6, 2, 4)),), 6 * 2 * 16),
        (jax.jit(jax.checkpoint(looped)), (SQUARE,), 7 * 64),
        (lambda x: jax.lax.cond(x[0, 0] > 0, looped, lambda y: y @ y, x), (SQUARE,), 7 * 64),
        (lambda x: jax.lax.fori_loop(0, 5, lambda _, c: c @ c, x), (SQUARE,), 5 * 64),
        (jax.grad(lambda x: jnp.sum(x @ SQUARE)), (SQUARE,), 2 * 64),
        (conv, (jnp.ones((1, 10, 4)), jnp.ones((3, 4, 6))), 8 * 6 * 3 * 4),
        (lambda x, w: conv(x, w, 4), (jnp.ones((1, 10, 4)), jnp.ones((3, 1, 4))), 8 * 4 * 3),
        (jax.vmap(jnp.matmul), (jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5))), 2 * 60),
    ],
)
def test_the_number_is_the_known_one(function, arguments, expected):
    assert multiply_adds(function, *arguments) == expected


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="cannot count a while loop"):
        multiply_adds(
            lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c @ c, x), SQUARE
        )
