"""Names of deltas: what is read is written alike, and none leads out of its folder."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltatune.core.errors import ConfigurationError
from deltatune.hub import Reference

PART = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,20}[a-z0-9])?", fullmatch=True)
NAME = st.lists(PART, min_size=1, max_size=4).map("/".join)


@given(NAME, PART)
def test_what_is_written_is_read(name: str, tag: str) -> None:
    assert str(Reference.parse(f"{name}:{tag}")) == f"{name}:{tag}"
    assert Reference.parse(name) == Reference(name, "latest")
    digest = "0123456789abcdef" * 4
    found = Reference.parse(f"{name}@sha256:{digest}")
    assert found == Reference(name, None, digest) and Reference.parse(str(found)) == found


@given(st.text(max_size=40))
def test_a_name_is_read_or_refused_and_stays_in_its_folder(text: str) -> None:
    try:
        found = Reference.parse(text)
    except ConfigurationError as error:
        assert "name:tag" in str(error)
        return
    path = PurePosixPath(found.name)
    assert not path.is_absolute() and ".." not in path.parts and found.name == str(path)
    assert found.name == found.name.casefold()


@pytest.mark.parametrize(
    "text",
    [
        *("", "A", "../a", "a/../b", "/a", "a//b", "a:", ":v1", "a:B", "a/", ".a", "a.", "a b"),
        *("a@sha256:1234", "a@md5:" + "0" * 64, "a@" + "0" * 63, "a:v1@sha256:" + "0" * 64),
        *("a\\b", "a\n", "con/..", "a" * 65, "/".join("abcdefghi")),
    ],
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="A delta is named"):
        Reference.parse(text)
