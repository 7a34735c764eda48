"""Who sees whom, and how much: read off what a mechanism puts out, whatever is inside it."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from efficient_attn import attention
from efficient_attn.attention import Core, Mixer, Site
from efficient_attn.config import require
from kernels import Mask


def weights(
    expression: str, q: Float[Array, "T H D"], k: Float[Array, "S H D"], *, causal: bool = False
) -> Float[np.ndarray, "H T S"]:
    """The matrix that a core multiplies the values by: its outputs for values of 0 and one 1.

    Raises:
        UserError: an unknown mechanism, or one that is no core between projections.
    """
    (choice,) = attention.pattern(expression, 1)
    length, heads, dim = k.shape
    require(issubclass(choice.mechanism, Core), f"{choice} is no core that takes queries and keys")
    site = Site(width=heads * dim, heads=heads, seq=length)
    core = choice.mechanism(choice.config, site, rngs=nnx.Rngs(0), shared={})  # type: ignore[call-arg]
    graph, state = nnx.split(core)

    @jax.jit
    def call(state, v):
        core = nnx.merge(graph, state)
        return core(q[None], k[None], v[None], mask=Mask(causal=causal), shared={})[0]

    ones = np.pad(np.eye(length, dtype=np.float32), [(0, 0), (0, -length % dim)])
    parts = [
        call(state, jnp.broadcast_to(part[:, None], k.shape))
        for part in np.split(ones, ones.shape[1] // dim, axis=1)
    ]
    return np.concatenate(parts, axis=-1)[..., :length].transpose(1, 0, 2)


def influence(
    expression: str,
    length: int,
    *,
    causal: bool = False,
    grid: tuple[int, int] | None = None,
    seed: int = 0,
) -> Float[np.ndarray, "T T"]:
    """`gradients` of a new layer of `expression`, of width 32 and 2 heads, on normal inputs."""
    site = Site(width=32, heads=2, seq=length, grid=grid)
    shared: dict[str, nnx.Module] = {}
    mixer = attention.build(expression, site, needs=(), rngs=nnx.Rngs(seed), shared=shared)
    x = jax.random.normal(jax.random.key(seed), (length, site.width))
    return gradients(mixed(mixer, shared, causal=causal), x)


def mixed(
    mixer: Mixer, shared: dict[str, nnx.Module], *, causal: bool = False
) -> Callable[[Float[Array, "T E"]], Float[Array, "T E"]]:
    """The mixer on one sequence."""
    graph, state = nnx.split((mixer, nnx.Dict(shared)))

    def call(x):
        mixer, modules = nnx.merge(graph, state)
        return mixer(x[None], mask=Mask(causal=causal), shared=modules)[0]

    return call


def gradients(
    function: Callable[[Float[Array, "T E"]], Float[Array, "T E"]],
    x: Float[Array, "T E"],
    *,
    channels: Sequence[int] | None = None,
) -> Float[np.ndarray, "T T"]:
    """How much output t moves with input s: |d <u, y_t> / d x_s|, u a random direction.

    u lies in `channels`, or anywhere. Exactly 0 where s has no say in t.
    """
    width = jax.eval_shape(function, x).shape[1]
    there = np.arange(width) if channels is None else np.asarray(channels)
    u = np.zeros(width, np.float32)
    u[there] = np.random.default_rng(0).standard_normal(len(there))

    @jax.jit
    def moves(x):
        _, back = jax.vjp(function, x)
        return jax.vmap(lambda at: back(at[:, None] * u[None])[0])(jnp.eye(len(x)))

    return np.linalg.norm(np.asarray(moves(x)), axis=-1)
