"""(IA)³ in PEFT: a gain of what a module gives, or of what it reads where it is listed so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from deltatune.core.grammar import build
from deltatune.core.layout import Part
from deltatune.core.method import Leaves, Method
from deltatune.core.site import Site
from deltatune.interop.configuration import Configuration, Keys
from deltatune.interop.dialects.dialect import ModuleDialect, placed
from deltatune.interop.places import matching

__all__ = ["IA3"]


class IA3(ModuleDialect):
    """(IA)³."""

    kind = "IA3"
    reads = writes = ("ia3",)
    keys = Keys(read={"feedforward_modules": None}, idle=frozenset({"init_ia3_weights"}))
    conv1d = True

    def method_at(self, configuration: Configuration, path: str, module: nn.Module) -> Method:
        """See ModuleDialect."""
        del module
        listed = configuration.values["feedforward_modules"]
        if isinstance(listed, str):
            reads = matching(listed, path, configuration.where) is not None
        else:
            reads = path.endswith(tuple(configuration.texts("feedforward_modules")))
        return build("ia3", {"side": "input" if reads else "output"})

    def at_site(self, site: Site, method: Method, p: Leaves) -> dict[str, Tensor]:
        """See ModuleDialect."""
        return {"ia3_l": p["in"].unsqueeze(0) if "in" in p else p["out"].unsqueeze(1)}

    def from_site(self, site: Site, method: Method, found: Leaves) -> dict[str, Tensor]:
        """See ModuleDialect."""
        name = "in" if "in" in method.init(site) else "out"
        return {name: found["ia3_l"].flatten()}

    def settings(
        self, parts: Sequence[Part], held: Leaves, model: nn.Module, origin: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See Dialect."""
        values = super().settings(parts, held, model, origin)
        reads = [site.path for _, site, names in placed(parts) if "in" in names]
        return {**values, "feedforward_modules": sorted(reads)}
