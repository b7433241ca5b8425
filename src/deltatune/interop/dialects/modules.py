"""Modules that are trained whole: PEFT's LN-tuning, and its `modules_to_save` beside any kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.errors import ArtefactError, ConfigurationError, TargetError
from deltatune.core.grammar import build
from deltatune.core.layout import Part
from deltatune.core.leaf import draw
from deltatune.core.method import METHODS, Leaves, Method
from deltatune.core.select import Values
from deltatune.core.target import find_sites
from deltatune.interop.configuration import MODULES, Configuration
from deltatune.interop.dialects.dialect import PREFIX, Dialect, placed
from deltatune.interop.places import adapted, saved, target_of

__all__ = [
    "LNTuning",
    "check_untied",
    "is_whole",
    "whole_leaves",
    "whole_methods",
    "whole_tensors",
]


class LNTuning(Dialect):
    """LN-tuning: modules whose parameters are values of their own."""

    kind = "LN_TUNING"
    reads = ("ln_tuning",)
    writes = ("ln_tuning", "last_layer", "selective_module", "head")
    note = "methods that train modules whole; beside another kind they are modules_to_save"
    keys = MODULES

    def takes(self, method: Method) -> bool:
        """See Dialect."""
        return method.name == "ln_tuning" and method.strength == 1

    def methods(self, configuration: Configuration, model: nn.Module) -> tuple[Method, ...]:
        """See Dialect."""
        target = target_of(model, adapted(model, configuration), "select")
        return (build("ln_tuning", {"at": target}),)

    def tensors(self, parts: Sequence[Part], held: Leaves, model: nn.Module) -> dict[str, Tensor]:
        """See Dialect."""
        return whole_tensors(parts, held, "ln_tuning_layers.")

    def leaves(
        self, configuration: Configuration, parts: Sequence[Part], found: Leaves, model: nn.Module
    ) -> dict[str, Tensor]:
        """See Dialect."""
        return whole_leaves(parts, found, "ln_tuning_layers.")

    def settings(
        self, parts: Sequence[Part], held: Leaves, model: nn.Module, origin: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See Dialect."""
        return {"target_modules": [site.path for _, site, _ in placed(parts)]}


def is_whole(part: Part) -> bool:
    """Whether a part gives all parameters of its modules values of their own."""
    if part.method.name == "head":
        return True
    if part.method.face != "select" or part.method.strength != 1 or not part.sites:
        return False
    return all(
        all(isinstance(form, Values) for form in forms.values())
        and forms.keys() == {name for name, value in site.parameters.items() if value is not None}
        for site, forms in zip(part.sites, part.forms, strict=True)
    )


def whole_methods(configuration: Configuration, model: nn.Module) -> tuple[Method, ...]:
    """What `modules_to_save` means on a model: the classifier a head, all else values.

    PEFT names `classifier` and `score` for every classifier; those that are not there are none.
    """
    paths = [
        name
        for path in saved(model, configuration.texts("modules_to_save"))
        for name, module in model.get_submodule(path).named_modules(prefix=path)
        if any(value is not None for value in module._parameters.values())
    ]
    paths = list(dict.fromkeys(paths))
    found: list[Method] = []
    try:
        heads = METHODS["head"]().choose(find_sites(model, "head", "weight"))
    except TargetError:
        heads = ()
    for site in heads:
        if site.path in paths and site.rows is None:
            paths.remove(site.path)
            found.append(build("head", {"labels": site.outputs}))
    if paths:
        found.insert(0, build("last_layer", {"at": target_of(model, paths, "select")}))
    return tuple(found)


def whole_tensors(parts: Sequence[Part], held: Leaves, behind: str = "") -> dict[str, Tensor]:
    """PEFT's tensors of modules that are trained whole.

    Args:
        parts: of them.
        held: leaves by full name.
        behind: what stands between the name of a module and that of a parameter.

    Raises ConfigurationError for what PEFT cannot express.
    """
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    for part, site, names in placed(parts):
        p = {leaf: held[full] for leaf, full in names.items()}
        if part.method.name == "head":
            bias = p["bias"] + p["mask"]
            if site.parameters.get("bias") is None:
                if not bias.is_meta and bool(bias.any()):
                    raise ConfigurationError(
                        f"{site.path} has no bias, and the head has one. There is no nearest: "
                        "train the head with its bias at zero, or keep it as a delta."
                    )
                p = {"weight": p["weight"]}
            else:
                p = {"weight": p["weight"], "bias": bias}
        elif used & set(names.values()):
            raise ConfigurationError(
                f"{site.path} shares its parameters with another module, and PEFT would save each "
                "apart. Keep it as a delta."
            )
        used |= set(names.values())
        found |= {f"{PREFIX}{site.path}.{behind}{name}": value for name, value in p.items()}
    return found


def whole_leaves(parts: Sequence[Part], found: Leaves, behind: str = "") -> dict[str, Tensor]:
    """The leaves of modules that are trained whole, from PEFT's tensors. See `whole_tensors`."""
    made: dict[str, Tensor] = {}
    for part, site, names in placed(parts):
        for leaf, full in names.items():
            value = found.get(f"{PREFIX}{site.path}.{behind}{leaf}")
            if value is None and leaf == "bias":
                value = torch.zeros(part.leaves[full].shape)
            made[full] = draw(part.leaves[full], 0, full) if value is None else value
    return made


def check_untied(parts: Sequence[Part], where: str) -> None:
    """Raises ArtefactError if a module that is trained whole shares a parameter with another."""
    kept = [full for part, _, names in placed(parts) for full in names.values()]
    if len(kept) > len(set(kept)):
        name = next(full for full in kept if kept.count(full) > 1)
        raise ArtefactError(
            f"{where}: {name.split('/')[1]} shares its parameters with another module of this "
            "model; PEFT trains one apart from the other, a delta both. Untie them first."
        )
