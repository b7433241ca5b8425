"""What deltas a model carries, and in which state each is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from deltatune.core.delta import Delta, deltas_of

__all__ = ["DeltaStatus", "SlotStatus", "Status", "status"]


@dataclass(frozen=True)
class SlotStatus:
    """The state of one slot.

    Attributes:
        trainable: entries that training changes; 0 if the slot is frozen.
        saved: the folder it was last saved to or loaded from; None if there is none.
        changed: whether its tensors are no longer those of that folder.
    """

    trainable: int
    saved: str | None
    changed: bool


@dataclass(frozen=True)
class DeltaStatus:
    """The state of one delta.

    Attributes:
        name: its expression.
        attached: whether a model carries it.
        active: whether it acts: switched on, or merged.
        merged: whether it stands in the backbone's weights, and which of its slots; else None.
        rows: the slot of each row of the batches it is routed for; None where it is not routed.
        slots: one entry each.
    """

    name: str
    attached: bool
    active: bool
    merged: int | None
    rows: tuple[int | None, ...] | None
    slots: tuple[SlotStatus, ...]

    @classmethod
    def of(cls, delta: Delta) -> DeltaStatus:
        """Reads it off a delta, attached or not."""
        return cls(
            name=delta.name,
            attached=delta.attached,
            active=delta.attached and (delta.enabled or delta.merged),
            merged=delta.merged_slot,
            rows=delta.routed,
            slots=tuple(_slot(delta, slot) for slot in range(delta.slots)),
        )


@dataclass(frozen=True)
class Status:
    """The deltas of a model, in the order in which they act. Its text is a table."""

    deltas: tuple[DeltaStatus, ...]

    def __str__(self) -> str:
        if not self.deltas:
            return "no delta is attached"
        head = ("delta", "slot", "active", "trainable", "merged", "rows", "saved")
        rows = [head, *(line for delta in self.deltas for line in _lines(delta))]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(lines)


def status(model: nn.Module) -> Status:
    """The state of every delta attached to a model.

    Example:
        `print(dt.status(model))`
    """
    return Status(tuple(map(DeltaStatus.of, deltas_of(model))))


def _slot(delta: Delta, slot: int) -> SlotStatus:
    folder, content = delta.saved.get(slot, (None, None))
    changed = folder is not None and content != delta.bank.digest(slot)
    return SlotStatus(0 if delta.is_frozen(slot) else delta.bank.numel, folder, changed)


def _lines(delta: DeltaStatus) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for number, slot in enumerate(delta.slots):
        rows = None if delta.rows is None else [i for i, s in enumerate(delta.rows) if s == number]
        lines.append(
            (
                delta.name if number == 0 else "",
                str(number),
                "yes" if delta.active else "no",
                f"{slot.trainable:,}" if slot.trainable else "frozen",
                "yes" if delta.merged == number else "no",
                "all" if rows is None else ", ".join(map(str, rows)) or "none",
                "no" if slot.saved is None else slot.saved + (", changed" if slot.changed else ""),
            )
        )
    return lines
