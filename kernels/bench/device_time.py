"""How long a device works on a call: by its profiler where there is one, else by the clock.

jax's profiler writes what ran on a device and when (on NVIDIA from CUPTI); the time of a batch of
calls is how long the device was busy. Without it, calls are enqueued one after the other between
two points that block: what the host takes to enqueue them counts where the device is faster.
"""

import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from kernels.bench.rivals import package

SAMPLES, SECONDS, MOST = 7, 0.1, 50
"""Batches of calls; what one is to take, as far as `MOST` calls allow."""
LANES = {"gpu": "Stream", "tpu": "XLA Modules"}
"""Whose events are the device's work, in a trace: threads whose names begin so."""
Call = Callable[..., Any]


class Timer(NamedTuple):
    """how: in words. platform: that of jax's first device."""

    how: str
    platform: str

    def __call__(self, call: Call, sets: Sequence[Sequence[Any]], *, torch: bool) -> dict[str, Any]:
        """Milliseconds of a call: median, least and most over `SAMPLES` batches.

        sets: arguments that the calls of a batch take in turn.
        """
        blocked = _torch_blocked if torch else jax.block_until_ready
        for arguments in sets[:2]:
            blocked(call(*arguments))
        once = min(_clocked(call, sets, blocked, 1) for _ in range(2))
        count = max(1, min(MOST, int(SECONDS / max(once, 1e-9))))
        samples = [self._sample(call, sets, blocked, count, torch) for _ in range(SAMPLES)]
        seconds = sorted(s for s, _ in samples)
        return {
            "ms": 1e3 * statistics.median(seconds), "low": 1e3 * seconds[0],
            "high": 1e3 * seconds[-1], "calls": count * SAMPLES, "copies": len(sets),
            "timer": ", ".join(sorted({by for _, by in samples})),
        }  # fmt: skip

    def _sample(self, call, sets, blocked, count: int, torch: bool) -> tuple[float, str]:
        """(seconds a call, by what) of one batch."""
        if self.platform in LANES and not torch:
            busy = _profiled(lambda: _clocked(call, sets, blocked, count), LANES[self.platform])
            if busy > 0:
                return busy / count, "profiler"
        return _clocked(call, sets, blocked, count), "clock"


def timer() -> Timer:
    """The one for the device at hand."""
    platform = jax.devices()[0].platform
    how = "device, by jax.profiler" if platform in LANES else "clock, calls enqueued"
    return Timer(how, platform)


def _torch_blocked(_: Any) -> None:
    package("torch").cuda.synchronize()


def _clocked(call: Call, sets, blocked, count: int) -> float:
    """Seconds a call of `count` enqueued ones."""
    start = time.perf_counter()
    for i in range(count):
        result = call(*sets[i % len(sets)])
    blocked(result)
    return (time.perf_counter() - start) / count


def _profiled(batch: Callable[[], Any], lane: str) -> float:
    """Seconds for which the device is busy with the batch; 0 where the trace does not say."""
    with tempfile.TemporaryDirectory(prefix="bench.") as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            batch()
        finally:
            jax.profiler.stop_trace()
        found = sorted(Path(folder).rglob("*.trace.json.gz"))
        if not found:
            return 0.0
        return busy_seconds(json.loads(gzip.decompress(found[0].read_bytes())), lane)


def busy_seconds(trace: dict[str, Any], lane: str) -> float:
    """Seconds in which at least one event ran on a device's threads whose names begin with `lane`.

    trace: the Chrome trace that jax's profiler writes, times in microseconds.
    """
    events = trace["traceEvents"]
    named = lambda what: {  # noqa: E731
        (e["pid"], e.get("tid")): e["args"]["name"] for e in events if e.get("name") == what
    }
    devices = {pid for (pid, _), name in named("process_name").items() if "/device:" in name}
    lanes = {
        where for where, name in named("thread_name").items()
        if where[0] in devices and name.startswith(lane)
    }  # fmt: skip
    spans = sorted(
        (e["ts"], e["ts"] + e["dur"]) for e in events
        if e.get("ph") == "X" and (e["pid"], e.get("tid")) in lanes
    )  # fmt: skip
    busy, until = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / 1e6
