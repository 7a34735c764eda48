"""Where the numbers of a run go: metrics.jsonl, TensorBoard, and the person who waits."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from tensorboardX import SummaryWriter

from efficient_attn.train.task import headline


class Metrics:
    """Writes numbers by step to metrics.jsonl (flushed line by line) and to TensorBoard.

    step: where the run goes on; what TensorBoard has of later ones is dropped.
    """

    def __init__(self, path: Path, tensorboard: Path, *, step: int):
        self._file = path.open("a")
        self._board = SummaryWriter(str(tensorboard), purge_step=step + 1)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """One line; a number that is not finite becomes null, which JSON can hold."""
        line = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what TensorBoard still holds."""
        self._file.close()
        self._board.close()


class Display:
    """What a run says: a progress bar on a terminal, plain lines elsewhere.

    A context manager. `update` is cheap and is called at every step; `log` at every log line.
    """

    def __init__(self, *, steps: int, start: int, batch_size: int, console: Console | None = None):
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._steps, self._batch_size = steps, batch_size
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=start, numbers="compiling")

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        self.console.print(text, markup=False)
        self.console.file.flush()

    def update(self, step: int) -> None:
        """Move the bar."""
        if not self._bar.disable:
            self._bar.update(self._task, completed=step)

    def log(
        self, step: int, metrics: Mapping[str, float], *, speed: float | None, wait: float | None
    ) -> None:
        """Show the metrics of a log line.

        speed: steps per second, None if unknown yet.
        wait: the share of the time in which the loop waited for batches, None as well.
        """
        numbers, eta = headline(metrics), ""
        if speed is not None and wait is not None:
            numbers += f"  {speed:.1f} steps/s  {speed * self._batch_size:.0f} examples/s"
            numbers += f"  input {100 * wait:.1f} %"
            minutes, seconds = divmod(round((self._steps - step) / speed), 60)
            eta = f"  eta {minutes}:{seconds:02d}"
        if self._bar.disable:
            self.say(f"step {step}/{self._steps}  {numbers}{eta}")
        else:
            self._bar.update(self._task, completed=step, numbers=numbers)
