"""How the error of an attention in softmax's place grows through a stack of layers."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.rngs import make_rngs
from efficient_attn.tools.measures.cost import Layers, Layout


def measure(
    *,
    seed: int,
    expression: str,
    depth: int,
    samples: int,
    length: int,
    width: int,
    heads: int,
    mlp_ratio: float,
) -> dict[str, float]:
    """Transformer blocks with softmax, and the same weights with `expression` instead.

    Blocks are normalised first and freshly drawn, as their input, N(0, 1) [1, length, width]; each
    of `samples` draws all of it, and the random features of every layer. (Choromanski et al. 2021,
    arXiv 2009.14794, figure 14.)

    Returns the means over the samples of "output_error", the mean squared difference after `depth`
    blocks, and "relative_error", that over the mean square of softmax's output.

    Raises:
        UserError: an expression that cannot be read, or that has weights of its own.
    """
    layout = Layout("block", length, width, heads, 1, mlp_ratio, 1)
    errors, relative = [], []
    for key in jax.random.split(jax.random.key(seed), samples):
        start, layers = jax.random.split(key)
        exact = jax.random.normal(start, (1, length, width))
        estimate = exact
        for layer in jax.random.split(layers, depth):
            params, _ = drawn("softmax", layout)(layer)
            _, rest = drawn(expression, layout)(layer)
            exact = applied("softmax", layout)(params, {}, exact)
            estimate = applied(expression, layout)(params, rest, estimate)
        error = float(jnp.mean(jnp.square(exact - estimate)))
        errors.append(error)
        relative.append(error / float(jnp.mean(jnp.square(exact))))
    return {
        "output_error": sum(errors) / samples,
        "relative_error": sum(relative) / samples,
    }


@functools.cache
def drawn(expression: str, layout: Layout) -> Callable:
    """key -> (parameters, what is not trained) of one block, compiled."""

    def draw(key):
        layers = Layers(expression, layout, rngs=make_rngs(key))
        return tuple(map(nnx.to_pure_dict, nnx.split(layers, nnx.Param, ...)[1:]))

    return jax.jit(draw)


@functools.cache
def applied(expression: str, layout: Layout) -> Callable:
    """(parameters, what is not trained, x) -> x after one block, compiled."""
    abstract = nnx.eval_shape(lambda: Layers(expression, layout, rngs=make_rngs(0)))
    graph = nnx.split(abstract, nnx.Param, ...)[0]
    return jax.jit(lambda params, rest, x: nnx.merge(graph, params, rest)(x))
