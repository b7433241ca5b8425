"""`deltatune study report`: the page of a study, from its store alone."""

from __future__ import annotations

from deltatune.cli.compare import show_summary
from deltatune.cli.options import Study
from deltatune.cli.study.experiments import show_findings

__all__ = ["report"]


def report(folder: Study) -> None:
    """Show what a study found so far and write its page again.

    Nothing is run; processes at work are not disturbed.
    """
    from deltatune.study.experiment import STUDY
    from deltatune.study.findings import findings
    from deltatune.study.store import open_study
    from deltatune.study.summary import summarise

    store = open_study(folder)
    if store.note(STUDY) is None:
        show_summary(summarise(store), folder)
    else:
        show_findings(findings(store), folder)
