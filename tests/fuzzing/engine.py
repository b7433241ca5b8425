"""Executions of a reader: each in a folder of its own, watched, and kept if it goes wrong.

Wrong is: an error that is none of ours, more than ten seconds, a change outside of the folder, a
socket, a process, a pickle, or an import that a file has asked for. Memory is limited, so that a
tensor of terabytes is an error and not a hope.
"""

from __future__ import annotations

import base64
import faulthandler
import hashlib
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tests.fuzzing.mutations import CANARY, Link, Node, Tree, lay
from tests.fuzzing.readers import Reader

from deltatune.core.errors import DeltatuneError

__all__ = ["Block", "crash_of", "execute", "limited", "stored", "tree_from"]

SECONDS = 10.0
ROOM = 4 << 30  # bytes that an execution may ask for
_WATCHED = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn")
_active: list[bool] = []


class Forbidden(Exception):
    """A reader did what a file must not make it do."""


@dataclass
class Block:
    """What came out of some executions.

    Attributes:
        executions: how many there were.
        accepted: of them, those that were read as something.
        crashes: what was wrong to how often, by reader, error and place.
        peak: bytes of memory that the process held at most.
        seconds: of the processor that they took.
    """

    executions: int = 0
    accepted: int = 0
    crashes: dict[str, int] = field(default_factory=dict)
    peak: int = 0
    seconds: float = 0.0


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _active:
        return
    asked = event == "import" and CANARY in str(args[0])
    if asked or event == "pickle.find_class" or event.startswith(_WATCHED):
        raise Forbidden(f"{event} {args!r:.200}")


sys.addaudithook(_audit)


def _late(number: int, frame: FrameType | None) -> None:
    raise Forbidden(f"It took more than {SECONDS} seconds.")


@contextmanager
def limited() -> Iterator[None]:
    """Within it this process may take a few gigabytes more than it has, and no terabyte."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    former = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, former[1]))
    alarm = signal.signal(signal.SIGALRM, _late)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, alarm)
        resource.setrlimit(resource.RLIMIT_AS, former)


def crash_of(reader: Reader, tree: Tree) -> Exception | None:
    """What goes wrong with a tree, if anything does; an error of ours is right.

    Raises DeltatuneError where the reader refuses it.
    """
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    # What blocks outside of Python does not hear the alarm: the process ends, and says where.
    faulthandler.dump_traceback_later(6 * SECONDS, exit=True)
    _active.append(True)
    try:
        _read(reader, tree)
    except DeltatuneError:
        raise
    except Exception as error:
        return error
    finally:
        _active.pop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    return None


def _read(reader: Reader, tree: Tree) -> None:
    if reader.content is not None:
        ((_, content),) = tree.items()
        assert isinstance(content, bytes)
        reader.content(content)
        return
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as place:
        folder, outside = Path(place) / "folder", Path(place) / "outside"
        folder.mkdir()
        outside.mkdir()
        (outside / CANARY).write_bytes(b"alive")
        lay(tree, folder, outside)
        try:
            reader.read(folder)
        finally:
            if [path.name for path in outside.iterdir()] != [CANARY] or (
                outside / CANARY
            ).read_bytes() != b"alive":
                raise Forbidden("A file outside of the folder was changed.")


def execute(reader: Reader, first: int, count: int, *, seed: int, kept: Path | None) -> Block:
    """Gives a reader what executions number `first` and following draw.

    Args:
        reader: which.
        first, count: the executions' numbers.
        seed: of all executions.
        kept: a folder for what goes wrong, the first of each kind; None keeps nothing.
    """
    examples = reader.examples()
    found, started = Block(), time.process_time()
    for number in range(first, first + count):
        draw = random.Random(f"{seed}/{reader.name}/{number}")
        tree = reader.spoil(draw.choice(examples), draw)
        found.executions += 1
        try:
            error = crash_of(reader, tree)
        except DeltatuneError:
            continue
        if error is None:
            found.accepted += 1
            continue
        kind = f"{reader.name}: {type(error).__name__} {_place(error)}"
        if kept is not None and kind not in found.crashes:
            _keep(reader, tree, kind, error, kept)
        found.crashes[kind] = found.crashes.get(kind, 0) + 1
    found.seconds = time.process_time() - started
    found.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def _place(error: Exception) -> str:
    """The last line of ours that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "deltatune" in frame.filename] or list(frames)
    return f"{Path(own[-1].filename).name}:{own[-1].name}" if own else ""


def _keep(reader: Reader, tree: Tree, kind: str, error: Exception, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{reader.name}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}.json"
    held = {"reader": reader.name, "was": f"{kind}: {error}"[:300], "tree": stored(tree)}
    (folder / name).write_text(json.dumps(held, indent=1) + "\n", encoding="ascii")


def stored(tree: Tree) -> dict[str, list[str]]:
    """A tree as JSON holds it."""
    made: dict[str, list[str]] = {}
    for name, value in tree.items():
        if isinstance(value, bytes):
            made[name] = ["bytes", base64.b85encode(value).decode()]
        else:
            made[name] = ["link", value.target] if isinstance(value, Link) else ["node", value.kind]
    return made


def tree_from(held: dict[str, list[str]]) -> Tree:
    """The tree that `stored` has made JSON of."""
    kinds: dict[str, Any] = {"bytes": base64.b85decode, "link": Link, "node": Node}
    return {name: kinds[kind](value) for name, (kind, value) in held.items()}
