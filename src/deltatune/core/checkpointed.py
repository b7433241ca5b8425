"""What is checkpointed, with the text that it was first computed with.

It goes in the place of the function that a module of transformers checkpoints with; see
`core.text`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from deltatune.core.text import Text, TextReader

__all__ = ["Checkpoint"]


@dataclass(eq=False)
class _Carried:
    """What is checkpointed, with the text that it was first computed with.

    It is called with what is carried in front of its own arguments, and gives what it carries on
    behind its own results.

    Attributes:
        names: of what is carried into it.
        changed: of what it carries on; known after its first call.
        alone: whether its own result is one, and no tuple.
    """

    reader: TextReader
    text: Text
    function: Callable[..., Any]
    names: tuple[str, ...]
    changed: tuple[str, ...] = ()
    alone: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        count = len(self.names)
        given = dict(zip(self.names, args[:count], strict=True))
        text = replace(self.text, states=dict(given))
        with self.reader.once_more(text):
            output = self.function(*args[count:], **kwargs)
        states = text.states
        self.changed = tuple(name for name in states if states[name] is not given.get(name))
        self.alone = not isinstance(output, tuple)
        if not self.changed:
            return output
        output = (output,) if self.alone else output
        return (*output, *(states[name] for name in self.changed))

    def take(self, output: Any, states: dict[str, Tensor]) -> Any:
        """Its own result; what it carries on is put among the states."""
        if not self.changed:
            return output
        count = len(self.changed)
        states.update(zip(self.changed, output[-count:], strict=True))
        return output[0] if self.alone else output[:-count]


@dataclass(eq=False)
class Checkpoint:
    """In the place of the function that a module is checkpointed with."""

    reader: TextReader
    text: Text
    function: Callable[..., Any]

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The call of a checkpointed function, with what is carried among its arguments."""
        states = self.text.states
        # Without the states: they lead to the graph that holds what is checkpointed.
        inside = _Carried(self.reader, replace(self.text, states={}), function, tuple(states))
        return inside.take(self.function(inside, *states.values(), *args, **kwargs), states)
