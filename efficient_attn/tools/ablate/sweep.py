"""What an ablation is, as data: rows, columns, the paper's numbers and claims, the picture."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

from efficient_attn.config import require

if TYPE_CHECKING:
    from efficient_attn.tools.ablate.results import Results

Scale = Literal["smoke", "small", "paper"]
SCALES: tuple[Scale, ...] = ("smoke", "small", "paper")
Metrics = Mapping[str, Any]
"""Numbers by name; a list of numbers is a curve."""
Number = int | float
Row = tuple[str, Mapping[str, Any]]
"""A label and what the row overrides."""


class Cost(NamedTuple):
    """Of a row before it is run: trained parameters, and the multiply-adds of all its steps."""

    parameters: int
    multiply_adds: int


@runtime_checkable
class Runner(Protocol):
    """How a row gets its numbers: `Training` or `Measuring`."""

    def identity(self, overrides: Mapping[str, Any]) -> Mapping[str, Any]:
        """All that decides the result beside the seed, as JSON has it."""
        ...

    def cost(self, overrides: Mapping[str, Any]) -> Cost | None:
        """What a row will cost; None where that cannot be told."""
        ...

    def __call__(self, overrides: Mapping[str, Any], *, seed: int, path: Path) -> Metrics | None:
        """The numbers of a row, its files below `path`; None when a signal stopped it."""
        ...


@dataclass(frozen=True)
class Column:
    """A metric as the table shows it: multiplied by `factor`, with `digits` significant digits."""

    metric: str
    heading: str
    factor: Number = 1
    digits: int = 4

    def show(self, value: Number) -> str:
        """The number in the table's unit: no exponent, thousands apart."""
        value = value * self.factor
        if value == int(value) and abs(value) < 1e15:
            return f"{int(value):,}"
        text = f"{value:.{self.digits}g}"
        return text if "e" not in text else f"{value:,.0f}" if abs(value) >= 1 else text


@dataclass(frozen=True)
class Claim:
    """What the paper says of its table, as a predicate on ours: an ordering, a slope."""

    text: str
    holds: "Callable[[Results], bool]"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One set of axes of the picture.

    x, y: an option that the rows override, or a metric, against a metric; x="label" draws bars.
    by: options whose values make one line each; none makes one line of all rows.
    line: a metric drawn as a line beside the points of y, such as a closed form.
    log: "x", "y", "xy" or "".
    where: options that the panel's rows have.
    points: with x="label" points in place of bars, and the axis begins near them, not at 0.
    draw: draws instead of all that, on matplotlib axes.
    """

    x: str = "label"
    y: str = ""
    by: Sequence[str] = ()
    line: str = ""
    log: str = ""
    where: Mapping[str, Any] = field(default_factory=dict)
    points: bool = False
    xlabel: str = ""
    ylabel: str = ""
    title: str = ""
    draw: "Callable[[Results, Any], None] | None" = None


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A paper's table or figure, to be run again.

    title, source: what it is, and where it stands: paper, arXiv number, table.
    rows: (label, overrides); the label of an attention row is the expression itself.
    runner: `Training(config)` or `Measuring(function)`.
    columns: the metrics of the table.
    published: by label, then by metric, in the metric's own unit (before `factor`).
    claims: judged when all rows have results, and not at scale "smoke".
    grid: two options; the first column is then also shown as a table of one over the other.
    equal_parameters: the most by which parameters of a row may differ from the first row's, such
        as 0.1; a row that differs more is not run. None allows any.
    note: what a reader should know: what differs from the paper.
    """

    title: str
    source: str
    rows: Sequence[Row]
    runner: Runner
    columns: Sequence[Column]
    published: Mapping[str, Mapping[str, Number]] = field(default_factory=dict)
    claims: Sequence[Claim] = ()
    panels: Sequence[Panel] = ()
    grid: tuple[str, str] | None = None
    equal_parameters: float | None = None
    note: str = ""

    def __post_init__(self):
        labels = [label for label, _ in self.rows]
        require(bool(labels), f"the sweep {self.title!r} has no rows")
        twice = sorted({label for label in labels if labels.count(label) > 1})
        require(not twice, f"the sweep {self.title!r} has several rows {', '.join(twice)}")
        strange = sorted(set(self.published) - set(labels))
        require(not strange, f"published numbers of no row: {', '.join(strange)}")


def attentions(*expressions: str) -> list[Row]:
    """A row for each attention expression, labelled by itself."""
    return [(expression, {"attention": expression}) for expression in expressions]


def published_of(
    rows: Sequence[Row], metric: str, values: Mapping[str, Number]
) -> dict[str, dict[str, Number]]:
    """`Sweep.published` of one metric, for the rows that there are: a smaller scale has fewer."""
    labels = {label for label, _ in rows}
    return {label: {metric: value} for label, value in values.items() if label in labels}
