"""How kernels for Hopper are called."""

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu


def launch(body, *arrays, interpret, **options):
    """`plgpu.kernel(body, **options)` on the arrays, on the chip or where `interpret` says.

    Inside `jax.shard_map` what it gives varies over every axis of the mesh that an array does, of
    which jax knows only when it is told.
    """
    if interpret is not None:
        options["interpret"] = interpret
    made = plgpu.kernel(body, **options)(*arrays)
    axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))
    if not axes:
        return made
    return jax.tree.map(lambda a: lax.pcast(a, tuple(sorted(axes)), to="varying"), made)
