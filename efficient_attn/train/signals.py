"""SIGTERM and Ctrl-C as a wish to stop after the step at hand."""

import signal
import threading
from types import FrameType, TracebackType


class StopRequest:
    """A context manager in which the first SIGTERM or SIGINT only sets `received`.

    A second Ctrl-C interrupts at once. Outside the main thread nothing is caught.
    """

    def __init__(self):
        self.received: str | None = None
        self._old = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
