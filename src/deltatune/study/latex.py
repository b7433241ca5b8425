"""The table of a comparison in LaTeX, with the rules of booktabs."""

from __future__ import annotations

from deltatune.study.summary import Summary
from deltatune.study.table import Entry, layout, remarks

__all__ = ["as_latex"]

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


def _table(summary: Summary, backbone: str, said: str) -> str:
    placed = layout(summary, backbone)
    last = len(placed.lines) - 1
    lines = []
    for number, line in enumerate(placed.lines):
        lines.append(f"    {' & '.join(map(_entry, line))} \\\\")
        if (not number or number in placed.ends) and number < last:
            lines.append(r"    \midrule")
    columns = "l" + "r" * (len(placed.lines[0]) - 1)
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{Methods on {_escaped(backbone)}.}}",
            rf"  \begin{{tabular}}{{@{{}}{columns}@{{}}}}",
            r"    \toprule",
            *lines,
            r"    \bottomrule",
            r"  \end{tabular}",
            r"  \par\smallskip",
            rf"  {{\footnotesize {said}\par}}",
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
