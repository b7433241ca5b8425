"""Attaching: an expression becomes a delta that acts on a model, or nothing has changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from deltatune.core.bank import Bank
from deltatune.core.delta import Delta, check_alike, deltas_of
from deltatune.core.errors import ConfigurationError, StateError
from deltatune.core.grammar import Expression
from deltatune.core.host import Host, host_of
from deltatune.core.in_place import InPlaceBank
from deltatune.core.layout import Part, Sharing, layout, leaves_of

__all__ = ["attach", "attach_values"]


def attach(
    model: nn.Module,
    methods: Expression | Sequence[Expression],
    *,
    slots: int = 1,
    seed: int | Sequence[int] = 0,
    sharing: Sharing = "none",
) -> Delta:
    """Binds an expression to a model, freezes the model, and makes the delta act.

    Args:
        model: any module whose places are known or can be inferred; also on the `meta` device.
        methods: one expression for all slots, or one for each slot. Those may differ only in the
            fields that a method names as its `slot_fields`.
        slots: K, where one expression is given.
        seed: of slot 0, the others counting up from it, or one for each slot.
        sharing: what the slots have in common, as one tensor drawn by the seed of slot 0: "none";
            "method": the `shared_leaves` of the methods; "all": all but those of heads.

    Raises:
        TargetError, UnsupportedError: see `layout` and `shared_names`.
        ConfigurationError: the slots' expressions do not fit one bank.
        StateError: a control that trains in place cannot stand beside a delta.
    """
    expressions = [methods] * slots if isinstance(methods, Expression) else list(methods)
    seeds = [seed + k for k in range(len(expressions))] if isinstance(seed, int) else list(seed)
    if not expressions or len(seeds) != len(expressions):
        raise ConfigurationError(
            f"{len(expressions)} slots need as many seeds; {len(seeds)} were given."
        )
    check_alike(expressions)
    layouts = [layout(model, expression) for expression in expressions]

    def draw(bank: Bank | InPlaceBank) -> None:
        for slot, (parts, own) in enumerate(zip(layouts, seeds, strict=True)):
            bank.draw(slot, leaves_of(parts), own, shared=slot == 0)

    return _bound(model, expressions, layouts[0], seeds, sharing, draw)


def attach_values(
    model: nn.Module,
    expression: Expression,
    parts: Sequence[Part],
    values: Mapping[str, Tensor],
    *,
    seed: int = 0,
) -> Delta:
    """Binds an expression with its layout on the model and the values of its leaves, by full name,
    which are not drawn first. Raises as `attach`.
    """

    def write(bank: Bank | InPlaceBank) -> None:
        if isinstance(bank, InPlaceBank):
            bank.draw(0, {}, seed, shared=True)
        bank.write(0, values)

    return _bound(model, [expression], parts, [seed], "none", write)


def _bound(
    model: nn.Module,
    expressions: Sequence[Expression],
    parts: Sequence[Part],
    seeds: Sequence[int],
    sharing: Sharing,
    fill: Callable[[Bank | InPlaceBank], None],
) -> Delta:
    """A delta that acts on the model, or none and the model as it was."""
    _check_alone(model, expressions)
    host = host_of(model) or Host(model)
    delta: Delta | None = None
    try:
        delta = Delta(host, expressions, parts, seeds, sharing)
        fill(delta.bank)
        delta.install()
    except BaseException:
        if delta is not None and delta.attached:
            delta.detach()
        host.sweep()
        raise
    host.warn_of_drawn()
    return delta


def _check_alone(model: nn.Module, expressions: Sequence[Expression]) -> None:
    control = any(expression.in_place for expression in expressions)
    crowded = len(expressions) > 1 or any(len(expression.methods) > 1 for expression in expressions)
    held = [delta for delta in deltas_of(model) if control or isinstance(delta.bank, InPlaceBank)]
    if (control and crowded) or held:
        names = f" (attached: {', '.join(delta.name for delta in held)})" if held else ""
        raise StateError(
            "A control that trains the backbone in place stands alone: one slot, no other method, "
            f"no other delta{names}."
        )
