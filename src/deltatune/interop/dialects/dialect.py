"""The dialects: what a kind of PEFT's folders and a method of ours call the same thing.

A dialect turns leaves into PEFT's tensors, and back. Called with leaves on the `meta` device the
first says every name and shape that a folder must have, before one of its tensors is read.
"""

from __future__ import annotations

import abc
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from deltatune.core.errors import ArtefactError, ConfigurationError
from deltatune.core.grammar import build
from deltatune.core.layout import Part
from deltatune.core.leaf import draw
from deltatune.core.method import Leaves, Method
from deltatune.core.site import Site
from deltatune.core.storage import storage_of
from deltatune.interop.configuration import MODULES, Configuration, Keys
from deltatune.interop.places import adapted, target_of, valued

__all__ = ["PREFIX", "Dialect", "ModuleDialect", "Renamed", "placed"]

_LARGEST = 2**31
PREFIX = "base_model.model."  #: of every name of a module in PEFT's files


class Dialect(abc.ABC):
    """One kind of folder.

    Attributes:
        kind: PEFT's `peft_type`.
        reads: the methods that a folder becomes.
        writes: the methods that become a folder.
        note: what of either is refused, for the table.
        keys: those of its configuration.
        whole: the endings of tensors that hold whole numbers.
    """

    kind: ClassVar[str]
    reads: ClassVar[tuple[str, ...]]
    writes: ClassVar[tuple[str, ...]]
    note: ClassVar[str] = ""
    keys: ClassVar[Keys]
    whole: ClassVar[tuple[str, ...]] = ()

    def takes(self, method: Method) -> bool:
        """Whether it writes deltas of this method."""
        return method.name in self.writes and method.strength == 1

    @abc.abstractmethod
    def methods(self, configuration: Configuration, model: nn.Module) -> tuple[Method, ...]:
        """The methods that a configuration means on a model, each with its target.

        Raises ArtefactError for what has no counterpart.
        """

    @abc.abstractmethod
    def tensors(self, parts: Sequence[Part], held: Leaves, model: nn.Module) -> dict[str, Tensor]:
        """PEFT's tensors by name, from the leaves of some parts by full name.

        Raises ConfigurationError for what PEFT cannot express.
        """

    @abc.abstractmethod
    def leaves(
        self, configuration: Configuration, parts: Sequence[Part], found: Leaves, model: nn.Module
    ) -> dict[str, Tensor]:
        """The leaves of some parts by full name, from PEFT's tensors by name."""

    @abc.abstractmethod
    def settings(
        self, parts: Sequence[Part], held: Leaves, model: nn.Module, origin: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The configuration of a folder for some parts.

        Args:
            parts, held, model: as in `tensors`.
            origin: the configuration of the folder that the delta was read from, if it was.
        """

    def unsaved(self, configuration: Configuration) -> tuple[str, ...]:
        """The tensors that a folder of this configuration leaves out, since a seed makes them."""
        del configuration
        return ()


def placed(parts: Sequence[Part]) -> Iterator[tuple[Part, Site, Mapping[str, str]]]:
    """Every site of some parts with its part and the full names of its leaves."""
    for part in parts:
        for site, names in zip(part.sites, part.names, strict=True):
            yield part, site, names


class ModuleDialect(Dialect):
    """A kind that acts at linear modules, each by itself.

    Attributes:
        fields: fields of the method to keys of the configuration; a key with PEFT's value.
        patterns: fields to the keys that give some modules values of their own.
        behind_a_dot: how their keys match, see `valued`.
        constants: further keys that a written configuration has.
        conv1d: whether PEFT acts at the transposed linear modules of GPT-2, too.
        drawn: leaves that PEFT does not store, and which are what they begin as.
    """

    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {}
    patterns: ClassVar[Mapping[str, str]] = {}
    behind_a_dot: ClassVar[bool] = False
    constants: ClassVar[Mapping[str, Any]] = {}
    conv1d: ClassVar[bool] = False
    drawn: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        read: dict[str, Any] = dict(cls.fields.values())
        read |= dict.fromkeys(cls.patterns.values())
        cls.keys = MODULES | Keys(read) | vars(cls).get("keys", Keys())

    @abc.abstractmethod
    def at_site(self, site: Site, method: Method, p: Leaves) -> dict[str, Tensor]:
        """The tensors of one module, behind its name, from the leaves of its site."""

    @abc.abstractmethod
    def from_site(self, site: Site, method: Method, found: Leaves) -> dict[str, Tensor]:
        """The leaves of one site from the tensors of its module."""

    def method_at(self, configuration: Configuration, path: str, module: nn.Module) -> Method:
        """The method at one module, without its target."""
        del module
        return build(self.reads[0], self.values_at(configuration, path))

    def values_at(self, configuration: Configuration, path: str) -> dict[str, Any]:
        """The fields of the method at one module."""
        values = {field: configuration.values[key] for field, (key, _) in self.fields.items()}
        for field, key in self.patterns.items():
            pattern = configuration.pattern(key)
            where, dotted = configuration.where, self.behind_a_dot
            values[field] = valued(pattern, path, values[field], where, behind_a_dot=dotted)
        for field, value in values.items():
            if type(value) is int and abs(value) > _LARGEST:
                configuration.refuse(self.fields[field][0], "a number that a method can have")
        return values

    def methods(self, configuration: Configuration, model: nn.Module) -> tuple[Method, ...]:
        """See Dialect."""
        found: dict[Method, list[str]] = {}
        for path in adapted(model, configuration):
            module = model.get_submodule(path)
            if not storage_of(module).linear:
                raise ArtefactError(
                    f"{configuration.where}: {path} is a {type(module).__name__}, and deltatune "
                    f"reads {self.kind} at linear modules alone."
                )
            found.setdefault(self.method_at(configuration, path, module), []).append(path)
        return tuple(
            dataclasses.replace(method, at=target_of(model, paths, method.face))
            for method, paths in found.items()
        )

    def tensors(self, parts: Sequence[Part], held: Leaves, model: nn.Module) -> dict[str, Tensor]:
        """See Dialect."""
        found: dict[str, Tensor] = {}
        for part, site, names in placed(parts):
            self._check(part, site)
            p = {leaf: held[full] for leaf, full in names.items()}
            for ending, value in self.at_site(site, part.method, p).items():
                name = f"{PREFIX}{site.path}.{ending}"
                if name in found:
                    raise ConfigurationError(
                        f"{site.path} has {self.kind} twice, which PEFT cannot keep. Save each "
                        "alone, or make one LoRA of both: as_delta(effective(delta))."
                    )
                found[name] = value
        return found

    def _check(self, part: Part, site: Site) -> None:
        if site.rows is not None:
            raise ConfigurationError(
                f"{part.method.name} acts on a part of {site.path}; PEFT's {self.kind} takes the "
                f"fused module whole. Name it so: at={site.path.rsplit('.', 1)[-1]!r}."
            )
        if not storage_of(site.module).linear:
            raise ConfigurationError(
                f"PEFT has {self.kind} at linear modules alone; {site.path} is a "
                f"{type(site.module).__name__}. Choose at='linear', or keep it as a delta."
            )
        if type(site.module).__name__ == "Conv1D" and not self.conv1d:
            raise ConfigurationError(
                f"PEFT has no {self.kind} at {site.path}, a Conv1D. Nearest: a LoRA, "
                "as_delta(effective(delta))."
            )

    def leaves(
        self, configuration: Configuration, parts: Sequence[Part], found: Leaves, model: nn.Module
    ) -> dict[str, Tensor]:
        """See Dialect."""
        made: dict[str, Tensor] = {}
        for part, site, names in placed(parts):
            start = f"{PREFIX}{site.path}."
            own = {n.removeprefix(start): v for n, v in found.items() if n.startswith(start)}
            own = self.from_site(site, part.method, own)
            own |= {
                leaf: draw(part.leaves[names[leaf]], 0, names[leaf])
                for leaf in self.drawn
                if leaf in names
            }
            made |= {full: own[leaf] for leaf, full in names.items() if leaf in own}
        return made

    def settings(
        self, parts: Sequence[Part], held: Leaves, model: nn.Module, origin: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See Dialect."""
        del held, model, origin
        paths = {site.path: part.method for part, site, _ in placed(parts)}
        values: dict[str, Any] = {"target_modules": sorted(paths), **self.constants}
        for field, (key, _) in self.fields.items():
            own = {path: getattr(method, field) for path, method in paths.items()}
            values[key], pattern = common(own)
            if not pattern:
                continue
            if field not in self.patterns:
                raise ConfigurationError(
                    f"{self.kind} has one {key} for all modules in PEFT; found "
                    f"{sorted(map(str, set(own.values())))}. Save parts of one {field} alone."
                )
            values[self.patterns[field]] = pattern
        return values


class Renamed(ModuleDialect):
    """A kind whose tensors are the leaves under other names.

    Attributes:
        names: leaves to the endings of tensors.
    """

    names: ClassVar[Mapping[str, str]]

    def at_site(self, site: Site, method: Method, p: Leaves) -> dict[str, Tensor]:
        """See ModuleDialect."""
        return {ending: p[leaf] for leaf, ending in self.names.items() if leaf in p}

    def from_site(self, site: Site, method: Method, found: Leaves) -> dict[str, Tensor]:
        """See ModuleDialect."""
        return {leaf: found[end] for leaf, end in self.names.items() if end in found}


def common(own: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The value that most modules have, and those of the others by their names."""
    usual = Counter(own.values()).most_common(1)[0][0]
    return usual, {path: value for path, value in own.items() if value != usual}
