"""Pallas' simulator of a TPU: its memories, filled with NaN, its copies and a detector of races."""

import importlib

import jax
from jax.experimental.pallas import tpu as pltpu

SIMULATOR = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def races_found() -> bool:
    """Whether it has noted a race; jax 0.12 raises where it finds one."""
    if tuple(int(x) for x in jax.__version__.split(".")[:2]) >= (0, 12):
        return False
    home = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    return bool(home.races and home.races.races_found)
