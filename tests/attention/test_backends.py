"""`backend="pallas"` reaches the kernels from every mechanism that has them, on simulated chips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.tools import bench
from efficient_attn.train.config import resolve
from efficient_attn.train.program import compile_for, creator
from kernels import Mask, target
from tests import support
from tests.kernels.simulated import pallas

pytestmark = pallas

ON_TPU = (
    "softmax",
    "linformer(rank=8)",
    "local(window=16, pattern='sliding')",
    "performer(features=16)",
    "linear",
    "retention",
    "mamba2",
    pytest.param("gla", marks=pytest.mark.slow),
    pytest.param("gated_delta", marks=pytest.mark.slow),
)
IN_BFLOAT16 = (
    "softmax", "linear", "performer(features=128)", "linformer(rank=64)", "mamba2", "gla",
    "gated_delta", "local(window=64)", "longformer(window=64)",
    *(pytest.param(name, marks=pytest.mark.slow)
      for name in ("cosformer", "retention", "lsra", "performer", "nystrom")),
)  # fmt: skip
LENGTH = 20
CHIPS = [("tpu", "tpu", "tpu_custom_call"), ("hopper", "cuda", "mosaic_gpu")]


def outputs_and_gradient(expression, backend):
    made = support.holder(expression, backend=backend)
    x = jnp.asarray(support.draw_x(expression, LENGTH))
    keys = jnp.asarray(support.ragged_keys(LENGTH))
    causal = "bidirectional" not in support.able(expression)
    cotangent = jnp.asarray(support.draw(x.shape, seed=3)) * keys[..., None]

    def loss(x):
        out = made(x, mask=Mask(causal=causal, keys=keys))
        return jnp.sum(out * cotangent), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(x)
    return np.asarray(out)[np.asarray(keys)], np.asarray(gradient)


@pytest.mark.parametrize("expression", ON_TPU)
def test_a_mechanism_on_a_simulated_tpu_is_what_it_is_in_xla(expression):
    from jax.experimental.pallas import tpu as pltpu

    expected = outputs_and_gradient(expression, "xla")
    with target.use("tpu", interpret=pltpu.InterpretParams()):
        found = outputs_and_gradient(expression, "pallas")
    for a, b in zip(found, expected, strict=True):
        assert support.relative(a, b) < 1e-4


@pytest.mark.parametrize("expression", ["linear", "retention", "gla", "mamba2", "gated_delta"])
def test_a_token_on_a_simulated_tpu_is_what_it_is_in_xla(expression):
    from jax.experimental.pallas import tpu as pltpu

    x = jnp.asarray(support.draw_x(expression, 2))

    def run(backend):
        made = support.holder(expression, backend=backend).mixer

        def one(state, token):
            out, state = made.step(token[0][:, None], state, position=token[1])
            return state, out

        at = jnp.broadcast_to(jnp.arange(2)[:, None], (2, len(x)))
        start = made.init_state(len(x), x.dtype)
        return jax.jit(lambda x: jax.lax.scan(one, start, (jnp.swapaxes(x, 0, 1), at)))(x)

    expected = run("xla")
    with target.use("tpu", interpret=pltpu.InterpretParams()):
        found = run("pallas")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert support.relative(a, b) < 1e-5


def lowered(name: str, expression: str, chip: str, platform: str, *, length: int, batch: int = 1):
    """A training step in bfloat16 with `backend="pallas"`, a sequence to a device, as text."""
    experiment = resolve(
        {
            "model": {"name": name, "depth": 1, "width": 128, "heads": 2},
            "attention": expression,
            "backend": "pallas",
            "data": {"batch_size": batch},
            "train": {"dtype": "bfloat16", "eval_batch_size": batch},
        }
    )
    info = bench.describe(name, length)
    with target.use(chip):
        program = compile_for(creator(experiment, info), experiment, devices=batch)
        traced = program.trace(program.abstract, bench.draw(info, batch, seed=0))
        return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("chip", "platform", "call"), [pytest.param(*CHIPS[0], marks=pytest.mark.slow), CHIPS[1]]
)
@pytest.mark.parametrize("expression", IN_BFLOAT16)
def test_a_training_step_in_bfloat16_runs_kernels(expression, chip, platform, call):
    name = "encoder" if expression.startswith(("linformer", "nystrom")) else "causal_lm"
    assert call in lowered(name, expression, chip, platform, length=128)


@pytest.mark.parametrize(("chip", "platform", "call"), CHIPS)
def test_a_training_step_over_devices_divides_its_kernels(chip, platform, call):
    """Four sequences over four devices: every kernel of the lowered step takes one."""
    step = lowered("encoder", "performer(features=128)", chip, platform, length=64, batch=4)
    results = [line.split("->")[-1] for line in step.splitlines() if call in line and "->" in line]
    assert results and all("tensor<1x" in text and "tensor<4x" not in text for text in results)
