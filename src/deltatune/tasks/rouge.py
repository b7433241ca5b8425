"""Rouge-L at summary level, as the package `rouge` 1.0.0 on PyPI computes it.

Written anew because that package reconstructs subsequences by recursion, which overflows on texts
of about a thousand words, and raises an exception where a text is empty. The tests hold stored
values of it.
"""

from __future__ import annotations

import string

__all__ = ["rouge_l"]

_EMPTY = frozenset(string.punctuation + string.whitespace)


def rouge_l(prediction: str, reference: str) -> float:
    """Returns the F1 of distinct words in the union of longest common subsequences, in [0, 1].

    Sentences end at "."; words are what white space parts, case counts, nothing is stemmed. A
    prediction that is empty but for punctuation scores 0, and so does such a reference.
    """
    if _EMPTY.issuperset(prediction) or _EMPTY.issuperset(reference):
        return 0.0
    predicted, wanted = _sentences(prediction), _sentences(reference)
    union: set[str] = set()
    for wanted_words in wanted:
        for predicted_words in predicted:
            union |= _common(wanted_words, predicted_words)
    if not union:
        return 0.0
    precision = len(union) / len({word for words in predicted for word in words})
    recall = len(union) / len({word for words in wanted for word in words})
    return 2 * precision * recall / (precision + recall)


def _sentences(text: str) -> list[list[str]]:
    # A piece of white space alone is a sentence of one empty word, as in the original.
    return [piece.split() or [""] for piece in text.split(".") if piece]


def _common(wanted: list[str], predicted: list[str]) -> set[str]:
    """Returns the words of one longest common subsequence, the one that the original picks."""
    lengths = [[0] * (len(predicted) + 1)]
    for word in wanted:
        above, row = lengths[-1], [0]
        for column, other in enumerate(predicted):
            row.append(above[column] + 1 if word == other else max(above[column + 1], row[-1]))
        lengths.append(row)
    found: set[str] = set()
    i, j = len(wanted), len(predicted)
    while i and j:
        if wanted[i - 1] == predicted[j - 1]:
            found.add(wanted[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found
