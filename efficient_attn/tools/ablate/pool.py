"""Rows over processes: one row at a time each, a dead process replaced, a signal passed on."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

from efficient_attn.tools.ablate.results import Place
from efficient_attn.tools.ablate.sweep import Scale
from efficient_attn.tools.ablate.worker import Outcome, perform, work
from efficient_attn.train.signals import StopRequest

Task = tuple[int, int]
"""The index of a row, and a seed."""
Told = Callable[[Task, Outcome], None]


def accelerators() -> list[str]:
    """The numbers of the GPUs that this process may use; none on a CPU or a TPU."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    return sorted(p.name.removeprefix("nvidia") for p in Path("/dev").glob("nvidia[0-9]*"))


def run_here(place: Place, tasks: Sequence[Task], told: Told) -> None:
    """Every task in this process, where a debugger reaches it."""
    for index, seed in tasks:
        outcome = perform(place, place.sweep.rows[index], seed)
        told((index, seed), outcome)
        if outcome.kind == "stopped":
            return


@dataclass
class _Worker:
    process: Any
    pipe: connection.Connection
    task: Task | None = None
    began: float = field(default_factory=time.perf_counter)


class Pool:
    """`processes` workers for the tasks of a sweep."""

    def __init__(self, place: Place, spec: str, scale: Scale, processes: int):
        self.place, self.spec, self.scale = place, spec, scale
        self.devices = accelerators()
        self.context = multiprocessing.get_context("spawn")
        self.workers: list[_Worker | None] = [None] * processes

    def run(self, tasks: Sequence[Task], *, told: Told, tick: Callable[[], None]) -> None:
        """Run all tasks, telling of each that ends, or until a signal stops the sweep.

        `tick` is called about once a second.
        """
        waiting = list(tasks)[::-1]
        with StopRequest() as stop:
            try:
                while waiting or any(w and w.task for w in self.workers):
                    if stop.received:
                        self._stop(told, stop)
                        return
                    for slot, worker in enumerate(self.workers):
                        if waiting and (worker is None or worker.task is None):
                            self._give(slot, waiting.pop())
                    self._listen(told, stop)
                    tick()
            finally:
                self._close()

    def busy(self) -> list[tuple[Task, float]]:
        """The tasks at work, and when they began (`time.perf_counter`)."""
        return [(w.task, w.began) for w in self.workers if w and w.task]

    def _give(self, slot: int, task: Task) -> None:
        worker = self.workers[slot]
        if worker is None or not worker.process.is_alive():
            ours, theirs = self.context.Pipe()
            device = self.devices[slot % len(self.devices)] if self.devices else None
            arguments = (theirs, self.spec, self.scale, str(self.place.path), device)
            process = self.context.Process(target=work, args=arguments)
            process.start()
            theirs.close()
            worker = self.workers[slot] = _Worker(process, ours)
        worker.task, worker.began = task, time.perf_counter()
        worker.pipe.send(task)

    def _listen(self, told: Told, stop: StopRequest) -> None:
        """Take in what the workers say within a second, and who of them has died.

        Ctrl-C reaches the workers as well: one that has died of it has not failed.
        """
        pipes = {w.pipe: slot for slot, w in enumerate(self.workers) if w and w.task}
        for pipe in connection.wait(list(pipes), timeout=1.0):
            slot = pipes[pipe]  # type: ignore[index]
            worker = self.workers[slot]
            assert worker is not None and worker.task is not None
            try:
                outcome = worker.pipe.recv()
            except (EOFError, ConnectionError):  # the latter where it died with a task unread
                worker.process.join()
                why = f"the process ended with {_ending(worker.process.exitcode)}"
                outcome = Outcome("stopped") if stop.received else Outcome("failed", why)
                self.workers[slot] = None
            task, worker.task = worker.task, None
            told(task, outcome)

    def _stop(self, told: Told, stop: StopRequest) -> None:
        """Ask the workers to save and stop, and wait until they have."""
        for worker in self.workers:
            if worker and worker.task:
                worker.process.terminate()
        while any(w and w.task for w in self.workers):
            self._listen(told, stop)

    def _close(self) -> None:
        for worker in self.workers:
            if worker:
                worker.pipe.close()
        for worker in self.workers:
            if worker:
                worker.process.join(timeout=10)
                worker.process.kill()


def _ending(code: int) -> str:
    """How a process ended, by its exit code as `multiprocessing` has it."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return name + " (out of memory?)" * (name == "SIGKILL")
