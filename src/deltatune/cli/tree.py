"""A model as a tree, repeated blocks folded, with the sites of a plan marked in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from rich.text import Text
from rich.tree import Tree

if TYPE_CHECKING:
    from torch import nn

    from deltatune.core.plan import Plan, PlannedSite

__all__ = ["draw"]

Marks: TypeAlias = Mapping[str, Sequence["PlannedSite"]]
# What makes two subtrees the same: class, own shapes, marks, and the children by name.
Signature: TypeAlias = tuple[object, ...]


def draw(model: nn.Module, plan: Plan, title: str) -> Tree:
    """Returns the tree. Branches without a site are one line each.

    Args:
        model: what was planned on; may be on the `meta` device.
        plan: its sites are marked at the modules whose calls they change.
        title: of the tree's root.
    """
    marks: dict[str, list[PlannedSite]] = defaultdict(list)
    for site in plan.sites:
        marks[site.path].append(site)
    root = Tree(_label(title, model, marks.get("", ())), guide_style="dim")
    _grow(root, model, "", marks)
    return root


def _grow(tree: Tree, module: nn.Module, path: str, marks: Marks) -> None:
    for names, child in _folded(module, path, marks):
        below = _join(path, names[0])
        title = names[0] if len(names) == 1 else f"{names[0]}-{names[-1]} ({len(names)} alike)"
        branch = tree.add(_label(title, child, marks.get(below, ())))
        if any(site == below or site.startswith(f"{below}.") for site in marks):
            _grow(branch, child, below, marks)


def _folded(module: nn.Module, path: str, marks: Marks) -> Iterator[tuple[list[str], nn.Module]]:
    """Yields the children; neighbours that are numbered and alike come as one.

    Leaves without parameters and sites (dropout, activations) are left out.
    """
    names: list[str] = []
    last: tuple[Signature, nn.Module] | None = None
    for name, child in module.named_children():
        below = _join(path, name)
        if below not in marks and not any(True for _ in child.parameters()):
            continue
        signature = _signature(child, below, marks)
        if last is not None and name.isdigit() and last[0] == signature:
            names.append(name)
            continue
        if last is not None:
            yield names, last[1]
        names, last = [name], (signature, child)
    if last is not None:
        yield names, last[1]


def _signature(module: nn.Module, path: str, marks: Marks) -> Signature:
    own = tuple((name, tuple(p.shape)) for name, p in module.named_parameters(recurse=False))
    shapes = tuple((site.method, tuple(site.shapes.items())) for site in marks.get(path, ()))
    children = tuple(
        (name, _signature(child, _join(path, name), marks))
        for name, child in module.named_children()
    )
    return type(module), own, shapes, children


def _label(title: str, module: nn.Module, sites: Sequence[PlannedSite]) -> Text:
    text = Text.assemble((title, "bold"), " ", (type(module).__name__, "dim"))
    own = [f"{name} {_shape(p.shape)}" for name, p in module.named_parameters(recurse=False)]
    if own:
        text.append(f"  {', '.join(own)}", "cyan")
    for site in sites:
        leaves = ", ".join(f"{leaf} {_shape(shape)}" for leaf, shape in site.shapes.items())
        text.append(f"  + {site.method}", "bold green")
        text.append(f" {leaves} = {site.count:,}", "green")
    return text


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
