"""Measures what is exchanged with PEFT, AdapterHub and OpenDelta, and writes the page of it.

Every cell is the largest difference between a logit of the library and one of deltatune, or why the
folder is refused. PEFT itself computes its side; what the other two gave is kept with the tests.
Exit status 1 if a cell is neither, or differs by more than is allowed.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from revision import revision

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.interop import peers  # noqa: E402
from tests.interop.cases import CASES, INEXACT, OURS, REFUSED  # noqa: E402
from tests.interop.folders import Case, loaded, logits, moved  # noqa: E402

import deltatune as dt  # noqa: E402
from deltatune import api  # noqa: E402
from deltatune.core.errors import DeltatuneError  # noqa: E402
from deltatune.interop import peft as exchange  # noqa: E402
from deltatune.interop.table import ABSENT  # noqa: E402
from deltatune.testing.case import move  # noqa: E402
from deltatune.testing.families import FAMILIES  # noqa: E402

PAGE = ROOT / "docs" / "results" / "parity.md"
Row = tuple[str, ...]
NAMES = {"adapterhub": "AdapterHub", "opendelta": "OpenDelta"}


def difference(one: Any, two: Any) -> str:
    """The largest difference of two tensors, as a cell."""
    found = float((one - two).abs().max())
    return f"{found:.1e}" if found < peers.CLOSE * max(1.0, float(two.abs().max())) else (
        f"**{found:.1e}**"
    )  # fmt: skip


def told(act: Callable[[], str]) -> str:
    """What an act gives, or the first sentences of why it is refused."""
    try:
        return act()
    except DeltatuneError as error:
        return f"refused: {shown(str(error))}"


def shown(reason: str) -> str:
    """A reason without the path of the folder, in one line."""
    text = " ".join(reason.split(".json: ")[-1].split(".safetensors: ")[-1].split())
    return text.replace("|", "\\|")


def named(case: Case) -> str:
    """A case of PEFT's, without the family."""
    fields = ", ".join(f"{key}={value!r}" for key, value in case.fields.items())
    return f"`{case.name.removesuffix('Config')}({fields})`".replace("|", "\\|")


def of_peft() -> Iterator[Row]:
    """PEFT's folders: read, and written again; those that are refused."""
    for case in [*CASES, *(one for one, _ in INEXACT)]:
        with tempfile.TemporaryDirectory() as place:
            wanted = moved(case, Path(place) / "theirs")
            model = FAMILIES[case.family].build()
            cells = [told(lambda: _read(Path(place), model, case.family, wanted))]  # noqa: B023
            again = "–"
            if not cells[0].startswith("refused"):
                again = told(lambda: _written(Path(place), case.family, wanted))  # noqa: B023
            yield (named(case), case.family, *cells, again)


def _read(place: Path, model: Any, family: str, wanted: Any) -> str:
    delta = dt.load(place / "theirs", model)
    found = difference(logits(family, model), wanted)
    exchange.write(delta, place / "ours")
    return found


def _written(place: Path, family: str, wanted: Any) -> str:
    return difference(logits(family, loaded(family, place / "ours")), wanted)


def for_peft() -> Iterator[Row]:
    """Deltas of ours, as PEFT loads them; those that PEFT cannot express."""
    every = [(m, f, k) for m, f, k, _ in OURS] + [(m, f, "–") for m, f, _ in REFUSED]
    for method, family, kind in every:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "ours"
            yield (f"`{method}`".replace("|", "\\|"), family, kind, told(lambda: _made(method, family, place)))  # noqa: B023, E501  # fmt: skip


def _made(method: str, family: str, place: Path) -> str:
    model = FAMILIES[family].build()
    delta = api.attach(model, method, seed=2)
    move(delta)
    wanted = logits(family, model)
    exchange.write(delta, place)
    return difference(logits(family, loaded(family, place)), wanted)


def of_peer(peer: str, place: Path) -> list[Row]:
    """A peer's cases down, families across."""
    every = peers.names(peer)
    families = [family for family in peers.CLASSES if any(f == family for f, _ in every)]
    rows: list[Row] = [("case", *families)]
    for case in sorted({name for _, name in every}):
        cells = [case]
        for family in families:
            cells.append("–" if (family, case) not in every else _cell(peer, family, case, place))
        rows.append(tuple(cells))
    return rows


def _cell(peer: str, family: str, case: str, place: Path) -> str:
    found = peers.read(place, peer, family, case)
    if found.difference is None:
        return f"refused: {shown(found.reason)}"
    close = found.difference < peers.CLOSE
    return f"{found.difference:.1e}" if close else f"**{found.difference:.1e}**"


def table(rows: list[Row]) -> str:
    """A table of Markdown, whose first row is its head."""
    head, *rest = rows
    lines = [head, ("---",) * len(head), *rest]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def page(place: Path) -> str:
    """The page."""
    read: list[Row] = [("PEFT's", "family", "read", "written again, loaded by PEFT"), *of_peft()]
    made: list[Row] = [("ours", "family", "as", "loaded by PEFT"), *for_peft()]
    parts = [
        "# Parity with PEFT, AdapterHub and OpenDelta",
        "The largest difference between a logit of the library and one of deltatune, in fp32 on "
        f"models in miniature, or why the folder is refused. PEFT {version('peft')} and "
        f"transformers {version('transformers')} compute here; AdapterHub (adapters 1.2.0 with "
        "transformers 4.51.3) and OpenDelta (0.3.2 with transformers 4.33.3) computed where they "
        "can be imported, by `scripts/peer_folders.py`, and what they gave is kept with the tests. "
        "All tensors were moved from where they begin. A dash: the library has no such case, or "
        f"what was refused is not written. Made by `make parity` at revision {revision()}.",
        "## PEFT's folders, read and written",
        table(read),
        "Kinds of PEFT that are neither: "
        + "; ".join(f"`{kind}`, {why}" for kind, why in sorted(ABSENT.items()))
        + ".",
        "## Deltas of ours, for PEFT",
        table(made),
    ]
    for peer, name in NAMES.items():
        parts += [f"## Folders of {name}, read", table(of_peer(peer, place))]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    warnings.simplefilter("ignore")  # of PEFT, about names of modules and seeds
    with tempfile.TemporaryDirectory() as folder:
        text = page(peers.unpacked(Path(folder)))
    PAGE.write_text(text, encoding="utf-8")
    wide = text.count("**") // 2
    print(f"{PAGE.relative_to(ROOT)}: {wide} cells differ by more than is allowed")
    return 1 if wide else 0


if __name__ == "__main__":
    sys.exit(main())
