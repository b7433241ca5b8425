"""One registry for everything that is found by name: methods, families, storages, tasks.

Entries may be lazy: a name and the module that defines it. The module is imported when the entry is
first asked for, so that listing names costs nothing. Entries may come from other distributions,
which declare them as entry points; those are looked up when a name is not among the others, or all
are listed, and loaded when asked for. A name is registered once; who took it is said.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from deltatune.core.errors import ConfigurationError, UnknownNameError

__all__ = ["Names", "Registry"]

T = TypeVar("T")


class Names:
    """A namespace, which several registries may share: no name in it means two things."""

    def __init__(self) -> None:
        self._owners: dict[str, tuple[str, str]] = {}
        self.sources: list[str] = []  #: the packages that fill its registries, until imported

    def fill(self) -> None:
        """Imports what fills the registries."""
        while self.sources:
            importlib.import_module(self.sources.pop(0))

    def take(self, name: str, kind: str, entry: str) -> None:
        """Gives `name` to the `kind` called `entry`. Raises ConfigurationError if it is taken."""
        owner = self._owners.setdefault(name, (kind, entry))
        if owner != (kind, entry):
            raise ConfigurationError(
                f"The {kind} {entry!r} cannot be found as {name!r}: the {owner[0]} {owner[1]!r} "
                "is. Choose another name."
            )

    def owner(self, name: str, otherwise: str) -> str:
        """What kind of entry has the name, or what is said otherwise."""
        return self._owners.get(name, (otherwise, name))[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)


class Registry(Mapping[str, T], Generic[T]):
    """Names to entries. An entry is listed by its name and found by its aliases, too.

    Args:
        kind: what an entry is, in the singular; used in messages.
        source: the package that fills the registry, imported when it is first asked. A lower
            package thus learns of a higher one's entries without importing it.
        group: of the entry points by which other distributions declare entries. Importing what an
            entry point names must register the name that it has.
        names: a namespace that the registry shares with others; left out, it has its own.
    """

    def __init__(
        self,
        kind: str,
        *,
        source: str | None = None,
        group: str | None = None,
        names: Names | None = None,
    ) -> None:
        self.kind = kind
        self._names = Names() if names is None else names
        self._names.sources += [] if source is None else [source]
        self._group = group
        self._entries: dict[str, T] = {}
        self._lazy: dict[str, str] = {}
        self._aliases: dict[str, str] = {}
        self._declared: dict[str, list[EntryPoint]] | None = None

    def add(self, name: str, entry: T, aliases: Sequence[str] = ()) -> T:
        """Registers `entry` under `name`, to be found by its aliases too.

        Raises ConfigurationError if one of these names is taken.
        """
        self._names.fill()
        module = getattr(entry, "__module__", "another module")
        if name not in self._lazy:
            self._import_all()  # what has aliases, so that a clash is the fault of who comes last
        owner = getattr(self._entries.get(name), "__module__", self._lazy.get(name, module))
        if owner != module or self._entries.get(name, entry) is not entry:
            raise ConfigurationError(
                f"The {self.kind} {name!r} is registered already, by {owner}. Choose another name."
            )
        for taken in (name, *aliases):
            self._names.take(taken, self.kind, name)
        self._aliases |= dict.fromkeys(aliases, name)
        self._entries[name] = entry
        return entry

    def add_lazy(self, name: str, module: str) -> None:
        """Announces that importing `module` registers `name`."""
        self._names.take(name, self.kind, name)
        self._lazy.setdefault(name, module)

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that registers what it decorates under `name`."""
        return lambda entry: self.add(name, entry)

    def canonical(self, name: str) -> str | None:
        """The name that an entry is listed by, from that or one of its aliases; None if unknown."""
        self._names.fill()
        if name in self._entries or name in self._lazy:
            return name
        if name not in self._aliases:
            self._import_all()
        if name not in self._aliases:
            if name in self._plugins():
                return name
            for plugin in self._plugins():
                try:
                    self._load(plugin)
                except ConfigurationError:
                    continue  # told to whoever asks for it
        return self._aliases.get(name)

    def _import_all(self) -> None:
        for module in self._lazy.values():
            importlib.import_module(module)

    def _plugins(self) -> dict[str, list[EntryPoint]]:
        """The entry points of other distributions by name, without those whose name is taken."""
        if self._declared is not None:
            return self._declared
        self._declared = {}
        for point in () if self._group is None else entry_points(group=self._group):
            self._import_all()  # their aliases are taken, too
            owner = self._names.owner(point.name, self.kind)
            if point.name in self._lazy or point.name in self._aliases or owner != self.kind:
                warnings.warn(
                    f"The {self.kind} {point.name!r} of {_distribution(point)} is left out: that "
                    "name is taken.",
                    stacklevel=2,
                )
            else:
                self._declared.setdefault(point.name, []).append(point)
        return self._declared

    def _load(self, name: str) -> T:
        if name not in self._entries and name in self._lazy:
            importlib.import_module(self._lazy[name])
        elif name not in self._entries:
            points = self._plugins()[name]
            who = " and ".join(map(_distribution, points))
            if len(points) > 1:
                raise ConfigurationError(
                    f"The {self.kind} {name!r} is declared by {who}. Keep one of them."
                )
            try:
                points[0].load()
            except Exception as error:
                self._entries.pop(name, None)
                raise ConfigurationError(
                    f"The {self.kind} {name!r} of {who} cannot be loaded: "
                    f"{type(error).__name__}: {error}. Mend or uninstall it."
                ) from error
            if name not in self._entries:
                raise ConfigurationError(
                    f"The {self.kind} {name!r} of {who} is not there: importing "
                    f"{points[0].value} registers no such name. Mend or uninstall it."
                )
        return self._entries[name]

    def __getitem__(self, name: str) -> T:
        found = self.canonical(name)
        if found is None:
            raise UnknownNameError(self.kind, name, self, self._names)
        return self._load(found)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.canonical(name) is not None

    def __iter__(self) -> Iterator[str]:
        self._names.fill()
        return iter(sorted({*self._entries, *self._lazy, *self._plugins()}))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _distribution(point: EntryPoint) -> str:
    return "a distribution" if point.dist is None else f"the distribution {point.dist.name!r}"
