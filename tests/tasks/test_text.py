from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deltatune.tasks.text import digest, fraction, normalise


@given(st.text())
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    # NFKC after case folding can still change a few characters; white space and case are settled.
    once = normalise(text)
    assert once == " ".join(once.split())
    assert normalise(f"  {once}\n") == normalise(once)


def test_normalise() -> None:
    assert normalise("  The\tﬁrst\n LINE ") == "the first line"


@given(st.lists(st.text(), max_size=4))
def test_digests_are_of_content(parts: list[str]) -> None:
    assert digest(*parts) == digest(*list(parts))
    assert len(digest(*parts)) == 16
    assert digest(*parts) != digest(*parts, "more")
    assert 0.0 <= fraction(*parts) < 1.0


def test_fractions_are_spread() -> None:
    values = [fraction(number) for number in range(2000)]
    assert 0.47 < sum(values) / len(values) < 0.53
    assert 150 < sum(value < 0.1 for value in values) < 250
