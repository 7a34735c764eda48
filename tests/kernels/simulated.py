"""Pallas' simulator of a TPU: its memories, filled with NaN, its copies and a detector of races.

jax 0.12 raises where it finds a race; older ones only print it.
"""

from jax.experimental.pallas import tpu as pltpu

SIMULATOR = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
