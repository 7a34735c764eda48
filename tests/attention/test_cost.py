"""Parameters, multiply-adds, memory and traces of every mechanism, all deterministic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import attention
from efficient_attn.tools.count import multiply_adds
from kernels import Mask
from tests import support
from tests.support import EXPRESSIONS, WIDTH, choice, draw_x, holder, place, plain

FIRSTS_AND_SLOWLY_THE_OTHERS = [
    pytest.param(e, marks=() if e in support.FIRSTS else pytest.mark.slow) for e in EXPRESSIONS
]


def forward(module, mask):
    return lambda x: module(x, mask=mask)


def uncounted(expression, length):
    module = support.MECHANISMS[choice(expression).name]
    return (
        module.uncounted(choice(expression).config, length) if hasattr(module, "uncounted") else 0
    )


def shape(length, batch=1):
    return jax.ShapeDtypeStruct((batch, length, WIDTH), jnp.float32)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_parameters_are_as_many_as_recorded(expression):
    leaves = jax.tree.leaves(nnx.state(holder(expression), nnx.Param))
    assert sum(leaf.size for leaf in leaves) == support.PARAMETERS[expression]


CHUNKED = [e for e in support.FIRSTS if e.startswith(("linear", "performer", "cosformer"))]
"""Their chunks are longer than the tests' sequences: 512 tokens, 128 where they are causal."""


@pytest.mark.parametrize(
    ("expression", "length"),
    [(e, t) for e in EXPRESSIONS for t in (1, 13, 63, 100)]
    + [(e, t) for e in CHUNKED for t in (129, 577)],
)
def test_the_multiply_adds_are_those_of_cost(expression, length):
    """Exactly, but for what a mechanism's file names as `uncounted`."""
    where = place(expression, length)
    counted = multiply_adds(forward(holder(expression, **where), plain(expression)), shape(length))
    said = attention.cost(expression, support.site(**where), length).multiply_adds
    assert counted == said - uncounted(expression, length)


@pytest.mark.parametrize("expression", [e for e in support.those_with("causal") if "perf" in e])
def test_causal_chunks_cost_their_square_and_no_more(expression):
    length, chunk = 256, 128
    counted = multiply_adds(forward(holder(expression), Mask(causal=True)), shape(length))
    said = attention.cost(expression, support.site(), length).multiply_adds
    inner = choice(expression).config
    width, features = (16, 16) if expression.startswith("lsra") else (32, inner.features or 8)
    features *= 2 if getattr(inner, "feature_map", "") in ("hyperbolic", "trigonometric") else 1
    within = length * chunk * (support.HEADS * features + width)
    assert counted == said - uncounted(expression, length) + within


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("expression", CHUNKED)
def test_a_token_more_than_a_chunk_is_not_a_chunk_more(expression, causal):
    call, chunk = forward(holder(expression), Mask(causal=causal)), 128 if causal else 512
    counts = [multiply_adds(call, shape(length)) for length in (chunk, chunk + 1)]
    assert counts[1] < 1.01 * counts[0]


DENSE = "spatial_reduction(ratio="
"""At these lengths its logits, T x T / 4, are few enough to be held at once (`DENSE_LOGITS`)."""


@pytest.mark.parametrize("expression", FIRSTS_AND_SLOWLY_THE_OTHERS)
def test_compiled_memory_grows_linearly(expression):
    """XLA's own analysis of what the forward pass holds, at T and 2 T."""
    long = 2048
    lengths, costs, held = (long // 2, long), [], []
    for t in lengths:
        where = {"seq": long} | place(expression, t)
        costs.append(attention.cost(expression, support.site(**where), t).multiply_adds)
        module = holder(expression, **where)
        compiled = jax.jit(forward(module, plain(expression))).lower(shape(t)).compile()
        held.append(compiled.memory_analysis().temp_size_in_bytes)
    growth = max(2.0, costs[1] / costs[0])  # at most as the work does, and linearly where that does
    growth = 4.0 if expression.startswith(DENSE) else growth
    assert held[1] < 1.05 * growth * held[0], held
    if costs[1] < 2.01 * costs[0]:
        assert held[1] < 100 * long * WIDTH * 4, held


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_equal_models_and_shapes_are_traced_once(expression):
    traces = []

    def call(graph, state, x):
        traces.append(1)
        return nnx.merge(graph, state)(x, mask=plain(expression))

    call = jax.jit(call, static_argnums=0)
    for _ in range(2):  # made anew: nothing static may tell one from the other
        graph, state = nnx.split(support.abstract(expression, **place(expression, 7)))
        call.trace(graph, state, shape(7))
    assert len(traces) == 1


@pytest.mark.parametrize("expression", FIRSTS_AND_SLOWLY_THE_OTHERS)
def test_split_and_merge_lose_nothing(expression):
    x = draw_x(expression, 7)
    module = holder(expression, **place(expression, 7))
    whole = jax.jit(lambda x: module(x, mask=plain(expression)), compiler_options=support.fast())(x)
    graph, state = nnx.split(module)
    again_graph, again = nnx.split(nnx.merge(graph, state))
    assert again_graph == graph
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    merged = support.run(expression, x, causal=plain(expression).causal).out
    np.testing.assert_allclose(whole, merged, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_module_is_a_tree(expression):
    """Tree mode (FLIP 5310): no shared references, nothing changed by a call."""
    module = holder(expression, **place(expression, 7))
    graph, state = nnx.split(module, graph=False)
    merged = nnx.merge(graph, state)
    x = shape(7)
    out = jax.eval_shape(lambda m, x: m(x, mask=plain(expression)), merged, x)
    assert out.shape == x.shape
