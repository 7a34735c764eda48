"""Arrays inside `jax.shard_map`, each of which varies over some axes of the mesh, or none."""

import jax


def alike(arrays):
    """Arrays that vary over the same axes of a mesh: what a custom derivative has to be given.

    The gradient of one that did not vary is summed over the axes added, as jax itself would.
    """
    own = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    every = frozenset().union(*own)
    return [
        jax.lax.pcast(x, tuple(every - axes), to="varying") if every - axes else x
        for x, axes in zip(arrays, own, strict=True)
    ]
