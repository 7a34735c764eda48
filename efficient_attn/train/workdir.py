"""The directory of a run: which run it holds, its metrics, its result."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from efficient_attn.errors import UserError
from efficient_attn.train.config import differences

CONTENT = (
    "config.json", "checkpoints", "damaged", "metrics.jsonl", "tensorboard", "result.json",
    "curves.png", "eval", "profile",
)  # fmt: skip


class Workdir:
    """The files of one run below `path`:

    config.json    the config, whole
    checkpoints/   by step; damaged/ holds those that could not be read
    metrics.jsonl  one line per log or evaluation
    tensorboard/   the same for TensorBoard
    result.json    written last: its presence says that the run is finished
    curves.png     loss and accuracy
    profile/       traces of the steps that config.profile names
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser().absolute()
        self.config = self.path / "config.json"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.result = self.path / "result.json"
        self.curves = self.path / "curves.png"
        self.profile = self.path / "profile"

    def holds_run(self) -> bool:
        """Whether there is something here to lose: a checkpoint or a result."""
        saved = any(p.name.isdigit() for p in _entries(self.checkpoints))
        return saved or self.result.exists()

    def check(self, config: Mapping[str, Any], *, replace: bool) -> None:
        """Refuse a directory that is not this run's, before anything is done; changes nothing.

        Raises:
            UserError: another config's run is here, unless `replace`; it is no directory, nor can
                it be one.
        """
        there = next(path for path in (self.path, *self.path.parents) if path.exists())
        if not there.is_dir():
            raise UserError(f"--workdir={self.path}: {there} is a file; name a directory")
        if replace or not self.holds_run():
            return
        if not self.config.exists():
            raise UserError(
                f"{self.path} holds a run but no config.json; choose another --workdir, or "
                "move it aside with --replace"
            )
        changed = differences(read_json(self.config), config)
        if changed:
            lines = [f"  {key}: {old!r} there, {new!r} now" for key, old, new in changed]
            raise UserError(
                f"{self.path} holds the run of another config; choose another --workdir, or move "
                "that run aside with --replace:\n" + "\n".join(lines)
            )

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Make the directory, and keep other processes from training in it.

        Raises:
            UserError: it cannot be made, or another process holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise UserError(f"--workdir={self.path} cannot be made: {error.strerror}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is training in {self.path}; wait for it, or choose another "
                    "--workdir"
                ) from None
            yield

    def start(self, config: Mapping[str, Any], *, replace: bool) -> Path | None:
        """Make the directory ready for this run, once the config is known to be good.

        With `replace`, the run that is here moves to replaced-N inside it, which is returned.
        """
        moved = self._move_aside() if replace else None
        if not self.holds_run():
            self.metrics.unlink(missing_ok=True)
        write_json(self.config, config)
        return moved

    def _move_aside(self) -> Path | None:
        old = [self.path / name for name in CONTENT if (self.path / name).exists()]
        if not old:
            return None
        numbers = [int(p.name[9:]) for p in self.path.glob("replaced-*") if p.name[9:].isdigit()]
        place = self.path / f"replaced-{max(numbers, default=0) + 1}"
        place.mkdir()
        for entry in old:
            shutil.move(entry, place / entry.name)
        return place

    def keep_metrics(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the lines of metrics.jsonl that `keep` refuses, and one that was cut short."""
        if self.metrics.exists():
            lines = [line for line in read_lines(self.metrics) if keep(line)]
            _write(self.metrics, "".join(json.dumps(line) + "\n" for line in lines))


def _entries(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else []


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file; a last one that is cut short is left out."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
