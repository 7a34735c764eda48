"""Hopper's kernels in the interpreter that looks for races.

Test modules that import this are skipped where jax has none, and import `no_races` for its effect.
"""

import jax
import pytest

if tuple(int(n) for n in jax.__version__.split(".")[:3]) < (0, 11, 2):
    pytest.skip("GPU kernels are interpreted from jax 0.11.2 on", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu  # noqa: E402

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)


@pytest.fixture(autouse=True)
def no_races(capfd):
    """jax 0.11.2 prints them only."""
    yield
    assert "RACE DETECTED" not in "".join(capfd.readouterr())
