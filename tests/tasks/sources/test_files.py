from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltatune.core.errors import ConfigurationError, DataError
from deltatune.tasks import task_from_files
from deltatune.tasks.sources.files import FilesSource
from deltatune.tasks.specification import FilesSpecification
from deltatune.tasks.text import normalise


def _csv(folder: Path, header: str, *lines: str, name: str = "mine.csv") -> Path:
    path = folder / name
    path.write_text("\n".join((header, *lines)) + "\n", encoding="utf-8")
    return path


def _rows(count: int = 80) -> list[str]:
    return [f"text number {i},{'spam' if i % 3 else 'ham'}" for i in range(count)]


def test_one_file_is_cut_by_its_rows_texts(tmp_path: Path) -> None:
    lines = _rows()
    doubled = [line.upper().replace("SPAM", "spam").replace("HAM", "ham") for line in lines]
    task = task_from_files(_csv(tmp_path, "text,label", *lines, *doubled))
    splits = task.load()
    assert (task.labels, splits.status) == (("ham", "spam"), "local")
    parts = [
        {normalise(example.texts[0]) for example in part}
        for part in (splits.train, splits.validation, splits.test)
    ]
    assert sum(map(len, parts)) == 80
    assert not any(splits.removed.values())
    # The order of the rows, or other rows, do not move a row.
    fewer = task_from_files(_csv(tmp_path, "text,label", *lines[::-1][:60])).load()
    assert {normalise(e.texts[0]) for e in fewer.test} <= parts[2]


@pytest.mark.parametrize(
    ("header", "text", "label"),
    [
        ("text,label", ("text",), "label"),
        ("Label,Sentence", ("Sentence",), "Label"),
        ("id,review,stars", ("review",), "stars"),
        ("premise,hypothesis,label", ("premise", "hypothesis"), "label"),
        ("idx,question1,question2,class", ("question1", "question2"), "class"),
        ("whatever,category", ("whatever",), "category"),
        ("My Text,y", ("My Text",), "y"),
    ],
)
def test_columns_are_found(tmp_path: Path, header: str, text: tuple[str, ...], label: str) -> None:
    columns = header.split(",")
    lines = [",".join(f"{c}{i}" if c != label else str(i % 2) for c in columns) for i in range(40)]
    task = task_from_files(_csv(tmp_path, header, *lines))
    assert isinstance(task.source, FilesSpecification)
    found = task.source.columns
    assert found["label"] == label
    assert tuple(column for field, column in found.items() if field != "label") == text
    assert len(task.load().train[0].texts) == len(text)


def test_columns_that_cannot_be_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="which column holds the label; there are text, foo"):
        task_from_files(_csv(tmp_path, "text,foo", "a,b"))
    with pytest.raises(DataError, match="which column holds the text"):
        task_from_files(_csv(tmp_path, "foo,bar,label", "a,b,c"))
    with pytest.raises(DataError, match=r"'lable'. Did you mean 'label'"):
        task_from_files(_csv(tmp_path, "text,label", "a,b"), label="lable")
    with pytest.raises(DataError, match="no column 'texts'"):
        task_from_files(_csv(tmp_path, "text,label", "a,b"), text="texts")
    with pytest.raises(ConfigurationError, match="one or two columns"):
        task_from_files(_csv(tmp_path, "text,label", "a,b"), text=["a", "b", "c"])


def test_columns_by_name(tmp_path: Path) -> None:
    path = _csv(tmp_path, "one,two,three", *(f"a{i},b{i},{i % 2}" for i in range(40)))
    task = task_from_files(path, text=["two", "one"], label="three", metric="Classification-F1")
    example = task.load().train[0]
    assert example.texts[0].startswith("b") and example.texts[1].startswith("a")
    assert example.source == f"{example.texts[0]} [SEP] {example.texts[1]}"


def test_labels_as_numbers_are_words_in_natural_order(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": f"row {i}", "label": (i % 3) * 5 + 1} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = task_from_files(path)
    assert task.labels == ("1", "6", "11")
    splits = task.load()
    assert {example.targets[0] for example in splits.train} == {"1", "6", "11"}


def test_given_labels_are_the_set(tmp_path: Path) -> None:
    path = _csv(tmp_path, "text,label", *_rows())
    assert task_from_files(path, labels=["spam", "ham"]).labels == ("spam", "ham")
    with pytest.raises(DataError, match=r"mine.csv:2: the label 'ham' is not one of"):
        task_from_files(path, labels=["spam", "eggs"]).load()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a,x", "b,"], r"mine.csv:3: the label \('label'\) is missing"),
        (["a,x", "b,x"], "one label only, 'x'"),
        ([f"a{i},{i}" for i in range(50)], "50 different values in 50 rows"),
    ],
)
def test_labels_that_are_no_classes(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        task_from_files(_csv(tmp_path, "text,label", *lines))


def test_numbers_between_classes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 1.0}\n{"text": "b", "label": 1.5}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"1.5 is a number between classes"):
        task_from_files(path)


def test_a_folder_of_splits(tmp_path: Path) -> None:
    _csv(tmp_path, "text,label", *_rows(30), name="train.csv")
    _csv(tmp_path, "text,label", "v,ham", name="dev.csv")
    _csv(tmp_path, "text,label", "t,spam", name="test.csv")
    splits = task_from_files(tmp_path).load()
    assert [len(splits.train), splits.validation[0].source, splits.test[0].source] == [30, "v", "t"]
    assert splits.origin == "local files train.csv, dev.csv, test.csv"


def test_folders_that_are_unclear(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no data file"):
        task_from_files(tmp_path)
    _csv(tmp_path, "text,label", *_rows(), name="one.csv")
    assert len(task_from_files(tmp_path).labels) == 2
    _csv(tmp_path, "text,label", *_rows(), name="two.csv")
    with pytest.raises(DataError, match=r"found one.csv, two.csv"):
        task_from_files(tmp_path)
    _csv(tmp_path, "text,label", *_rows(), name="train.csv")
    _csv(tmp_path, "text,label", *_rows(), name="training.csv")
    with pytest.raises(DataError, match="both look like the train split"):
        task_from_files(tmp_path)


def test_a_column_missing_in_one_split(tmp_path: Path) -> None:
    _csv(tmp_path, "text,label", *_rows(), name="train.csv")
    _csv(tmp_path, "txt,label", "a,ham", name="test.csv")
    with pytest.raises(DataError, match=r"test.csv:2: .*'text'. Did you mean 'txt'"):
        task_from_files(tmp_path).load()


def test_a_specification_names_a_path_or_splits() -> None:
    with pytest.raises(ConfigurationError, match="both or none"):
        FilesSource(FilesSpecification()).paths()
    with pytest.raises(ConfigurationError, match="both or none"):
        FilesSource(FilesSpecification(path="a.csv", train="b.csv")).paths()
    assert FilesSource(FilesSpecification(train="b.csv")).paths() == {"train": Path("b.csv")}


def test_rows_without_text_are_counted(tmp_path: Path) -> None:
    task = task_from_files(_csv(tmp_path, "text,label", *_rows(), ",ham"))
    assert any("rows with empty text left out: 1" in note for note in task.load().notes)
