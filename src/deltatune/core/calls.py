"""Arguments and results of a module's call, as far as the rows of a batch are concerned."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.errors import UnsupportedError

__all__ = ["bound", "in_order", "of_rows", "parameter_names", "read_first"]


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a module's forward, without self."""
    return _names(type(module).forward)


@functools.cache
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def bound(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def read_first(
    names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a forward with the first of them, which faces read, given by position.

    Args:
        names: of the forward's arguments.
        args, kwargs: of a call.
    """
    if args or not names or names[0] not in kwargs:
        return args, kwargs
    return (kwargs[names[0]],), {name: v for name, v in kwargs.items() if name != names[0]}


def of_rows(
    rows: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of some rows of a call whose first argument is [rows, ...].

    Raises UnsupportedError where one cannot be cut into rows.
    """
    index, size = torch.tensor(rows, device=args[0].device), args[0].shape[0]

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == size:
            return value[index]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise UnsupportedError(
            "A module is called with more than its rows, so the rows of a batch cannot use "
            "different slots of it. Route the whole batch to one slot."
        )

    return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}


def in_order(pieces: Sequence[Any], order: Tensor) -> Any:
    """The results of groups of rows as one, the rows put in the order that `order` says they come
    in.

    A module may flatten rows into tokens on the way: each row is then a run of entries. A tuple (a
    router gives scores, weights and choices) is put in order part by part.
    """
    if isinstance(pieces[0], tuple):
        return tuple(in_order(parts, order) for parts in zip(*pieces, strict=True))
    whole = torch.cat(list(pieces))
    runs = whole.reshape(len(order), -1, *whole.shape[1:])
    return runs[order.argsort()].flatten(0, 1)
