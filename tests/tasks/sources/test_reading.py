from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from deltatune.core.errors import DataError
from deltatune.tasks.sources.reading import file_format, read_rows

ROWS = [{"text": 'a, b\n"c"', "label": "x"}, {"text": "é", "label": "y"}]


def _file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def _lines() -> str:
    return "".join(json.dumps(row) + "\n" for row in ROWS)


def test_every_format_reads_the_same_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    csv = 'text,label\n"a, b\n""c""",x\né,y\n'
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "f.parquet")
    paths = [
        _file(tmp_path, "f.jsonl", _lines()),
        _file(tmp_path, "f.jsonl.gz", gzip.compress(_lines().encode())),
        _file(tmp_path, "f.json", json.dumps(ROWS)),
        _file(tmp_path, "f.csv", csv),
        _file(tmp_path, "g.csv", "\ufeff" + csv),
        _file(tmp_path, "f.CSV.GZ", gzip.compress(csv.encode())),
        _file(tmp_path, "f.tsv", csv.replace("text,label", "text\tlabel").replace(",x", "\tx")
              .replace(",y", "\ty")),
        tmp_path / "f.parquet",
    ]  # fmt: skip
    for path in paths:
        assert [dict(row.values) for row in read_rows(path)] == ROWS, path.name
    assert read_rows(paths[0])[1].where == f"{paths[0]}:2"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n{"a": 3}\n', r"a.jsonl:2: not JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"a.jsonl:2: expected an object"),
        ("a.jsonl", "", "holds no rows"),
        ("a.jsonl", "\n\n", "holds no rows"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"a.jsonl:\d: not UTF-8"),
        ("a.json", '{"a": 1}', "expected a list"),
        ("a.json", "[1]", "item 1: expected an object"),
        ("a.json", "[", "not JSON"),
        ("a.csv", "a,b\n1,2\n1\n", r"a.csv:3: 1 values, but the header names 2"),
        ("a.csv", "a,b\n1,2,3\n", r"a.csv:2: 3 values"),
        ("a.csv", 'a,b\n1,"2\n', r"a.csv:\d: a broken line"),
        ("a.csv", "a,b\n", "holds no rows"),
        ("a.csv", "", "holds no rows"),
        ("a.txt", "a", "not a data file"),
        ("a.parquet", "PAR1", "not a whole parquet file"),
        ("a.jsonl.gz", "no gzip", "damaged"),
    ],
)
def test_broken_files_name_file_and_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=message):
        read_rows(_file(tmp_path, name, content))


def test_a_truncated_gzip_file(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"row {i} {i * i}"}) + "\n" for i in range(5000))
    whole = gzip.compress(lines.encode())
    path = _file(tmp_path, "a.jsonl.gz", whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a.jsonl.gz:\d{3,}: the file ends too early"):
        read_rows(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "a.csv")


def test_formats() -> None:
    assert file_format(Path("a.JSONL.gz")) == "jsonl"
    assert file_format(Path("jsonl")) == "jsonl"
    assert file_format(Path("a.zip")) is None
