"""One registry for everything that is found by name: methods, families, storages, tasks.

Entries may be lazy: a name and the module that defines it. The module is imported when the entry is
first asked for, so that listing names costs nothing. A name is registered once; who took it is
said.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from deltatune.core.errors import ConfigurationError, UnknownNameError

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Names to entries.

    Args:
        kind: what an entry is, in the singular; used in messages.
        source: the package that fills the registry, imported when it is first asked. A lower
            package thus learns of a higher one's entries without importing it.
    """

    def __init__(self, kind: str, *, source: str | None = None) -> None:
        self.kind = kind
        self._source = source
        self._entries: dict[str, T] = {}
        self._lazy: dict[str, str] = {}

    def add(self, name: str, entry: T) -> T:
        """Registers `entry` under `name`. Raises ConfigurationError if the name is taken."""
        if name in self._entries and self._entries[name] is not entry:
            origin = getattr(self._entries[name], "__module__", "another module")
            raise ConfigurationError(
                f"The {self.kind} {name!r} is registered already, by {origin}. Choose another name."
            )
        self._entries[name] = entry
        return entry

    def add_lazy(self, name: str, module: str) -> None:
        """Announces that importing `module` registers `name`."""
        self._lazy.setdefault(name, module)

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that registers what it decorates under `name`."""
        return lambda entry: self.add(name, entry)

    def _fill(self) -> None:
        if self._source is not None:
            source, self._source = self._source, None
            importlib.import_module(source)

    def __getitem__(self, name: str) -> T:
        self._fill()
        if name not in self._entries and name in self._lazy:
            importlib.import_module(self._lazy[name])
        if name not in self._entries:
            raise UnknownNameError(self.kind, name, self)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._fill()
        return name in self._entries or name in self._lazy

    def __iter__(self) -> Iterator[str]:
        self._fill()
        return iter(sorted({*self._entries, *self._lazy}))

    def __len__(self) -> int:
        self._fill()
        return len({*self._entries, *self._lazy})
