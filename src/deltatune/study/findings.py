"""What a study shows, from its store alone: the experiment's own sections, then its parts'."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from deltatune.study import page
from deltatune.study.claim import held_to
from deltatune.study.experiment import studied, summaries
from deltatune.study.experiments import find_experiment
from deltatune.study.facts import NOTHING, facts
from deltatune.study.protocol import protocol
from deltatune.study.report import write
from deltatune.study.section import Section
from deltatune.study.store import Store
from deltatune.study.table import missing

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
    beside = f"Beside {experiment.paper} of {experiment.source}. " if experiment.paper else ""
    sections = held_to(experiment.claims, found) if found else []
    sections += experiment.sections(found) if found else []
    without: list[str] = []
    for name, summary in found.items():
        ahead = f"{name}: " if name else ""
        if summary.comparison.budget == NOTHING:  # there are no curves and costs to show
            without += [f"{ahead}{said}" for said in missing(summary)]
        else:
            sections += [replace(s, title=f"{ahead}{s.title}") for s in page.sections(summary)]
    sections += [Section("What is missing", text=tuple(without))] if without else []
    sections += [protocol(study, found)] if found else []
    return Findings(
        title=f"{experiment.name.capitalize()}: {experiment.shows}",
        subtitle=f"{beside}Made by deltatune.",
        facts=tuple(facts(found)),
        sections=tuple(sections),
        failures=len({f.id for summary in found.values() for f in summary.failures}),
    )


def write_findings(found: Findings, path: str | os.PathLike[str]) -> Path:
    """Writes the report as one HTML page, whole or not at all. Raises StateError if it cannot."""
    return write(path, found.title, found.subtitle, found.facts, found.sections)
