"""Pallas' simulator of a TPU: its memories, filled with NaN, its copies and a detector of races.

jax 0.12 raises where it finds a race; older ones only print it.
"""

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

pallas = pytest.mark.skipif(
    tuple(int(x) for x in jax.__version__.split(".")[:2]) < (0, 11),
    reason="the fused kernels are tested from jax 0.11 on",
)

SIMULATOR = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
