"""Methods: the mathematics of a delta, as frozen values.

A method defines `init` and exactly one face. From these alone the kernel derives its counts, its
artefact, its merge, its routing and its training. A method names no model, device, dtype or file.

| face | gets | gives |
|---|---|---|
| `weight` | frozen W (out, in), b, leaves | the new W and b, computed in fp32 |
| `output` | input x and output y of a module or span, leaves | the new y |
| `attend` | leaves | keys and values [tokens, width] that join an attention, or stand beside it |
| `embed` | leaves | virtual tokens [tokens, width] that go in front of the embedded text |
| `select` | a site | the parameters to tune, each with the form of its leaf |
| `mix` | x, what other methods make of it, leaves | their weights; see `core.mixer` |

A `weight` face that adds a product of two factors, W' = W + B A, is given by `factors` alone: the
kernel folds it, adds it to the output, or computes it together with the frozen map.

What a method does in training beside following the gradient (draws, penalties, events) stands in
`core.policy`.

An `output` face that must know which tokens are real, and where they stand, is given by `read`.
What its tokens let others read is given by `show` beside it: the kernel keeps it in the model's
cache. What a site hands on to the next of the same call is given by `carry`: such a method has a
road of its own beside the blocks, and where `read` leaves y alone, the blocks have no graph.
Virtual tokens that depend on the text are given by `embed_for`.

`fast` may stand beside any other `weight`: a cheaper road to the same result. It sees a slot axis
or none: leaves are [..., rows, columns] and x is [..., tokens, features]; write products with `.mT`
and give a vector leaf a token axis with `.unsqueeze(-2)`. The conformance suite holds it to the
weight face. `factors` sees leaves in the same way.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from deltatune.core.errors import ConfigurationError
from deltatune.core.leaf import Leaf
from deltatune.core.policy import Draws, Found, Held, Moment, Wanted
from deltatune.core.registry import Names, Registry
from deltatune.core.select import Form
from deltatune.core.site import Site

if TYPE_CHECKING:
    from deltatune.core.grammar import Expression
    from deltatune.core.text import Text

__all__ = [
    "FACES",
    "MERGED",
    "METHODS",
    "NAMES",
    "Category",
    "Face",
    "Leaves",
    "Method",
    "ReviewCategory",
    "register",
]

Leaves = Mapping[str, Tensor]
Face = Literal["weight", "output", "attend", "embed", "select", "mix"]
Category = Literal["addition", "specification", "reparameterisation", "control", "head"]
ReviewCategory = Literal[
    "additive", "partial", "reparameterised", "hybrid", "unified", "control", "head"
]
FACES: tuple[Face, ...] = ("weight", "output", "attend", "embed", "select", "mix")
MERGED: tuple[Face, ...] = ("weight", "select")  #: the faces that can be written into weights


@dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """The base of every method.

    Attributes:
        at: the target that names its sites; None means `default_at`.
        dropout: rate of dropout on the input that `fast` reads, in training mode; the kernel draws
            it.
        strength: by which all that it changes is multiplied, written `0.5 * lora`.
    """

    at: str | None = None
    dropout: float = 0.0
    strength: float = 1.0

    name: ClassVar[str]
    face: ClassVar[Face]
    aliases: ClassVar[tuple[str, ...]] = ()  #: other names by which texts find it
    category: ClassVar[Category]  #: after Ding et al. 2023
    review_category: ClassVar[ReviewCategory]  #: after Xu et al. 2023
    count: ClassVar[str]  #: entries trained at one site, in the symbols of docs/methods.md
    default_at: ClassVar[str]
    learning_rate: ClassVar[float]  #: a rate that trains it well with AdamW, to start a search from
    identity: ClassVar[bool] = True  #: whether a fresh delta leaves the model's function unchanged
    at_input: ClassVar[bool] = False  #: an output face on what a module reads: y is its input
    in_place: ClassVar[bool] = False  #: trains the backbone's own tensors; only a control may
    projected: ClassVar[bool] = False  #: `attend` gives what the attention's own k and v read
    slot_fields: ClassVar[
        tuple[str, ...]
    ] = ()  #: fields that may differ between the slots of a bank
    shared_leaves: ClassVar[
        tuple[str, ...]
    ] = ()  #: leaves that the slots of a bank may have in common
    training_fields: ClassVar[
        tuple[str, ...]
    ] = ()  #: fields that say which leaves are trained, not what they mean

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = [face for face in FACES if getattr(cls, face) is not getattr(Method, face)]
        own += ["weight"] if cls.has_factors() else []
        own += ["output"] if cls.read is not Method.read else []
        own += ["embed"] if cls.embeds_for() else []
        if len(own) != 1:
            raise TypeError(
                f"{cls.__name__} must define exactly one of {', '.join(FACES)}; it has {own}."
            )
        cls.face = own[0]

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for field in dataclasses.fields(self):
            value, expected = getattr(self, field.name), hints[field.name]
            if type(value) not in expected and not (float in expected and type(value) is int):
                names = " or ".join(kind.__name__.replace("NoneType", "None") for kind in expected)
                raise ConfigurationError(
                    f"{self.name}: {field.name} must be {names}; it is {value!r}."
                )
            if float in expected and type(value) is int:
                # One value has one text: 8 and 8.0 are the same method, artefact and cell.
                object.__setattr__(self, field.name, float(value))
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigurationError(
                    f"{self.name}: {field.name} must be finite; it is {value!r}."
                )
        if not 0 <= self.dropout < 1:
            raise ConfigurationError(f"dropout must lie in [0, 1); it is {self.dropout}.")
        if self.dropout and not self.has_fast():
            raise ConfigurationError(
                f"{self.name} takes no dropout: it has no input of its own to drop. "
                "Leave dropout at 0."
            )
        whole = self.face in ("attend", "embed") or self.category in ("control", "head")
        if self.strength == 0 or (self.strength != 1 and whole):
            raise ConfigurationError(
                f"{self.strength:g} * {self.name} has no meaning: "
                + (f"{self.name} is there or not." if whole else "nothing would be trained.")
            )
        self.check()
        if self.wanted is not None and self.wanted.rows < 1:
            raise ConfigurationError(
                f"{self.name}: rows are those it begins from, at least 1; found {self.wanted.rows}."
            )

    def check(self) -> None:  # noqa: B027  (most methods have nothing to check)
        """Raises ConfigurationError for values that cannot be meant."""

    def init(self, site: Site) -> Mapping[str, Leaf]:
        """The leaves of one site. A `select` method has none of its own: the forms bring theirs."""
        del site
        return {}

    def choose(self, sites: Sequence[Site]) -> Sequence[Site]:
        """Which of the sites found at `at` to use. All of them, unless a method knows better; one
        that spends a budget over all of them says in `Site.allotted` what falls to each.
        """
        return sites

    def at_site(self, site: Site) -> Method:
        """What acts at one site: itself, or its counterpart where a pair of sites differs."""
        del site
        return self

    def idle(self, site: Site, leaf: str) -> bool:
        """Whether mathematics alone gives this leaf a zero gradient at this site."""
        del site, leaf
        return False

    def rate(self, leaf: str) -> float:
        """By which the learning rate is multiplied for this leaf."""
        del leaf
        return 1.0

    def sample(self, site: Site, p: Leaves, draws: Draws) -> Leaves:
        """The leaves that a forward in training uses, in shapes of their own, from those of one
        slot. Evaluation uses the leaves as they are.
        """
        del site, draws
        return p

    def penalty(self, sites: Sequence[Leaves]) -> Tensor | None:
        """What is added to the loss of a step, from the leaves of each site in fp32."""
        del sites
        return None

    def remember(self, sites: Sequence[Held]) -> Mapping[str, Tensor]:
        """The first values of what the events keep from step to step."""
        del sites
        return {}

    def on_gradients(
        self, sites: Sequence[Held], memory: Mapping[str, Tensor], moment: Moment
    ) -> bool:
        """The clipped gradients are there; what is changed here in place the optimiser reads.

        Returns whether the optimiser begins anew, without the moments that it has gathered.
        """
        del sites, memory, moment
        return False

    def on_step(  # noqa: B027
        self, sites: Sequence[Held], memory: Mapping[str, Tensor], moment: Moment
    ) -> None:
        """The optimiser has moved the leaves; they, and `memory`, may be changed in place."""

    @property
    def wanted(self) -> Wanted | None:
        """What it must see of the training data before the first step; None for nothing.

        Until then, and where nothing trains it, it stands at its initial values.
        """
        return None

    def settle(self, sites: Sequence[Found], memory: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Sets leaves and `memory` in place from what was seen, once, before the first step."""

    def stray(self, h: Tensor, p: Leaves) -> Tensor:
        """How far activations lie from those of training, one number: h [rows, width] behind the
        block of a site. `core.adapting` minimises it at test time; what it compares with is set by
        `settle`, from "activations": the mean of h hᵀ over rows that were answered correctly.
        """
        raise NotImplementedError

    def stored(self) -> Method:
        """The method that an artefact names: itself, or the plain form that `collapse` yields."""
        return self

    def collapse(self, site: Site, p: Leaves) -> Leaves:
        """The leaves that `stored()` has at this site, from the trained ones."""
        del site
        return p

    def weight(self, W: Tensor, b: Tensor | None, p: Leaves) -> tuple[Tensor, Tensor | None]:
        """The weight face: new W (out, in) and b (out) from the frozen ones, in fp32."""
        A, B = self.factors(p)
        return W + B @ A, b

    def factors(self, p: Leaves) -> tuple[Tensor, Tensor]:
        """The weight face as a product: A [..., rank, inputs] and B [..., outputs, rank]."""
        raise NotImplementedError

    def fast(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        """The weight face's result, from the module's input and output."""
        A, B = self.factors(p)
        return y + (x @ A.mT) @ B.mT

    def output(self, x: Tensor, y: Tensor, p: Leaves) -> Tensor:
        """The output face: new y from what the site reads and writes, [..., features] each."""
        raise NotImplementedError

    def read(self, x: Tensor, y: Tensor, text: Text, p: Leaves) -> Tensor:
        """The output face with the text of x and y: new y, [rows, tokens, features]."""
        raise NotImplementedError

    def show(self, x: Tensor, y: Tensor, text: Text, p: Leaves) -> Tensor:
        """What each token lets later ones read, [rows, tokens, width]; it comes as `text.shown`."""
        raise NotImplementedError

    def carry(self, x: Tensor, y: Tensor, text: Text, p: Leaves) -> Tensor:
        """What a site hands on, [rows, tokens, width]: the next site of the stack, and `read` here,
        have it as `text.carried`; an encoder's last, for the decoder, as `text.source.carried`.
        """
        raise NotImplementedError

    def attend(self, p: Leaves) -> tuple[Tensor, ...]:
        """The attend face: keys [tokens, key width] and values [tokens, value width].

        A gate [1, 1] behind them gives them a softmax of their own: what they give, times the gate,
        is added to what the attention gives. See also `projected`.
        """
        raise NotImplementedError

    def embed(self, p: Leaves) -> Tensor:
        """The embed face: virtual tokens [tokens, width]."""
        raise NotImplementedError

    def embed_for(self, x: Tensor, text: Text, p: Leaves) -> Tensor:
        """The embed face with the embedded text x [rows, tokens, width]: virtual tokens for each
        row, [rows, virtual tokens, width], as many whatever the text. Of the text, `text.prompt`
        says what may be read where answers follow; it is empty once a cache holds the tokens.
        """
        raise NotImplementedError

    def select(self, site: Site) -> Mapping[str, Form]:
        """The select face: which parameters of the site to tune, and in which form."""
        del site
        return {}

    def mix(self, x: Tensor, z: Tensor | None, text: Text | None, p: Leaves) -> Tensor:
        """The mix face: the weights of the `Site.members` members at a site, [rows, ..., members].

        Args:
            x: what the site reads, [rows, ..., inputs].
            z: what is there without any member, then what each of them adds to it,
                [rows, ..., 1 + members, outputs]; None for keys and values.
            text: of x, where the method reads it and x holds its tokens; else None.
            p: the leaves.
        """
        raise NotImplementedError

    @classmethod
    def has_fast(cls) -> bool:
        """Whether the method offers the cheaper road."""
        return cls.fast is not Method.fast or cls.has_factors()

    @classmethod
    def has_sample(cls) -> bool:
        """Whether a forward in training draws leaves."""
        return cls.sample is not Method.sample

    @classmethod
    def has_penalty(cls) -> bool:
        """Whether it may add to the loss."""
        return cls.penalty is not Method.penalty

    @classmethod
    def has_policy(cls) -> bool:
        """Whether it acts on the events of a step."""
        return cls.on_gradients is not Method.on_gradients or cls.on_step is not Method.on_step

    @classmethod
    def has_factors(cls) -> bool:
        """Whether its weight face is a product of two factors."""
        return cls.factors is not Method.factors

    def reads(self) -> bool:
        """Whether its face gets the text."""
        return type(self).read is not Method.read

    @classmethod
    def embeds_for(cls) -> bool:
        """Whether its virtual tokens depend on the text."""
        return cls.embed_for is not Method.embed_for

    @classmethod
    def strays(cls) -> bool:
        """Whether it measures how far activations stray."""
        return cls.stray is not Method.stray

    @classmethod
    def shows(cls) -> bool:
        """Whether its tokens let others read something."""
        return cls.show is not Method.show

    @classmethod
    def carries(cls) -> bool:
        """Whether its sites hand something on to the next."""
        return cls.carry is not Method.carry

    @property
    def target(self) -> str:
        """Where it acts: `at`, or the default of the method."""
        return self.default_at if self.at is None else self.at

    def __add__(self, other: Method | Expression) -> Expression:
        from deltatune.core.grammar import Expression

        return Expression.of(self) + other

    def __rshift__(self, other: Method | Expression) -> Expression:
        from deltatune.core.grammar import Expression

        return Expression.of(self) >> other

    def __sub__(self, other: Method | Expression) -> Expression:
        from deltatune.core.grammar import Expression

        return Expression.of(self) - other

    def __mul__(self, strength: float) -> Method:
        return dataclasses.replace(self, strength=self.strength * strength)

    __rmul__ = __mul__

    def __neg__(self) -> Method:
        return -1.0 * self

    def __str__(self) -> str:
        from deltatune.core.grammar import render

        return render(self)


@functools.cache
def _hints(method: type[Method]) -> dict[str, tuple[type, ...]]:
    hints = typing.get_type_hints(method)
    return {
        field.name: typing.get_args(hints[field.name]) or (hints[field.name],)
        for field in dataclasses.fields(method)
    }


NAMES = Names()  #: of all that an expression may name: methods, presets, what is not there
METHODS: Registry[type[Method]] = Registry(
    "method", source="deltatune.methods", group="deltatune.methods", names=NAMES
)


def register(name: str) -> Any:
    """Registers a method under its snake_case name, as the grammar, the artefact and the shell use
    it, and under its own `aliases`, which they read.

    Raises ConfigurationError if one of these names is taken.
    """

    def add(method: type[Method]) -> type[Method]:
        if not dataclasses.is_dataclass(method):
            raise ConfigurationError(f"The method {name!r} must be a frozen dataclass.")
        method.name = name
        method.aliases = vars(method).get("aliases", ())  # those of a parent are the parent's
        return METHODS.add(name, method, method.aliases)

    return add
