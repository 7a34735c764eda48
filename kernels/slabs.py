"""Arrays of B sequences taken apart into slabs, runs of tokens with all their heads, in a loop."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.linear_chunk import FeatureMap

NUMBERS, FEWEST = 1 << 18, 128
"""Of a slab: a megabyte, which a core's own cache holds; but no fewer tokens."""


def most_tokens(width: int) -> int:
    """Tokens of the largest slab, of `width` numbers each."""
    return max(NUMBERS // width, FEWEST)


def slab_size(length: int, most: int, *, whole: bool = False) -> int:
    """Tokens of a slab, `most` at the most: a divisor of the length if `whole`, or one is near."""
    most = min(length, most)
    divisors = (size for size in range(most, 0 if whole else most // 2, -1) if not length % size)
    return next(divisors, -(-length // -(-length // most)))


def filled(x, size: int):
    """x with zeros after its tokens, up to whole slabs."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))


def like(x, size: int, rows: int = 1):
    """Zeros like a slab of x, and like its positions."""
    return jnp.zeros((rows, size, *x.shape[2:]), x.dtype), jnp.zeros((rows, size), jnp.int32)


def hoisted(features: FeatureMap, x, size: int, rows: int = 1):
    """`features` of a slab as a function of all that they depend on, and what that is beside it."""
    return jax.closure_convert(lambda x, at: features(x, at), *like(x, size, rows))  # one a call


def turns_over(x, size: int) -> tuple[int, Callable, Callable]:
    """(slabs of x, slab -> its sequence, slab -> positions of its tokens [1,C])."""
    each = x.shape[1] // size
    at = lambda i: (i % each * size + jnp.arange(size, dtype=jnp.int32))[None]  # noqa: E731
    return x.shape[0] * each, lambda i: i // each, at


def take(arrays, i, size: int = 1):
    """The ith slab [1,C,...] of arrays [B,T,...], of C = `size` tokens; or the ith of all rows."""

    def one(x):
        wide = x if size == 1 else x.reshape(-1, size, *x.shape[2:])
        return jax.lax.dynamic_slice_in_dim(wide, i, 1)

    return jax.tree.map(one, arrays)


def put(arrays, new, i, size: int = 1):
    """`arrays` with `new` in the place of what `take` takes."""

    def one(x, y):
        wide = x if size == 1 else x.reshape(-1, size, *x.shape[2:])
        return jax.lax.dynamic_update_slice_in_dim(wide, y, i, 0).reshape(x.shape)

    return jax.tree.map(one, arrays, new)


def room(arrays, first: int):
    """Where results will be written, each filled with a number of its own, from `first` on.

    XLA would make one array of equal ones, and copy it.
    """
    leaves, tree = jax.tree.flatten(arrays)
    return tree.unflatten([jnp.full_like(x, first + n) for n, x in enumerate(leaves)])
