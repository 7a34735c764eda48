"""Progress of what takes more than a moment: a bar on a terminal, now and then a line in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

SECONDS_PER_LINE = 5.0


def track(items: Iterable[T], *, total: int, text: str) -> Iterator[T]:
    """The same items; how many of `total` have gone by is shown on standard error."""
    if sys.stderr.isatty():
        import rich.console
        import rich.progress

        console = rich.console.Console(stderr=True)
        yield from rich.progress.track(
            items, description=text, total=total, console=console, transient=True
        )
        return
    last = time.monotonic()
    for done, item in enumerate(items):
        yield item
        if time.monotonic() - last > SECONDS_PER_LINE:
            print(f"{text}: {done + 1}/{total}", file=sys.stderr, flush=True)
            last = time.monotonic()
