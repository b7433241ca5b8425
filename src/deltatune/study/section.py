"""What a report says, before it is drawn: sections of text, tables and figures, as plain values.

Experiments make sections from summaries; a page, a spreadsheet or a terminal shows them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from deltatune.core.errors import ConfigurationError
from deltatune.study.summary import Spread

__all__ = [
    "Bars",
    "Column",
    "Figure",
    "HeatMap",
    "Lines",
    "Listing",
    "Place",
    "Ranks",
    "Scatter",
    "Section",
    "Series",
    "Table",
    "Value",
    "number_of",
]

Value: TypeAlias = str | float | Spread | None


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: stands above it.
        kind: how its values are written: "text"; "score", a fraction times 100 with the standard
            deviation of a `Spread`; "points", a difference of such scores, with its sign;
            "percent", a fraction with three digits; "number", four digits; "count", a whole number.
    """

    title: str
    kind: Literal["text", "score", "points", "percent", "number", "count"] = "text"

    def write(self, value: Value) -> str:
        """Returns a value as text, "93.35 ±0.21"; "-" where there is none."""
        deviation = self.deviation(value)
        return f"{self.mean(value)} ±{deviation}" if deviation else self.mean(value)

    def mean(self, value: Value) -> str:
        """Returns a value, or the mean of its seeds, as text."""
        number = number_of(value)
        if number is None:
            return value if isinstance(value, str) else "-" if value is None else "not a number"
        match self.kind:
            case "score":
                return f"{100 * number:.2f}"
            case "points":
                return f"{100 * number:+.2f}"
            case "percent":
                return f"{100 * number:.3g}%"
            case "count":
                return f"{number:,.0f}"
            case _:
                return f"{number:,.0f}" if 1e4 <= abs(number) < 1e15 else f"{number:.4g}"

    def deviation(self, value: Value) -> str:
        """Returns the standard deviation over the seeds of a score as text; "" where there is
        none.
        """
        if not isinstance(value, Spread) or self.kind not in ("score", "points"):
            return ""
        known = value.deviation is not None and number_of(value) is not None
        return f"{100 * (value.deviation or 0.0):.2f}" if known else ""


def number_of(value: Value) -> float | None:
    """Returns the finite number that a value is, or the mean of its seeds; None for any other."""
    if value is None or isinstance(value, str):
        return None
    number = value.mean if isinstance(value, Spread) else value
    return number if math.isfinite(number) else None


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: stands above it.
        columns: what its rows hold.
        rows: a value for each column, None where there is none.
        averages: numbers of the rows that sum up others; they stay below when a reader sorts.
        note: what must be said below it, "" for nothing.
        best_of: where the highest score is the best: of each row, of each column, or nowhere.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    averages: frozenset[int] = frozenset()
    note: str = ""
    best_of: Literal["row", "column", "nothing"] = "nothing"

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ConfigurationError(
                    f"{self.title}: a row of {len(row)} values under {len(self.columns)} columns:"
                    f" {row}."
                )

    def best_places(self) -> set[tuple[int, int]]:
        """Returns (row, column) of the highest scores as they are written; none of one alone."""
        if self.best_of == "nothing":
            return set()
        scores = [place for place, column in enumerate(self.columns) if column.kind == "score"]
        if self.best_of == "row":
            lines = [[(number, place) for place in scores] for number in range(len(self.rows))]
        else:
            arms = [number for number in range(len(self.rows)) if number not in self.averages]
            lines = [[(number, place) for number in arms] for place in scores]
        found: set[tuple[int, int]] = set()
        for line in lines:
            means = {at: number_of(self.rows[at[0]][at[1]]) for at in line}
            written = {at: round(100 * m, 2) for at, m in means.items() if m is not None}
            if len(written) > 1:
                found |= {at for at, mean in written.items() if mean == max(written.values())}
        return found


@dataclass(frozen=True)
class Series:
    """A line of a figure.

    Attributes:
        name: in the legend.
        points: (x, y), x rising.
        band: (lowest, highest) y at each point; empty for none.
        ringed: numbers of the points with a ring around them.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    band: tuple[tuple[float, float], ...] = ()
    ringed: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.band and len(self.band) != len(self.points):
            raise ConfigurationError(
                f"{self.name}: a band at {len(self.band)} points around a line of"
                f" {len(self.points)}. Give one for each point, or none."
            )


@dataclass(frozen=True)
class Lines:
    """y against x, a line for each series.

    Attributes:
        title, x, y: of the figure and its axes.
        series: the lines.
        logarithmic: whether x is.
    """

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    logarithmic: bool = False


@dataclass(frozen=True)
class Place:
    """A named point of a scatter plot."""

    name: str
    x: float
    y: float


@dataclass(frozen=True)
class Scatter:
    """Named points. The Pareto front is drawn through those of low x and high y.

    Attributes:
        title, x, y: of the figure and its axes.
        places: the points.
        logarithmic: whether x is.
    """

    title: str
    x: str
    y: str
    places: tuple[Place, ...]
    logarithmic: bool = False


@dataclass(frozen=True)
class Bars:
    """Bars beside each other, each piled up of named parts.

    Attributes:
        title, y: of the figure and its axis.
        bars: name of a bar -> name of a part -> its height.
    """

    title: str
    y: str
    bars: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class HeatMap:
    """A matrix of values as colours, each value written into its field.

    Attributes:
        title: of the figure.
        rows, columns: their names.
        values: a row of them for each row; None is left blank.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]

    def __post_init__(self) -> None:
        shape = [len(row) for row in self.values]
        if shape != [len(self.columns)] * len(self.rows):
            raise ConfigurationError(
                f"{self.title}: rows of {shape} values under {len(self.columns)} columns and"
                f" {len(self.rows)} names of rows."
            )


@dataclass(frozen=True)
class Ranks:
    """Mean ranks on one axis, and bars over those that cannot be told apart (Demsar 2006).

    Attributes:
        title: of the figure.
        ranks: name -> mean rank, 1 the best.
        distance: ranks that differ by less cannot be told apart.
    """

    title: str
    ranks: Mapping[str, float]
    distance: float


@dataclass(frozen=True)
class Listing:
    """A text that is to be copied, shown on a click.

    Attributes:
        title: stands above it.
        text: as it is.
    """

    title: str
    text: str


Figure: TypeAlias = Lines | Scatter | Bars | HeatMap | Ranks


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: of the section.
        paper: what of the paper it stands beside ("Fig. 1"), "" for nothing.
        text: paragraphs, above what follows.
        parts: tables, figures and listings, in order.
    """

    title: str
    paper: str = ""
    text: tuple[str, ...] = ()
    parts: tuple[Table | Figure | Listing, ...] = ()
