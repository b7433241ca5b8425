"""`deltatune hub`: deltas shared by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from deltatune.cli.groups import group
from deltatune.cli.options import Json
from deltatune.cli.output import print_json, show

if TYPE_CHECKING:
    from deltatune.hub import Entry, Hub, Reference

__all__ = ["COMMANDS", "build"]

At: TypeAlias = Annotated[
    str,
    typer.Option(
        "--hub",
        envvar="DELTATUNE_HUB",
        show_envvar=False,
        help="Folder, URL of fsspec, oci:folder or hf://owner; else $DELTATUNE_HUB.",
        metavar="URL",
    ),
]
Name: TypeAlias = Annotated[
    str, typer.Argument(help="name, name:tag or name@sha256:digest.", metavar="NAME")
]


Folder: TypeAlias = Annotated[Path, typer.Argument(help="Folder of a delta.", metavar="FOLDER")]
Trusted: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(help="Public key, of which one must have signed it; repeat it.", metavar="KEY"),
]


def push(
    folder: Folder,
    name: Name,
    hub: At,
    beside: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the same delta for PEFT, made by `deltatune export`; for hf:// hubs.",
            metavar="FOLDER",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put a delta into the hub under a name."""
    from deltatune.hub import Reference

    reference = Reference.parse(name)
    _say(reference, _open(hub).push(folder, reference, beside=beside), as_json)


def pull(name: Name, hub: At, trusted: Trusted = None, as_json: Json = False) -> None:
    """Fetch a delta, verify it, and say where it lies."""
    place = _open(hub, trusted).pull(name)
    if as_json:
        print_json({"folder": str(place)})
    else:
        show(str(place))


def search(
    hub: At,
    words: Annotated[
        list[str] | None,
        typer.Argument(help="In name, task, method or backbone.", metavar="[WORDS]"),
    ] = None,
    category: Annotated[
        str | None,
        typer.Option(help="addition, specification or reparameterisation.", metavar="NAME"),
    ] = None,
    largest: Annotated[int | None, typer.Option(help="At most so many bytes.")] = None,
    least: Annotated[float | None, typer.Option(help="At least this first score.")] = None,
    as_json: Json = False,
) -> None:
    """List the deltas of the hub."""
    from rich.table import Table

    found = _open(hub).search(
        " ".join(words or ()), category=category, largest=largest, least=least
    )
    if as_json:
        print_json({"deltas": [_data(reference, entry) for reference, entry in found]})
        return
    table = Table("name", "method", "backbone", "task", "scores", "numbers", box=None)
    for reference, entry in found:
        scores = ", ".join(f"{metric} {value:.3f}" for metric, value in entry.scores.items())
        numbers = f"{entry.numbers:,}"
        table.add_row(str(reference), entry.method, entry.backbone, entry.task, scores, numbers)
    show(table)


def show_one(name: Name, hub: At, as_json: Json = False) -> None:
    """Say what a delta is, without fetching it."""
    from deltatune.hub import Reference

    reference = Reference.parse(name)
    _say(reference, _open(hub).show(reference), as_json)


def verify(name: Name, hub: At, trusted: Trusted = None, as_json: Json = False) -> None:
    """Fetch a delta anew, and hold it to its digests."""
    from deltatune.hub import Reference

    reference = Reference.parse(name)
    _say(reference, _open(hub, trusted).verify(reference), as_json)


def rm(name: Name, hub: At) -> None:
    """Take a name away; the delta itself goes with `tidy`."""
    _open(hub).remove(name)


def tidy(
    hub: At,
    older: Annotated[float, typer.Option(help="Seconds since the last change.")] = 86400.0,
) -> None:
    """Remove deltas without a name, and what killed processes left."""
    show(f"{_open(hub).tidy(older=older)} files removed")


def site(
    hub: At, out: Annotated[Path, typer.Option(help="The page to write.")] = Path("hub.html")
) -> None:
    """Write what the hub holds as one page, which needs no network."""
    from deltatune.hub import write_site

    show(str(write_site(_open(hub), out)))


def key(
    file: Annotated[Path, typer.Argument(help="File to write, which must not exist.")],
) -> None:
    """Make a private key, and say the public one, which others trust."""
    from deltatune.hub import make_key

    show(make_key(file))


def sign(
    folder: Folder,
    key: Annotated[Path, typer.Option(help="File of a private key.", metavar="FILE")],
) -> None:
    """Sign a delta, before it is pushed."""
    from deltatune.hub import sign as signed

    show(signed(folder, key))


COMMANDS: dict[str, Callable[..., None]] = {
    "push": push,
    "pull": pull,
    "search": search,
    "show": show_one,
    "verify": verify,
    "rm": rm,
    "tidy": tidy,
    "site": site,
    "key": key,
    "sign": sign,
}


def build() -> typer.Typer:
    """Returns the commands of `deltatune hub`."""
    return group(
        "Share deltas by name, in a folder, behind a URL or on the Hugging Face Hub.", COMMANDS
    )


def _open(url: str, trusted: Sequence[str] | None = None) -> Hub:
    from deltatune.hub import Hub

    return Hub(url, trusted=trusted or ())


def _data(reference: Reference, entry: Entry) -> dict[str, Any]:
    return {"name": str(reference), **entry.model_dump(mode="json")}


def _say(reference: Reference, entry: Entry, as_json: bool) -> None:
    data = _data(reference, entry)
    if as_json:
        print_json(data)
        return
    scores = [f"{metric} {value:.4g}" for metric, value in entry.scores.items()]
    said = data | {"categories": ", ".join(entry.categories), "scores": ", ".join(scores)}
    show(*(f"{key}: {value}" for key, value in said.items() if value != ""))
