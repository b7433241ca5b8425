"""Tables in LaTeX, with the rules of booktabs: that of a comparison, and any of a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from deltatune.study.section import Table
from deltatune.study.summary import Summary
from deltatune.study.table import Entry, layout, remarks

__all__ = ["as_latex", "table_as_latex"]

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "[": "{[}",  # behind the end of a line it would begin an argument
    "±": r"$\pm$",
    **{character: f"\\{character}" for character in "&%$#_"},
}


def as_latex(summary: Summary) -> str:
    """Returns a `table` for each backbone, and below it what must be said beside the scores.

    The best scores of a row are bold. It needs `\\usepackage{booktabs}` and nothing else.
    """
    said = " ".join(map(_escaped, remarks(summary)))
    return "\n".join(_table(summary, name, said) for name in summary.comparison.backbones)


def table_as_latex(table: Table, caption: str) -> str:
    """Returns a `table` of any table of a report, with its note below it."""
    best = table.best_places()
    lines: list[str | None] = [" & ".join(_escaped(c.title) for c in table.columns), None]
    for number, row in enumerate(table.rows):
        kind: Literal["average", "task"] = "average" if number in table.averages else "task"
        written = (c.write(value) for c, value in zip(table.columns, row, strict=True))
        entries = [Entry(text, (number, at) in best, kind) for at, text in enumerate(written)]
        lines.append(" & ".join(map(_entry, entries)))
    columns = "".join("l" if column.kind == "text" else "r" for column in table.columns)
    return _float(_escaped(caption), columns, lines, _escaped(table.note))


def _table(summary: Summary, backbone: str, said: str) -> str:
    placed = layout(summary, backbone)
    last = len(placed.lines) - 1
    lines: list[str | None] = []
    for number, line in enumerate(placed.lines):
        lines.append(" & ".join(map(_entry, line)))
        if (not number or number in placed.ends) and number < last:
            lines.append(None)
    columns = "l" + "r" * (len(placed.lines[0]) - 1)
    return _float(f"Methods on {_escaped(backbone)}.", columns, lines, said)


def _float(caption: str, columns: str, lines: Sequence[str | None], said: str) -> str:
    """A floating table: lines of it, None for a rule, and what is said below."""
    body = [r"    \midrule" if line is None else f"    {line} \\\\" for line in lines]
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{caption}}}",
            rf"  \begin{{tabular}}{{@{{}}{columns}@{{}}}}",
            r"    \toprule",
            *body,
            r"    \bottomrule",
            r"  \end{tabular}",
            *([r"  \par\smallskip", rf"  {{\footnotesize {said}\par}}"] if said else []),
            r"\end{table}",
            "",
        ]
    )


def _entry(entry: Entry) -> str:
    text = _escaped(entry.text)
    if entry.best:
        return rf"\textbf{{{text}}}"
    return rf"\emph{{{text}}}" if entry.kind == "average" and text else text


def _escaped(text: str) -> str:
    # A break of lines or an empty line would end the row or the table.
    return "".join(_SPECIAL.get(character, character) for character in " ".join(text.split()))
