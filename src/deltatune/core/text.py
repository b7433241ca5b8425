"""Text: which tokens of a stack are real, where its prompts end, what earlier tokens have shown,
and what a method carries from site to site.

A token stack (an encoder, a decoder) is called with ids and a mask; the modules inside it see
hidden states alone. A method whose output depends on other tokens, or on where a token stands, gets
a `Text` beside them. It is read at the call of the stack that the site lies in, so that the encoder
and the decoder have each their own, and generation goes through the same place.

Under gradient checkpointing a block runs again in the backward pass, when another text may have
been read since: what is checkpointed has its own with it. What a method carries goes into it and
out of it as arguments and results, so that gradients find their way under both kinds.

What was carried through an encoder goes on to the decoder beside the encoder's output: within a
call through the host, while a model generates as an entry of `encoder_outputs`, which is repeated
for beams with all others.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.core.calls import bound, parameter_names
from deltatune.core.checkpointed import Checkpoint
from deltatune.core.errors import StateError, UnsupportedError
from deltatune.core.first_pass import first_pass
from deltatune.core.roles import places
from deltatune.core.shown import remember
from deltatune.core.site import Place

if TYPE_CHECKING:
    from deltatune.core.chain import Inner
    from deltatune.core.host import Host
    from deltatune.core.link import Link

__all__ = [
    "Text",
    "TextReader",
    "check_unread",
    "follow",
    "forget",
    "handed_on",
    "is_causal",
    "text_of",
    "token_stack",
]

_IGNORED = -100  # the label of a token that is not asked for
_FUNCTION = "_gradient_checkpointing_func"  # of modules of transformers
_CARRIED = "deltatune_carried"  # begins the names of what is carried


@dataclass(frozen=True)
class Text:
    """What a face may know of the tokens that its site sees.

    Attributes:
        real: [rows, past + tokens] bool, which are no padding; what a cache holds comes first.
            Where a model is called without a mask, all are.
        prompt: [rows, tokens] bool, the real tokens before the first that `labels` asks for; all
            real ones without labels, none after the first call that fills a cache.
        ids: [rows, tokens], or None where the model is called with embeddings.
        causal: whether a token sees those before it alone.
        shown: [rows, past + tokens, width], what the method's `show` gave; None without one.
        carried: [rows, tokens, width], what the method's `carry` gave at the site before, and for
            `read` here; None at the first of the stack.
        source: in a decoder that reads an encoder, that one's text, all of it real and a prompt
            alike, with what its last site carried; else None.
        first: [rows, tokens, width], the last hidden states of a first pass without the delta,
            where a mixer foresees; else None.
        states: what is carried just now, by name, of all methods.
    """

    real: Tensor
    prompt: Tensor
    ids: Tensor | None
    causal: bool
    shown: Tensor | None = None
    carried: Tensor | None = None
    source: Text | None = None
    first: Tensor | None = None
    states: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> int:
        """How many tokens are new: those of x and y."""
        return self.prompt.shape[-1]

    @property
    def sees(self) -> Tensor:
        """[rows, tokens, past + tokens] bool, which tokens each new one may read: itself always, so
        that padding reads something too.
        """
        past = self.real.shape[-1] - self.tokens
        every = torch.ones(self.prompt.shape[-1], self.real.shape[-1], device=self.real.device)
        sees = self.real.unsqueeze(-2) & (every.tril(past) if self.causal else every).bool()
        return sees | every.tril(past).triu(past).bool()

    def of_rows(self, index: Tensor) -> Text:
        """The text of some rows."""
        maybe = (self.ids, self.shown, self.carried, self.first)
        ids, shown, carried, first = (None if one is None else one[index] for one in maybe)
        source = None if self.source is None else self.source.of_rows(index)
        real, prompt = self.real[index], self.prompt[index]
        return Text(real, prompt, ids, self.causal, shown, carried, source, first)


@dataclass(eq=False)
class TextReader:
    """Around a token stack: gives the text of its call to the links inside.

    Attributes:
        host: of the model.
        names: of the stack's arguments.
        causal: whether its tokens see those before them alone.
        blocks: how many it has.
        checkpointed: its modules that may be checkpointed.
        encodes: whether it is the encoder of an encoder-decoder.
        links: those that read the text.
        text: of the call under way, with the cache that it goes on with.
        again: by thread, the text of a checkpointed block, which runs again in the backward pass.
    """

    host: Host
    names: tuple[str, ...]
    causal: bool
    blocks: int
    checkpointed: list[nn.Module]
    encodes: bool
    links: list[Link] = field(default_factory=list)
    text: Text | None = None
    cache: Any = None
    again: dict[int, Text] = field(default_factory=dict)

    def __call__(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The stack's call."""
        if not any(link.live for link in self.links):
            return inner(*args, **kwargs)
        given = bound(self.names, args, kwargs)
        self.cache = given.get("past_key_values")
        past = 0 if self.cache is None else int(self.cache.get_seq_length())
        name = self.links[0].method.name
        text = text_of(given, self.host, name, self.causal, past)
        foreseeing = [link for link in self.links if link.live and link.foresees]
        if foreseeing and text is not None:
            deltas = (link.delta for link in foreseeing)
            with self._uncheckpointed():
                hidden = first_pass(inner, given, deltas, self.blocks, id(self))
            text = replace(text, first=hidden)
        self.text = text
        try:
            with self.carrying():
                output = inner(*args, **kwargs)
            if self.encodes and text is not None and text.states:
                self.host.encoded = dict(text.states)
                for name, state in text.states.items() if isinstance(output, dict) else ():
                    output[name] = state
            return output
        finally:
            self.text = self.cache = None

    @contextmanager
    def _uncheckpointed(self) -> Iterator[None]:
        """Within it nothing is checkpointed: what has no graph needs none."""
        active = [module for module in self.checkpointed if module.gradient_checkpointing]
        for module in active:
            module.__dict__["gradient_checkpointing"] = False
        try:
            yield
        finally:
            for module in active:
                module.__dict__["gradient_checkpointing"] = True

    @contextmanager
    def carrying(self) -> Iterator[None]:
        """Within it what is checkpointed carries the text of the call."""
        text = None if torch.compiler.is_compiling() else self.text
        active = [m for m in self.checkpointed if m.training and m.gradient_checkpointing]
        functions = [(m, m.__dict__.get(_FUNCTION)) for m in active if text is not None]
        for module, function in functions:
            if function is not None and text is not None:
                module.__dict__[_FUNCTION] = Checkpoint(self, text, function)
        try:
            yield
        finally:
            for module, function in functions:
                if function is not None:
                    module.__dict__[_FUNCTION] = function

    @property
    def current(self) -> Text | None:
        """The text that a link reads just now."""
        if torch.compiler.is_compiling():
            return self.text
        return self.again.get(threading.get_ident(), self.text)

    @contextmanager
    def once_more(self, text: Text) -> Iterator[None]:
        """Within it `text` is current in this thread."""
        thread = threading.get_ident()
        self.again[thread] = text
        try:
            yield
        finally:
            self.again.pop(thread, None)

    def of_tokens(self, link: Link, x: Tensor) -> Text | None:
        """The text of x, if these are its tokens; others go through a pooler, or are virtual."""
        text = self.current
        others = text is not None and x.shape[:2] != text.prompt.shape
        return None if others else self.of(link, x)

    def of(self, link: Link, y: Tensor) -> Text:
        """The text for a link whose module gives y [rows, tokens, ...].

        Raises:
            StateError: the module was called outside of its stack, or is computed again with a text
                that nothing tells.
            UnsupportedError: y has other tokens than the text.
        """
        text, name = self.current, f"{link.method.name} at {link.site.name}"
        if text is None:
            raise StateError(
                f"{name} reads the text, and its module was called outside of its token stack, or "
                "again in a backward pass that does not tell by which text. Call the whole model, "
                "and checkpoint it by model.gradient_checkpointing_enable()."
            )
        if link.method.carries():
            text = self._with_states(link, text)
        if y.shape[:2] != text.prompt.shape:
            raise UnsupportedError(
                f"{name} reads the text [rows, tokens] {tuple(text.prompt.shape)}, and its module "
                f"gives {tuple(y.shape)}. Packed rows have other tokens, and so has what a pooler "
                "or an expert gives. Leave one of the two out."
            )
        return text

    def with_shown(self, link: Link, text: Text, new: Tensor) -> Text:
        """The text with what all its tokens have shown, the new ones [rows, tokens, width]."""
        past = text.real.shape[1] - text.tokens
        return replace(text, shown=remember(self.cache, self.blocks, id(link), past, new))

    def with_carried(self, link: Link, text: Text, new: Tensor) -> Text:
        """The text with what a site hands on, [rows, tokens, width]; the next site will find it."""
        text.states[_carried(link, link.site.stack)] = new
        return replace(text, carried=new)

    def _with_states(self, link: Link, text: Text) -> Text:
        """The text with what comes from the site before and from the encoder."""
        source, handed = text.source, text.states.get(_carried(link, "encoder"))
        if source is not None and handed is not None:
            source = replace(source, carried=handed)
        elif source is not None and any(one.site.stack == "encoder" for one in _kin(link)):
            raise StateError(
                f"{link.method.name} carries something from the encoder to the decoder, and these "
                "encoder outputs hold nothing of it. Let the model encode while the delta is "
                "attached and on, and hand its encoder_outputs on whole (return_dict=True)."
            )
        carried = text.states.get(_carried(link, link.site.stack))
        return replace(text, carried=carried, source=source)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "text": None, "cache": None, "again": {}}


def text_of(
    given: Mapping[str, Any], host: Host, name: str, causal: bool, past: int
) -> Text | None:
    """The text of a call of a token stack; None without tokens, of which the stack complains.

    Args:
        given: the arguments of the stack, by name.
        host: of the model.
        name: of the method that reads the text.
        causal: whether a token sees those before it alone.
        past: tokens of the text that the stack's cache holds.

    Raises UnsupportedError for a mask that does not name tokens.
    """
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    tokens = embeds if ids is None else ids
    if tokens is None:
        return None
    size, length = tokens.shape[:2]
    mask = given.get("attention_mask")
    if mask is None:
        mask = tokens.new_ones(size, past + length, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape[1:] != (past + length,):
        found = tuple(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise UnsupportedError(
            f"{name} must know which tokens are padding: it needs a mask [rows, {past + length}], "
            f"one entry for each token so far; it got {found}. Static caches make other masks in a "
            "decoder: use a dynamic cache."
        )
    real = (mask != 0).expand(size, -1)
    prompt = real if past == 0 else real.new_zeros(size, length)
    answers = host.answers
    if causal and past == 0 and answers is not None and answers.dim() == 2:
        behind = length - answers.shape[1]  # what was generated without a cache
        if answers.shape[0] == size and behind >= 0:
            asked = torch.nn.functional.pad(answers != _IGNORED, (0, behind), value=True)
            prompt = prompt & (asked.cumsum(1) == 0)
    encoded = given.get("encoder_hidden_states")
    if encoded is None:
        return Text(real, prompt, ids, causal)
    seen = given.get("encoder_attention_mask")
    seen = encoded.new_ones(encoded.shape[:2]) if seen is None else seen
    source = Text(seen != 0, seen != 0, None, False)
    return Text(real, prompt, ids, causal, source=source, states=dict(host.encoded))


def is_causal(host: Host, path: str) -> bool:
    """Whether a token of the stack at `path` sees those before it alone."""
    decodes = bool(
        getattr(getattr(host.model.get_submodule(path), "config", None), "is_decoder", False)
    )
    return decodes or any(place.stack == "decoder" for place in _inside(host, path))


def _inside(host: Host, path: str) -> list[Place]:
    return [p for p in places(host.model) if not path or p.module.startswith(f"{path}.")]


def handed_on(output: Any) -> dict[str, Tensor]:
    """What an encoder handed on beside its output; nothing where the output is none of ours."""
    if not isinstance(output, Mapping):
        return {}
    return {name: value for name, value in output.items() if name.startswith(_CARRIED)}


def _carried(link: Link, stack: str) -> str:
    """The name of what a method carries through a stack."""
    return f"{_CARRIED}.{id(link.delta)}.{link.part}.{stack}"


def _kin(link: Link) -> list[Link]:
    """The links of the same method."""
    return [one for one in link.delta.links if one.part == link.part]


def token_stack(model: nn.Module, path: str) -> str | None:
    """The path of the nearest module around `path` that takes embedded input and a mask."""
    while path:
        path = path.rpartition(".")[0]
        if {"inputs_embeds", "attention_mask"} <= {*parameter_names(model.get_submodule(path))}:
            return path
    return None


def follow(host: Host, links: Sequence[Link]) -> None:
    """Puts a reader around the token stack of each link. Raises UnsupportedError without one."""
    for link in links:
        path = _stack_of(host, link)
        if path is None and link.method.face == "mix":
            continue  # it weighs each token by itself
        if path is None:
            raise UnsupportedError(
                f"{link.method.name} must know which tokens are padding, and {link.site.path} of "
                f"{type(host.model).__name__} works on the text of no module whose forward takes "
                "`inputs_embeds` and `attention_mask`. Choose sites in a token stack, or a method "
                "that sees each token alone, such as adapter."
            )
        chain = host.chain(host.model.get_submodule(path))
        reader = next((a for a in chain.arounds if isinstance(a, TextReader)), None)
        if reader is None:
            reader = _reader(host, path)
            # Inside of the model's opening, outside of all that lengthens or packs the tokens.
            chain.arounds.insert(int(host.opens(chain.module)), reader)
        reader.links.append(link)
        link.reader = reader


def check_unread(host: Host) -> None:
    """Raises UnsupportedError if a delta puts virtual tokens in front of a text that one reads."""
    for lengthening in (link for delta in host.deltas for link in delta.links):
        if lengthening.method.face != "embed":
            continue
        for around in host.chain(lengthening.site.module).arounds:
            if isinstance(around, TextReader):
                reading = around.links[0]
                raise UnsupportedError(
                    f"{reading.method.name} reads the text of the {reading.site.stack}, in front "
                    f"of which {lengthening.method.name} puts virtual tokens. Leave one of the two "
                    "out, or put them on different stacks."
                )


def _stack_of(host: Host, link: Link) -> str | None:
    """The path of the stack whose text a site works on; None where that is not known."""
    path, place = token_stack(host.model, link.site.path), link.site.place
    if path is None or "decoder_input_ids" in parameter_names(host.model.get_submodule(path)):
        return None  # around both stacks of an encoder-decoder
    foreign = place is not None and place.sublayer == "cross_attention" and place.part in ("k", "v")
    return None if foreign else path


def _reader(host: Host, path: str) -> TextReader:
    stack = host.model.get_submodule(path)
    blocks = len({place.block for place in _inside(host, path)} - {None})
    checkpointed = [m for m in stack.modules() if hasattr(m, "gradient_checkpointing")]
    encodes = any(stack is one for one in host.entrances[1:])
    causal = is_causal(host, path)
    return TextReader(host, parameter_names(stack), causal, blocks, checkpointed, encodes)


def forget(host: Host, links: Sequence[Link]) -> None:
    """Undoes `follow`."""
    for link in links:
        if link.reader is not None and link in link.reader.links:
            link.reader.links.remove(link)
        link.reader = None
    for chain in host.chains:
        idle = [a for a in chain.arounds if isinstance(a, TextReader) and not a.links]
        chain.arounds = [a for a in chain.arounds if a not in idle]
