"""Tasks that need no download: their rows are built from what is installed, or generated.

Nothing of others' text lies in this package. A builder names what its rows depend on, so that a
score can name it too and a kept copy is used for the same versions only.
"""

from __future__ import annotations

from collections.abc import Mapping

from deltatune.core.registry import Registry
from deltatune.tasks.embedded.builder import Builder
from deltatune.tasks.embedded.docstring_tasks import DOCSTRING_BUILDERS
from deltatune.tasks.embedded.minimal_pairs import MINIMAL_PAIRS

__all__ = ["BUILDERS", "Builder"]


def _registry(builders: Mapping[str, Builder]) -> Registry[Builder]:
    registry: Registry[Builder] = Registry("builder of an embedded task")
    for name, builder in builders.items():
        registry.add(name, builder)
    return registry


BUILDERS: Registry[Builder] = _registry({**DOCSTRING_BUILDERS, "minimal_pairs": MINIMAL_PAIRS})
"""Name to builder."""
