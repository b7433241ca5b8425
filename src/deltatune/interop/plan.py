"""What a configuration of PEFT means on a model: methods, their leaves, and the tensors' shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from deltatune.core.errors import ArtefactError
from deltatune.core.grammar import Expression
from deltatune.core.layout import Part, layout, leaves_of
from deltatune.interop.adopting import check_sizes
from deltatune.interop.configuration import Configuration
from deltatune.interop.dialects.dialect import Dialect
from deltatune.interop.dialects.modules import (
    check_untied,
    whole_leaves,
    whole_methods,
    whole_tensors,
)
from deltatune.interop.table import DIALECTS, reason

__all__ = ["Plan"]

_TASKS = (
    *(None, "CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_2_SEQ_LM", "SEQ_CLS"),
    "TOKEN_CLS",
)


@dataclass(frozen=True)
class Plan:
    """What a configuration means on a model.

    Attributes:
        dialect: its kind.
        configuration: its values.
        model: the model.
        own: the parts of the kind itself.
        whole: those that its `modules_to_save` are.
    """

    dialect: Dialect
    configuration: Configuration
    model: nn.Module
    own: tuple[Part, ...]
    whole: tuple[Part, ...]

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str, model: nn.Module) -> Self:
        """Reads a configuration; allocates nothing.

        Args:
            values: of the configuration.
            where: how errors call it.
            model: the model.

        Raises:
            ArtefactError: it has no counterpart.
            DeltatuneError: a method or the model refuses it.
        """
        kind = values.get("peft_type")
        if not isinstance(kind, str) or kind not in DIALECTS:
            raise ArtefactError(f"{where}: {reason(kind)}")
        dialect = DIALECTS[kind]
        configuration = Configuration(where, values, dialect.keys)
        if values.get("task_type") not in _TASKS:
            configuration.refuse("task_type", f"null or one of {', '.join(filter(None, _TASKS))}")
        own = dialect.methods(configuration, model)
        whole = whole_methods(configuration, model)
        parts = layout(model, Expression(own + whole))
        check_sizes(parts, where)
        check_untied(parts[len(own) :], where)
        return cls(dialect, configuration, model, parts[: len(own)], parts[len(own) :])

    @property
    def expression(self) -> Expression:
        """The methods."""
        return Expression(tuple(part.method for part in self.own + self.whole))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that the folder must have."""
        blank = {
            name: torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
            for name, leaf in leaves_of(self.own + self.whole).items()
        }
        tensors = self.dialect.tensors(self.own, blank, self.model)
        tensors |= whole_tensors(self.whole, blank)
        unsaved = self.dialect.unsaved(self.configuration)
        return {name: tuple(t.shape) for name, t in tensors.items() if name not in unsaved}

    def leaves(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The leaves from the folder's tensors. Raises ArtefactError if they do not fit."""
        made = self.dialect.leaves(self.configuration, self.own, found, self.model)
        made |= whole_leaves(self.whole, found)
        for name, leaf in leaves_of(self.own + self.whole).items():
            if tuple(made[name].shape) != leaf.shape:
                raise ArtefactError(f"{self.configuration.where} does not fill {name}.")
        return made
