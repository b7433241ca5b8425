"""The parts of a task's record: where it comes from, how rows are prepared, cut and shown.

Every part is closed: a key that is not in the list is an error, with the nearest that is.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from deltatune.tasks.example import SplitName

__all__ = [
    "EmbeddedSpecification",
    "FilesSpecification",
    "HubSpecification",
    "Lengths",
    "PairPreparation",
    "Provenance",
    "Record",
    "SourceSpecification",
    "SplitRule",
]


class Record(BaseModel):
    """The base of every record: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class HubSpecification(Record):
    """A dataset of the Hugging Face hub.

    Attributes:
        dataset: hub id.
        config: name of the configuration.
        revision: commit to read. None reads the newest one and names it in the notes.
        splits: train, validation and test to the hub's split that serves as it, where these have
            other names or roles there; splits that are not named are then not read. Empty takes
            those of these three names.
    """

    kind: Literal["hub"] = "hub"
    dataset: str
    config: str | None = None
    revision: str | None = None
    splits: dict[SplitName, str] = Field(default_factory=dict)


class FilesSpecification(Record):
    """Local files: csv, tsv, jsonl, json or parquet, each also gzipped but parquet.

    Attributes:
        path: one file that holds all rows, or a folder with a file per split.
        train: the file of the training rows, where each split has its own.
        validation: the same for validation.
        test: the same for test.
        columns: field of the record to column of the file, for those that have another name there.
    """

    kind: Literal["files"] = "files"
    path: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)


class EmbeddedSpecification(Record):
    """Rows built at run time from what is installed.

    Attributes:
        builder: name of the builder in `tasks.embedded`.
    """

    kind: Literal["embedded"] = "embedded"
    builder: str


SourceSpecification = Annotated[
    HubSpecification | FilesSpecification | EmbeddedSpecification, Field(discriminator="kind")
]


class Provenance(Record):
    """Where a task comes from.

    Attributes:
        category: the paper's category, or "User" or "Embedded".
        paper: who made the data, where and when.
        address: where to read about it.
        licence: as stated by the makers, or "not stated".
        crossfit: CrossFit's id, where the text-to-text form is CrossFit's.
        corpora: training data of sentence encoders that hold its texts, or some of them: names of
            files as a model's `data_config.json` lists them, without endings.
    """

    category: str
    paper: str
    address: str | None = None
    licence: str
    crossfit: str | None = None
    corpora: tuple[str, ...] = ()


class PairPreparation(Record):
    """Turns a minimal pair into a choice: adds the fields `first`, `second` and `choice`.

    `choice` is 0 if `first` is the good one, else 1. The order is drawn by a hash of the row's text
    and the number 42, so that it does not depend on the order of the rows.

    Attributes:
        good: field of the acceptable sentence.
        bad: field of the other.
    """

    kind: Literal["pair"] = "pair"
    good: str
    bad: str


class SplitRule(Record):
    """How the protocol "faithful" cuts the published splits.

    Attributes:
        rule: A: as published. B: the published validation split is halved. C: one published split
            is cut 80/10/10. D: anything else, see `sample` and `shares`; without them another
            published split than validation is halved.
        pool: the published split that is cut; None for A.
        published: rows of each published split.
        order: field whose values restore the published order of the rows, where there is one.
        sample: share of the pool that is used at all: the first rows after a shuffle (numpy, seed
            42), which are then halved. None halves the whole pool as it stands.
        shares: the pool is shuffled so and cut: the first share is train, the last test, and the
            one before test validation. None for C means 0.8, 0.1, 0.1.
    """

    rule: Literal["A", "B", "C", "D"]
    pool: SplitName | None = None
    published: dict[SplitName, int]
    order: str | None = None
    sample: float | None = Field(default=None, gt=0, le=1)
    shares: tuple[float, float, float] | None = None


class Lengths(Record):
    """Sizes in tokens that hold nearly every row.

    Attributes:
        source: of the input.
        target: of the answer.
    """

    source: int = 256
    target: int = 8
