"""The methods, one file each. The folder is the registry: a file's name is its method's."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from deltatune.core.method import METHODS, Method

_NAMES = tuple(module.name for module in pkgutil.iter_modules(__path__))
for _name in _NAMES:
    METHODS.add_lazy(_name, f"{__name__}.{_name}")


def __getattr__(name: str) -> Any:
    """The class called `name`, for example LoRA, from whichever file defines it."""
    if name.startswith("_"):
        raise AttributeError(name)
    for method in (METHODS[known] for known in _NAMES):
        if method.__name__ == name:
            return method
    if name in _NAMES:
        return importlib.import_module(f"{__name__}.{name}")
    known_classes = ", ".join(METHODS[known].__name__ for known in _NAMES)
    raise AttributeError(f"There is no method class {name!r}. Known: {known_classes}.")


def __dir__() -> list[str]:
    return sorted(METHODS[name].__name__ for name in _NAMES if issubclass(METHODS[name], Method))
