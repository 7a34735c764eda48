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
from tests.support import EXPRESSIONS, WIDTH, choice, draw_x, holder

LINEARS = 4 * (32 * 32 + 32)
PARAMETERS = {
    "softmax": LINEARS,
    "softmax(kv_heads=2)": 2 * (32 * 32 + 32) + 2 * (32 * 16 + 16),
    "softmax(kv_heads=1, logit_cap=2.0)": 2 * (32 * 32 + 32) + 2 * (32 * 8 + 8),
    "linformer(rank=8)": LINEARS + 2 * 8 * 100,
    "linformer(rank=8, sharing='none')": LINEARS + 2 * 4 * 8 * 100,
    "linformer(rank=8, sharing='key-value')": LINEARS + 8 * 100,
    "linformer(rank=8, sharing='layerwise')": LINEARS + 8 * 100,
    "linformer(rank=8, projection='mean')": LINEARS,
    "linformer(rank=8, projection='max')": LINEARS,
    "linformer(rank=8, projection='convolution')": LINEARS + 2 * 13 * 8 * 8,
    "performer(features=16)": LINEARS,
    "performer(features=8, feature_map='hyperbolic', projection='iid', redraw=5)": LINEARS,
    "performer(features=64, feature_map='trigonometric', projection='regularised')": LINEARS,
    "performer(features=16, feature_map='relu')": LINEARS,
    "performer(feature_map='elu', projection='none')": LINEARS,
    # half-width attention; enter 16 -> 32; predict 16 -> 4 heads x 7 taps; leave 16 -> 16
    "lsra(kernel=7)": 4 * (256 + 16) + (512 + 32) + 16 * 28 + (256 + 16),
    "lsra(kernel=4, conv='lightweight', gate='linear')": 6 * (256 + 16) + 4 * 4,
    "lsra(kernel=(3, 31), attention=performer(features=16))": 4 * 272 + 544 + 16 * 12 + 272,
    "lsra(attention=linformer(rank=8))": 4 * 272 + 2 * 8 * 100 + 544 + 16 * 12 + 272,
}
TAPS = {
    "lsra(kernel=7)": 7,
    "lsra(kernel=4, conv='lightweight', gate='linear')": 4,
    "lsra(kernel=(3, 31), attention=performer(features=16))": 3,
    "lsra(attention=linformer(rank=8))": 3,
}


def forward(module, *, causal=False):
    return lambda x: module(x, mask=Mask(causal=causal))


def shape(length, batch=1):
    return jax.ShapeDtypeStruct((batch, length, WIDTH), jnp.float32)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_parameters_are_as_many_as_recorded(expression):
    leaves = jax.tree.leaves(nnx.state(holder(expression), nnx.Param))
    assert sum(leaf.size for leaf in leaves) == PARAMETERS[expression]


@pytest.mark.parametrize("length", [1, 13, 63, 100])
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_multiply_adds_are_those_of_cost(expression, length):
    """Exactly; the taps of a convolution by shifts are elementwise and not in the count."""
    counted = multiply_adds(forward(holder(expression)), shape(length))
    expected = attention.cost(expression, support.site(), length).multiply_adds
    expected -= length * TAPS.get(expression, 0) * WIDTH // 2
    if "convolution" in expression:  # whole windows: `length` rounded up to a multiple of 13
        more = -length % 13 * 2 * WIDTH * (WIDTH // support.HEADS)
        fewer = (8 - -(-length // 13)) * 2 * length * WIDTH
        expected += more - fewer
    elif (
        "'mean'" in expression or "'max'" in expression
    ):  # only as many windows as there are tokens
        expected -= (8 - -(-length // 13)) * 2 * length * WIDTH
    assert counted == expected


@pytest.mark.parametrize("expression", [e for e in support.those_with("causal") if "perf" in e])
def test_causal_chunks_cost_their_square_and_no_more(expression):
    length, chunk = 256, 128
    counted = multiply_adds(forward(holder(expression), causal=True), shape(length))
    said = attention.cost(expression, support.site(), length).multiply_adds
    inner = choice(expression).config
    width, features = (16, 16) if expression.startswith("lsra") else (32, inner.features or 8)
    features *= 2 if getattr(inner, "feature_map", "") in ("hyperbolic", "trigonometric") else 1
    within = length * chunk * (support.HEADS * (features + 1) + width)
    taps = length * TAPS.get(expression, 0) * WIDTH // 2
    assert counted == said - taps + within


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_compiled_memory_grows_linearly(expression):
    """XLA's own analysis of what the forward pass holds, at T and 2 T."""
    long = 2048
    module = holder(expression, seq=long)
    lengths = (long // 2, long)
    costs = [attention.cost(expression, support.site(seq=long), t).multiply_adds for t in lengths]
    held = []
    for t in lengths:
        compiled = jax.jit(forward(module)).lower(shape(t)).compile()
        held.append(compiled.memory_analysis().temp_size_in_bytes)
    assert held[1] < 2.1 * held[0], held  # softmax too: it goes through its queries in chunks
    if costs[1] < 2.01 * costs[0]:
        assert held[1] < 100 * long * WIDTH * 4, held


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_equal_models_and_shapes_are_traced_once(expression):
    traces = []

    def call(graph, state, x):
        traces.append(1)
        return nnx.merge(graph, state)(x, mask=Mask())

    call = jax.jit(call, static_argnums=0)
    for _ in range(2):  # made anew: nothing static may tell one from the other
        graph, state = nnx.split(support.abstract(expression))
        call.trace(graph, state, shape(7))
    assert len(traces) == 1


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_split_and_merge_lose_nothing(expression):
    x = draw_x(expression, 7)
    module = holder(expression)
    whole = jax.jit(lambda x: module(x, mask=Mask()), compiler_options=support.fast())(x)
    graph, state = nnx.split(module)
    again_graph, again = nnx.split(nnx.merge(graph, state))
    assert again_graph == graph
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    merged = support.run(expression, x).out
    np.testing.assert_allclose(whole, merged, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_module_is_a_tree(expression):
    """Tree mode (FLIP 5310): no shared references, nothing changed by a call."""
    module = holder(expression)
    graph, state = nnx.split(module, graph=False)
    merged = nnx.merge(graph, state)
    x = shape(7)
    out = jax.eval_shape(lambda m, x: m(x, mask=Mask()), merged, x)
    assert out.shape == x.shape
