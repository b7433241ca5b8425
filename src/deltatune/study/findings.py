"""What a study shows, from its store alone: the experiment's own sections, then its parts'."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from deltatune.study import page
from deltatune.study.experiment import studied, summaries
from deltatune.study.experiments import find_experiment
from deltatune.study.report import write
from deltatune.study.section import Section
from deltatune.study.store import Store

__all__ = ["Findings", "findings", "write_findings"]


@dataclass(frozen=True)
class Findings:
    """The report of a study.

    Attributes:
        title: of the page.
        subtitle: below it.
        facts: (name, value) of what holds for the whole study.
        sections: what it says.
        failures: how many cells failed.
    """

    title: str
    subtitle: str
    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
    failures: int


def findings(store: Store) -> Findings:
    """Returns what a store says of its study. Raises StateError if it holds none."""
    study, found = studied(store), summaries(store)
    experiment = find_experiment(study.experiment)
    sections = experiment.sections(found) if found else []
    facts: list[tuple[str, str]] = []
    for name, summary in found.items():
        ahead = f"{name}: " if name else ""
        facts += [(f"{ahead}{fact}", value) for fact, value in page.facts(summary)]
        sections += [replace(one, title=f"{ahead}{one.title}") for one in page.sections(summary)]
    return Findings(
        title=f"{experiment.name.capitalize()}: {experiment.shows}",
        subtitle=f"Beside {experiment.paper or 'nothing'} of the paper, made by deltatune.",
        facts=tuple(facts),
        sections=tuple(sections),
        failures=len({f.id for summary in found.values() for f in summary.failures}),
    )


def write_findings(found: Findings, path: str | os.PathLike[str]) -> Path:
    """Writes the report as one HTML page, whole or not at all. Raises StateError if it cannot."""
    return write(path, found.title, found.subtitle, found.facts, found.sections)
