"""How kernels for Hopper are called."""

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import jaxpr_as_fun


def launch(body, *arrays, interpret, **options):
    """`plgpu.kernel(body, **options)` on the arrays, on the chip or where `interpret` says.

    Inside `jax.shard_map` arrays vary over axes of the mesh. A kernel, which knows of no mesh, is
    traced for arrays that do not; what it gives varies over every axis that one of them does.
    """
    if interpret is not None:
        options["interpret"] = interpret
    kernel = plgpu.kernel(body, **options)
    axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))
    if not axes:
        return kernel(*arrays)
    alike = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
    traced, made = jax.make_jaxpr(kernel, return_shape=True)(*alike)
    flat = [lax.pcast(a, tuple(sorted(axes)), to="varying") for a in jaxpr_as_fun(traced)(*arrays)]
    return jax.tree.unflatten(jax.tree.structure(made), flat)
