"""Traces of a few steps (`config.profile`), which xprof, TensorBoard and Perfetto open."""

from pathlib import Path
from typing import Any

import jax


class Tracer:
    """Traces the given steps into `path`, in plugins/profile/DATE/*.xplane.pb and *.trace.json.gz.

    What the host does is in it, without the calls of Python, which would slow it down; what the
    device does; and by step, "input" where the loop waits for the batch.
    """

    def __init__(self, steps: range, path: Path):
        self.steps, self.path, self.on = steps, path, False

    def step(self, number: int) -> jax.profiler.StepTraceAnnotation:
        """A context for a step, which begins the trace where it is the first of them."""
        if number in self.steps and not self.on:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            jax.profiler.start_trace(self.path, profiler_options=options)
            self.on = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def done(self, number: int, outputs: Any) -> bool:
        """End the trace after the last of the steps, whose outputs are waited for; whether so."""
        if not self.on or number < self.steps[-1]:
            return False
        jax.block_until_ready(outputs)
        self.close()
        return True

    def close(self) -> None:
        """End a trace that is under way."""
        if self.on:
            self.on = False
            jax.profiler.stop_trace()
