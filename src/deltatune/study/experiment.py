"""An experiment: a question of the paper, the comparisons that answer it, and what they show.

A **study** is one or more comparisons over one store, each under a name of its own. An experiment
makes them from a single one, the base, which says on what: backbones, tasks, seeds, budget. Its
sections are made from what the store holds, alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, TypeAlias

from pydantic import Field

from deltatune.core.errors import StateError
from deltatune.study.cell import Strict
from deltatune.study.claim import Claim, Summaries
from deltatune.study.comparison import NOTE, Comparison, Describe, run_comparison
from deltatune.study.runner import Execute, Outcome, Pool, Together, Watch
from deltatune.study.section import Section
from deltatune.study.store import Note, Store
from deltatune.study.summary import Summary, summarise

__all__ = [
    "GRID",
    "STUDY",
    "Experiment",
    "Parts",
    "Study",
    "Summaries",
    "run_study",
    "studied",
    "summaries",
]

STUDY = "study"  # the name under which a store keeps which study it is
GRID = "grid"  # the experiment that asks nothing of the paper's

Parts: TypeAlias = dict[str, Comparison]


def _alone(base: Comparison) -> Parts:
    return {"": base}


@dataclass(frozen=True)
class Experiment:
    """A question and how it is answered.

    Attributes:
        name: of the command.
        shows: what is seen, in a sentence.
        paper: which figures and tables of the paper it stands beside.
        sections: the report, from the summaries of the parts.
        parts: the comparisons, by name, from the base; the base itself, with no name, if not given.
        defaults: fields of the base that are not given.
        claims: what the paper says of it.
        source: the paper.
    """

    name: str
    shows: str
    paper: str
    sections: Callable[[Summaries], list[Section]]
    parts: Callable[[Comparison], Parts] = _alone
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    claims: tuple[Claim, ...] = ()
    source: str = "Ding et al. 2023"

    def study(self, **fields: Any) -> Study:
        """The study of this experiment on what is given. Raises ConfigurationError."""
        base = Comparison(**{**self.defaults, **fields})
        return Study(experiment=self.name, parts=self.parts(base))


class Study(Strict):
    """Comparisons that answer one question.

    Attributes:
        experiment: name of it.
        parts: name -> comparison.
    """

    experiment: str
    parts: Annotated[Parts, Field(min_length=1)]


def run_study(
    study: Study,
    execute: Execute,
    store: Store,
    *,
    describe: Describe = lambda backbone, task, protocol: {},
    together: Together | None = None,
    pool: Pool | None = None,
    retry: bool = False,
    watch: Watch | None = None,
) -> dict[str, Outcome]:
    """Runs what is left of a study, one comparison after the other; see `run_comparison`.

    Raises StateError if the store holds another study: its report would be lost.
    """
    value, before = study.model_dump(mode="json"), store.note(STUDY)
    if before is None:
        store.append(Note(name=STUDY, value=value))
    elif before["experiment"] != study.experiment:
        raise StateError(
            f"This folder holds the study {before['experiment']!r}, not {study.experiment!r}. Give "
            "each study a folder of its own."
        )
    elif before != value:
        store.append(Note(name=STUDY, value=value))
    return {
        name: run_comparison(
            comparison,
            execute,
            store,
            name=_note(name),
            describe=describe,
            together=together,
            pool=pool,
            retry=retry,
            watch=watch,
        )
        for name, comparison in study.parts.items()
    }


def studied(store: Store) -> Study:
    """Which study a store holds. Raises StateError if it holds none."""
    value = store.note(STUDY)
    if value is None:
        raise StateError("There is no study in this store yet. Run one first.")
    return Study(**value)


def summaries(store: Store) -> dict[str, Summary]:
    """What a store says of each part of its study that was begun. Raises StateError."""
    names = [name for name in studied(store).parts if store.note(_note(name)) is not None]
    return {name: summarise(store, _note(name)) for name in names}


def _note(part: str) -> str:
    return f"{NOTE}: {part}"
