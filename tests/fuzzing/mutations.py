"""What spoils a file or a folder: in its bytes, in its JSON, in its tensors, in its names.

All of it is drawn from one `random.Random`, so that a seed says what was given.
"""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

__all__ = ["CANARY", "Link", "Node", "Tree", "lay", "mutated_folder", "mutated_text"]

CANARY = "canary"  # nothing of this name may be imported, run, or written


@dataclass(frozen=True)
class Link:
    """A symbolic link; "{outside}" in its target is a folder that no reader may change."""

    target: str


@dataclass(frozen=True)
class Node:
    """A directory ("directory") or a pipe ("pipe") where a file is expected."""

    kind: str


Tree: TypeAlias = Mapping[str, bytes | Link | Node]


class Pairs(list[tuple[str, Any]]):
    """A JSON object that may have a key twice."""


class Raw(str):
    """Text that stands in JSON as it is."""


_DEEP = (10, 100, 100_000)  # the last one is deeper than JSON is read
_NUMBERS = (0, 1, -1, 2, 3, 4095, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, 10**30)
_RAW = ("NaN", "Infinity", "-Infinity", "1e400", "-0.0", "1.5", "9" * 5000, '"\\ud800"', "tru", "")
_TEXTS = (
    *("", " ", ".", "..", "../../canary", "/etc/passwd", "/dev/zero", "C:\\canary", "a/../../b"),
    *("a\0b", "é", "🙂", "\u202e", "F32", "I64", "BOOL", "F8_E4M3", "float32", "int64", "canary"),
    *("float64", "complex64", "load", "nn", "lora", "lora(rank=2)", "lora(rank=1000000000000)"),
    *("full", "lora + lora", "canary.run()", "__import__('canary')", "re:(", "(" * 500, "x" * 9999),
    *("!!python/object:canary.Canary", "{{ canary }}", "file:///etc/passwd", "http://canary/"),
)
_LISTS = ([], [0], [-1], [2**40], [2**20, 2**20], [2**62, 4], [1] * 70, [None], [[1]], {}, {"": 0})
_VALUES: tuple[Any, ...] = (None, True, False, *_NUMBERS, *_TEXTS, *_LISTS, *map(Raw, _RAW))
_KINDS = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E5M2", "C64")
# A header that was spoilt before is none whose tensors could be found.
_OTHER = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
_WRONG = tuple(struct.pack("<f", one) for one in (float("nan"), float("inf"), -1e38, 0.0))


def lay(tree: Tree, folder: Path, outside: Path) -> None:
    """Writes a tree into an empty folder; a name that leads out of it is left out."""
    for name, value in tree.items():
        path = folder / name
        if ".." in Path(name).parts or path.is_absolute() != folder.is_absolute():
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(value, bytes):
                path.write_bytes(value)
            elif isinstance(value, Link):
                path.symlink_to(value.target.replace("{outside}", str(outside)))
            elif value.kind == "pipe":
                os.mkfifo(path)
            else:
                path.mkdir(exist_ok=True)
        except (OSError, ValueError):  # a name that the disk does not take
            continue


def mutated_folder(tree: Tree, draw: random.Random) -> dict[str, bytes | Link | Node]:
    """A tree with one or two files spoilt, now and then in what they are."""
    made = dict(tree)
    for _ in range(draw.choice((1, 1, 1, 2))):
        if not made:
            break
        name = draw.choice(sorted(made))
        value = made[name]
        if not isinstance(value, bytes) or draw.random() < 0.12:
            _misplace(made, name, draw)
        elif name.endswith(".json"):
            made[name] = _json(value, draw) if draw.random() < 0.85 else _bytes(value, draw)
        else:
            made[name] = _tensors(value, draw) if draw.random() < 0.85 else _bytes(value, draw)
    return made


def mutated_text(text: str, draw: random.Random) -> str:
    """A text with pieces of it, or of what is hostile, put in, taken out or doubled."""
    for _ in range(draw.randint(1, 4)):
        start, stop = sorted(draw.randint(0, len(text)) for _ in range(2))
        piece = draw.choice(
            (draw.choice(_TEXTS), text[start:stop] * 2, chr(draw.randint(0, 0x2FF)))
        )
        text = text[:start] + draw.choice((piece, "")) + text[draw.choice((start, stop)) :]
    return text


def _misplace(made: dict[str, bytes | Link | Node], name: str, draw: random.Random) -> None:
    """Something else at a name, or the same at another."""
    value = made.pop(name)
    above, _, last = name.rpartition("/")
    other = draw.choice(sorted(made) or [name])
    links = (
        other,
        last,
        "{outside}/canary",
        "{outside}",
        "/dev/zero",
        "/dev/null",
        "nowhere",
        "..",
    )
    match draw.randint(0, 5):
        case 0:
            made[name] = Link(draw.choice(links))
        case 1:
            made[name] = Node(draw.choice(("directory", "pipe")))
        case 2:  # two names that some disks take for one
            made |= {name: value, (f"{above}/" if above else "") + last.swapcase(): value}
        case 3:
            hostile = draw.choice(("x.json", "@.json", "@LATEST.json", "...", "a b", "\udc80", "-"))
            made[f"{above}/{hostile}" if above else hostile] = value
        case 4 if above:  # a folder of it is a link
            for one in [one for one in made if one.startswith(f"{above}/")]:
                made.pop(one)
            made[above] = Link(draw.choice(("{outside}", "..", "/")))


def _bytes(content: bytes, draw: random.Random) -> bytes:
    made = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randint(0, len(made))
        size = draw.choice((1, 1, 4, 8, 64))
        match draw.randint(0, 5):
            case 0 if at < len(made):
                made[at] ^= 1 << draw.randint(0, 7)
            case 1:
                made[at : at + size] = draw.randbytes(size)
            case 2:
                del made[at : at + size]
            case 3:
                made[at:at] = made[at // 2 : at // 2 + size]
            case 4:
                made[at : at + 8] = struct.pack("<Q", draw.choice((0, 2**31, 2**63, 2**64 - 1)))
            case 5:
                del made[at:]
    return bytes(made)


def _json(content: bytes, draw: random.Random) -> bytes:
    return _changed(content.decode("utf-8", "replace"), draw).encode("utf-8", "surrogatepass")


def _changed(text: str, draw: random.Random) -> str:
    """The text of a JSON value with one to three things changed in it."""
    try:
        held: Any = [json.loads(text, object_pairs_hook=Pairs)]
    except (ValueError, RecursionError):
        return mutated_text(text, draw)
    for _ in range(draw.choice((1, 1, 2, 3))):
        if nodes := _nodes(held):
            _change(draw.choice(nodes), draw, nodes)
    return "".join(map(_dumped, held))


def _nodes(value: Any) -> list[Any]:
    """All lists and objects in a value that hold anything."""
    inner = [one[1] for one in value] if isinstance(value, Pairs) else value
    if not isinstance(value, list) or not value:
        return []
    return [value, *(node for one in inner for node in _nodes(one))]


def _change(node: list[Any], draw: random.Random, nodes: list[Any]) -> None:
    """One thing in a list or an object is another."""
    if not node:
        return
    at = draw.randrange(len(node))
    paired = isinstance(node, Pairs)
    key, value = node[at] if paired else ("", node[at])
    match draw.randint(0, 7):
        case 0 | 1 if isinstance(value, str) and value[:1] == "{" and draw.random() < 0.8:
            value = _changed(value, draw)  # JSON in a text, as in the metadata of tensors
        case 0 | 1:
            value = copy.deepcopy(draw.choice(_VALUES))
        case 2 if isinstance(value, int) and not isinstance(value, bool):
            value = value + draw.choice((-1, 1, 2**32)) if draw.random() < 0.5 else -value
        case 3:
            depth = draw.choice(_DEEP)
            value = Raw(
                draw.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth))
            )
        case 4:
            value = draw.choice(draw.choice(nodes))  # of another place
            value = copy.deepcopy(value[1] if isinstance(value, tuple) else value)
        case 5:
            other = draw.choice(node)[0] if paired else ""
            key = draw.choice((other, key.swapcase(), key + draw.choice(_TEXTS), *_TEXTS[:12]))
        case 6:
            del node[at]
            return
        case 7:  # twice, as it is or with another value
            again = copy.deepcopy(draw.choice((value, draw.choice(_VALUES))))
            node.insert(draw.randint(0, len(node)), (key, again) if paired else again)
            return
    node[at] = (key, value) if paired else value


def _dumped(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {_dumped(one)}" for key, one in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_dumped, value)) + "]"
    return json.dumps(value)


def _tensors(content: bytes, draw: random.Random) -> bytes:
    """A file of safetensors: its header as JSON, its tensors as numbers."""
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size].decode("utf-8", "replace"), bytearray(content[8 + size :])
    told: int | None = None
    match draw.randint(0, 6):
        case 0 | 1:
            header = _changed(header, draw)
        case 2:
            header = _retyped(header, draw)
        case 3 if len(data) >= 4:
            at = draw.randrange(len(data) // 4) * 4
            data[at : at + 4] = draw.choice(_WRONG)
        case 4:
            told = draw.choice(
                (0, 1, len(header) - 1, len(header) + 1, 10**8 + 1, 2**63, 2**64 - 1)
            )
        case 5:
            data = bytearray(_bytes(bytes(data), draw))
        case 6:
            return _renamed(header, draw) + bytes(data)
    text = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if told is None else max(told, 0)) + text + bytes(data)


def _retyped(header: str, draw: random.Random) -> str:
    """A tensor of another type or shape, of as many bytes or not."""
    try:
        held = json.loads(header)
        entry = held[draw.choice([name for name in held if name != "__metadata__"])]
        entry["dtype"] = draw.choice((entry["dtype"], draw.choice(_KINDS)))
        shape = entry["shape"]
        forms = ([*shape, 1], shape[::-1], [2 * one for one in shape], [2**40, *shape], [0], [])
        entry["shape"] = draw.choice(forms)
    except _OTHER:
        return header
    return json.dumps(held)


def _renamed(header: str, draw: random.Random) -> bytes:
    """A tensor that is called otherwise: twice the same name, other cases, another folder."""
    try:
        held = json.loads(header, object_pairs_hook=Pairs)
        at = draw.randrange(len(held))
        name = held[at][0]
        names = (name.swapcase(), f"../{name}", f"/{name}", f"{name}#places", draw.choice(held)[0])
        held[at] = (draw.choice((*names, "__metadata__")), held[at][1])
        header = _dumped(held)
    except _OTHER:
        pass
    text = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text
