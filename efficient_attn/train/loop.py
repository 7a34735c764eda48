"""The training loop: one for every task, backbone and mechanism.

The device is waited for at log lines and evaluations only. Whatever decides the rest of the run is
in the checkpoint, so a run that was killed at any moment ends with the numbers of one that was not.
"""

import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from efficient_attn import data
from efficient_attn.data.loader import train_batches
from efficient_attn.errors import UserError
from efficient_attn.evals.predict import evaluate
from efficient_attn.train import optimizers
from efficient_attn.train import teacher as teachers
from efficient_attn.train.checkpoint import Checkpoints, full_disk_is_told
from efficient_attn.train.config import Experiment, to_dict, traced
from efficient_attn.train.curves import draw
from efficient_attn.train.logs import Display, Metrics
from efficient_attn.train.program import Batch, Program, build, complete, to_host
from efficient_attn.train.result import describe, provenance
from efficient_attn.train.signals import StopRequest
from efficient_attn.train.task import derived, headline, score
from efficient_attn.train.tracing import Tracer
from efficient_attn.train.workdir import Workdir, read_json, write_json


def train(
    experiment: Experiment,
    path: str | Path,
    *,
    replace: bool = False,
    console: Console | None = None,
    dataset: data.Dataset | None = None,
) -> dict[str, Any] | None:
    """Train, or go on training, in the directory `path`; the content of its result.json.

    None when a signal stopped the run. A finished run is left as it is.

    dataset: that of `experiment.data`, where it has been loaded before.

    Raises:
        UserError: what the config, the directory, the data or the disk does not allow; a loss that
            is not finite.
    """
    experiment = complete(experiment)
    workdir = Workdir(path)
    workdir.check(to_dict(experiment), replace=replace)
    console = console or Console(highlight=False, soft_wrap=True)
    if workdir.result.exists() and not replace:
        console.print(f"this run is finished: {workdir.result}", markup=False)
        return read_json(workdir.result)
    dataset = dataset or data.load(experiment.data)
    program = build(experiment, dataset, teacher=teachers.load(experiment, dataset.info))
    with full_disk_is_told(workdir.path), workdir.hold():
        moved = workdir.start(to_dict(experiment), replace=replace)
        if moved:
            console.print(f"the run that was here is now in {moved}", markup=False)
        with StopRequest() as stop:
            loop = Loop(experiment, workdir, program, dataset, console)
            try:
                done = loop.run(stop)
                return loop.finish() if done else None
            finally:
                loop.close()


class Loop:
    """One run on its way: the state, the position in the data, and where the numbers go."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: Workdir,
        program: Program,
        dataset: data.Dataset,
        console: Console,
    ):
        self.experiment, self.options = experiment, experiment.train
        self.workdir, self.program, self.dataset = workdir, program, dataset
        self.batches = train_batches(
            dataset.splits["train"],
            batch_size=experiment.data.batch_size,
            seed=experiment.seed,
            repeats=experiment.data.augment.repeats,
        )
        self.score = score(dataset.info)
        self.checkpoints = Checkpoints(
            workdir.checkpoints, score=self.score, keep_last=self.options.keep_last
        )
        self.best: dict[str, Any] | None = None
        self.validation: dict[str, float] | None = None
        self.warned = False
        self._newest: Any = None  # of the steps asked for, an array that it makes
        self.tracer = Tracer(traced(experiment), workdir.profile)
        self._began = time.perf_counter()
        notes = self._restore_or_init()
        self.metrics = Metrics(workdir.metrics, workdir.tensorboard, step=self.step)
        self.display = Display(
            steps=self.options.steps,
            start=self.step,
            batch_size=experiment.data.batch_size,
            console=console,
        )
        self.display.say(describe(experiment, program, dataset))
        examples, size = len(dataset.splits["train"]), experiment.data.batch_size
        if examples < size:
            notes.append(f"the {examples} training examples are fewer than data.batch_size={size}")
        if experiment.profile and self.step >= self.tracer.steps[-1]:
            notes.append(f"profile={experiment.profile!r} is behind, nothing will be traced")
        for note in notes:
            self.display.say(note)

    def _restore_or_init(self) -> list[str]:
        found = self.checkpoints.restore_newest(self.program.abstract, self.batches)
        if found is None:
            self.step, self.state = 0, self.program.init()
            self.workdir.keep_metrics(lambda line: False)
            return []
        self.step, self.state, record, notes = found
        self.best = record["best"]
        self._began -= record["seconds"]
        self.workdir.keep_metrics(lambda line: line["step"] <= self.step)
        return [*notes, f"going on from step {self.step}"]

    def run(self, stop: StopRequest) -> bool:
        """Train to the last step; False when a signal asked to stop before."""
        options, first = self.options, self.step + 1
        with self.display:
            self._start_lap()
            for step in range(first, options.steps + 1):
                with self.tracer.step(step):
                    batch = self._next_batch()
                    self.state, metrics = self.program.step(self.state, batch)
                self.step, self._newest = step, metrics["loss"]
                self.display.update(step)
                if step == first:
                    self._first_step(metrics)
                if self.tracer.done(step, metrics):
                    self.display.say(f"traced steps {self.experiment.profile}: {self.tracer.path}")
                if self._due(options.log_every):
                    self._log(to_host(metrics))
                if options.diagnostics and step % options.diagnostics == 0:
                    self._diagnose(batch)
                evaluated = self._due(options.eval_every)
                if evaluated:
                    self._evaluate()
                stopping = stop.received and step < options.steps
                if evaluated or stopping or self._due(options.checkpoint_every):
                    self._save(self.validation if evaluated else None)
                if stopping:
                    self._say_stopped(stop)
                    return False
        return True

    def finish(self) -> dict[str, Any]:
        """Evaluate on test, write result.json and curves.png."""
        if self.validation is None:
            self.validation = self._measure("validation")
        test = self._measure("test")
        draw(self.workdir.metrics, self.workdir.curves, title=self.experiment.attention)
        result = {
            "test": test,
            "validation": self.validation,
            "best": self.best,
            "steps": self.step,
            "seconds": round(self._seconds(), 3),
            **provenance(self.experiment, self.program),
        }
        self.checkpoints.wait()
        write_json(self.workdir.result, result)
        self.display.say(
            f"test {headline(test) if test else 'is empty'}  after {self.step} steps, "
            f"{self._seconds():.0f} s: {self.workdir.result}"
        )
        return result

    def close(self) -> None:
        """Wait for what is being written, and let go of all files."""
        self.tracer.close()
        self.metrics.close()
        self.checkpoints.close()

    def _due(self, every: int) -> bool:
        last = every > 0 and self.step == self.options.steps
        return last or (every > 0 and self.step % every == 0)

    def _start_lap(self) -> None:
        self._lap, self._waited = (self.step, time.perf_counter()), 0.0

    def _next_batch(self) -> Batch:
        """Only while no step runs is the wait for a batch lost: jax lets this loop run ahead."""
        began = time.perf_counter()
        with jax.profiler.TraceAnnotation("input"):
            batch = next(self.batches)
        if self._newest is None or self._newest.is_ready():
            self._waited += time.perf_counter() - began
        return batch

    def _seconds(self) -> float:
        return time.perf_counter() - self._began

    def _first_step(self, metrics: dict[str, jax.Array]) -> None:
        jax.block_until_ready(metrics)
        self.display.say(f"first step after {time.perf_counter() - self._lap[1]:.1f} s")
        self._start_lap()

    def _log(self, metrics: dict[str, float]) -> None:
        self._check_finite(int(metrics.pop("first_bad")))
        metrics |= derived(metrics["loss"], self.dataset.info)
        lap_step, lap_time = self._lap
        now = time.perf_counter()
        numbers = {f"train/{name}": value for name, value in metrics.items()}
        numbers["seconds"] = self._seconds()
        speed = wait = None
        if self.step > lap_step:  # else it is the first step, whose time was the compiler's
            lap = max(now - lap_time, 1e-9)
            speed, wait = (self.step - lap_step) / lap, self._waited / lap
            numbers["steps_per_second"] = speed
            numbers["examples_per_second"] = speed * self.experiment.data.batch_size
            numbers["input_wait"] = self._waited / lap
        self.metrics.write(self.step, numbers)
        self.display.log(self.step, metrics, speed=speed, wait=wait)
        self._start_lap()

    def _check_finite(self, first_bad: int) -> None:
        if first_bad < 0:
            return
        schedule = optimizers.schedule(self.experiment.optimizer, steps=self.options.steps)
        rate = jnp.asarray(schedule(first_bad - 1)).item()
        self.checkpoints.wait()
        kept = self.checkpoints.steps()
        good = f"the checkpoint of step {kept[-1]} is kept" if kept else "nothing was saved before"
        raise UserError(
            f"the loss or its gradient became NaN or infinite at step {first_bad} (learning rate "
            f"{rate:.3g}); {good}; lower optimizer.learning_rate, lengthen "
            "optimizer.warmup or set optimizer.clip"
        )

    def _measure(self, split: str) -> dict[str, float] | None:
        source = self.dataset.splits[split]
        if len(source) == 0:
            return None
        size = self.options.eval_batch_size
        return evaluate(self.program, self.state, source, self.dataset.info, batch_size=size)

    def _evaluate(self) -> None:
        self._check_finite(int(self.state["first_bad"]))
        self.validation = self._measure("validation")
        if self.validation is not None:
            found = self.validation
            self.metrics.write(self.step, {f"validation/{k}": v for k, v in found.items()})
            self.display.say(f"step {self.step}/{self.options.steps}  validation {headline(found)}")
            better = self.best is None or self.score(found) >= self.score(self.best["validation"])
            if better and math.isfinite(found["loss"]):
                self.best = {"step": self.step, "validation": found}
        self._start_lap()

    def _save(self, validation: dict[str, float] | None) -> None:
        self._check_finite(int(self.state["first_bad"]))
        record = {"best": self.best, "seconds": self._seconds()}
        self.checkpoints.save(
            self.step, self.state, self.batches, record=record, metrics=validation
        )
        self._start_lap()

    def _diagnose(self, batch: Batch) -> None:
        found = self.program.diagnose(self.state, batch)
        self.metrics.write(self.step, {f"diagnostics/{name}": v for name, v in found.items()})
        collapsed = [name for name, value in found.items() if "collapsed" in name and value]
        if collapsed and not self.warned:
            self.warned = True
            self.display.say(
                f"warning: step {self.step}: an attention estimate has collapsed, see diagnostics "
                f"in {self.workdir.metrics.name}: {', '.join(collapsed)}"
            )

    def _say_stopped(self, stop: StopRequest) -> None:
        self.checkpoints.wait()
        self.display.say(
            f"{stop.received}: stopped and saved at step {self.step}/{self.options.steps}; "
            "run the same command again to go on"
        )
