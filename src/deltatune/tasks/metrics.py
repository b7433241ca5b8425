"""The metrics of Table 1, as fractions, on the texts of predictions and right answers.

Definitions are those of CrossFit's `metrics.py` (INK-USC/CrossFit, 2022-04-27). An encoder's head
answers with a class index, which is first turned into its label word, so one definition holds for
every form. scikit-learn and scipy stand beneath and are imported when they are needed.
"""

from __future__ import annotations

import collections
import importlib
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deltatune.core.errors import ConfigurationError, UnknownNameError, UnsupportedError
from deltatune.tasks.rouge import rouge_l

__all__ = ["METRICS", "Metric", "evaluate"]

Targets = Sequence[Sequence[str]]
Metric = Callable[[Sequence[str], Targets], dict[str, float]]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = "scikit-learn" if name.startswith("sklearn") else "scipy"
        raise UnsupportedError(
            f"This metric needs {package}. Install it with: pip install 'deltatune[study]'"
        ) from error


def _squad_normal(text: str) -> str:
    # The order of the four steps is that of SQuAD's evaluation script, v1.1.
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def _word_f1(prediction: str, target: str) -> float:
    predicted, wanted = _squad_normal(prediction).split(), _squad_normal(target).split()
    common = sum((collections.Counter(predicted) & collections.Counter(wanted)).values())
    if common == 0:
        return 0.0
    return 2 * common / (len(predicted) + len(wanted))


def _mean_of_best(
    score: Callable[[str, str], float], predictions: Sequence[str], targets: Targets
) -> float:
    best = [
        max(score(prediction, target) for target in answers)
        for prediction, answers in zip(predictions, targets, strict=True)
    ]
    return math.fsum(best) / len(best)


def accuracy(predictions: Sequence[str], targets: Targets) -> dict[str, float]:
    """ACC: equal after lower-casing, best over targets, mean."""
    return {"ACC": _mean_of_best(lambda a, b: float(a.lower() == b.lower()), predictions, targets)}


def exact_match(predictions: Sequence[str], targets: Targets) -> dict[str, float]:
    """EM: equal after SQuAD's normalisation, best over targets, mean."""
    return {
        "EM": _mean_of_best(
            lambda a, b: float(_squad_normal(a) == _squad_normal(b)), predictions, targets
        )
    }


def question_f1(predictions: Sequence[str], targets: Targets) -> dict[str, float]:
    """QA-F1: F1 of the word multisets after SQuAD's normalisation, best over targets; EM beside."""
    return {
        "QA-F1": _mean_of_best(_word_f1, predictions, targets),
        **exact_match(predictions, targets),
    }


def classification_f1(predictions: Sequence[str], targets: Targets) -> dict[str, float]:
    """Classification-F1: macro F1 over labels, on the raw strings, first target only.

    "Classification-F1" averages over the labels seen in right answers or predictions, as CrossFit
    does, so that an invalid answer is one more class with F1 0; "Classification-F1-gold" averages
    over those of the right answers alone, as later code of the paper's group does. ACC beside them.
    """
    f1_score = _library("sklearn.metrics").f1_score
    gold = [answers[0] for answers in targets]
    found = list(predictions)
    seen, asked = sorted({*gold, *found}), sorted(set(gold))
    return {
        "Classification-F1": _macro(f1_score, gold, found, seen),
        "Classification-F1-gold": _macro(f1_score, gold, found, asked),
        **accuracy(predictions, targets),
    }


def _macro(
    score: Callable[..., float], gold: list[str], found: list[str], labels: list[str]
) -> float:
    return float(score(gold, found, labels=labels, average="macro", zero_division=0.0))


def matthews(predictions: Sequence[str], targets: Targets) -> dict[str, float]:
    """Matthew-Correlation: "acceptable" is 1, anything else 0 (CoLA); ACC beside it."""
    gold = [int(answers[0] == "acceptable") for answers in targets]
    found = [int(prediction == "acceptable") for prediction in predictions]
    library = _library("sklearn.metrics")
    varied = len({*gold, *found}) > 1
    return {
        "Matthew-Correlation": float(library.matthews_corrcoef(gold, found)) if varied else 0.0,
        **accuracy(predictions, targets),
    }


def rouge(predictions: Sequence[str], targets: Targets) -> dict[str, float]:
    """Rouge-L: as PyPI `rouge` 1.0.0, summary level, best over targets, mean."""
    return {"Rouge-L": _mean_of_best(rouge_l, predictions, targets)}


def pearson(predictions: Sequence[str], targets: Targets) -> dict[str, float]:
    """Pearson-Correlation of the numbers; Spearman's and the share of non-numbers beside it.

    CrossFit lets one answer that is no number turn the score into NaN. Here such an answer counts
    as the mean of the right answers, which is to say as no information, and "unparsable" is the
    share of them. Answers that are all equal correlate with nothing: 0.
    """
    library = _library("scipy.stats")
    gold = [float(answers[0]) for answers in targets]
    read = [_number(prediction) for prediction in predictions]
    mean = math.fsum(gold) / len(gold)
    found = [mean if value is None else value for value in read]
    varied = len(set(found)) > 1 and len(set(gold)) > 1
    return {
        "Pearson-Correlation": float(library.pearsonr(gold, found).statistic) if varied else 0.0,
        "Spearman-Correlation": float(library.spearmanr(gold, found).statistic) if varied else 0.0,
        "unparsable": sum(value is None for value in read) / len(read),
    }


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


METRICS: Mapping[str, Metric] = {
    "ACC": accuracy,
    "EM": exact_match,
    "QA-F1": question_f1,
    "Classification-F1": classification_f1,
    "Matthew-Correlation": matthews,
    "Rouge-L": rouge,
    "Pearson-Correlation": pearson,
}
"""Name, as CrossFit spells it, to function. The first key of its answer is the name itself."""


def evaluate(metric: str, predictions: Sequence[str], targets: Targets) -> dict[str, float]:
    """Returns the scores of `metric`, its own first, then its companions; fractions, higher is
    better.

    Args:
        metric: a name in METRICS.
        predictions: one text per example.
        targets: the right answers of each example, at least one.

    Raises:
        UnknownNameError: there is no such metric.
        ConfigurationError: no example, or not as many predictions as examples.
    """
    if metric not in METRICS:
        raise UnknownNameError("metric", metric, METRICS)
    if not predictions or len(predictions) != len(targets):
        raise ConfigurationError(
            f"Expected one prediction for each of at least one example, found {len(predictions)} "
            f"predictions for {len(targets)} examples."
        )
    return METRICS[metric](predictions, targets)
