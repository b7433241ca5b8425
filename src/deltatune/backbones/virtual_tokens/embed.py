"""`embed`: virtual tokens in front of the embedded text, taken off again on the way out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltatune.backbones.virtual_tokens.tokens import count_of, tokens_for, tokens_of
from deltatune.core.calls import bound, parameter_names
from deltatune.core.chain import Inner
from deltatune.core.errors import ConfigurationError, StateError, TargetError, UnsupportedError
from deltatune.core.host import Host
from deltatune.core.link import Link
from deltatune.core.positions import first_position, position_table
from deltatune.core.seam import SEAMS, Seam
from deltatune.core.site import Site
from deltatune.core.storage import storage_of
from deltatune.core.target import find_places
from deltatune.core.text import is_causal, text_of, token_stack

__all__ = ["EmbedSeam"]

_MARK = "_deltatune_virtual"  # on a cache: how many virtual positions it holds


@dataclass(eq=False)
class _Lengthen:
    """What goes around a token stack: virtual tokens in front on the way in, off on the way out."""

    host: Host
    causal: bool
    stack: nn.Module
    embedding: nn.Module
    names: tuple[str, ...]  # of the stack's arguments
    strips: bool
    table: nn.Module | None  # of learned positions
    links: list[Link] = field(default_factory=list)
    inside: int = 0  # virtual positions of the forward under way
    without: Tensor | None = None  # [rows], those that have none of them; None: all have

    def live(self) -> list[Link]:
        return [link for link in self.links if link.live]

    def __call__(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        links = self.live()
        if not links:
            return inner(*args, **kwargs)
        kwargs = bound(self.names, args, kwargs)
        prompt, present = self.prompt(kwargs, links)
        count = prompt.shape[1]
        filled = self.filled(kwargs, count)
        positioned = "position_ids" in self.names
        first = first_position(self.table) if positioned else None
        _extend(kwargs, count, present, filled, first)
        if filled:
            return _mark(inner(**kwargs), count)
        embeds = self.embeds(kwargs)
        self.check_positions(count + embeds.shape[1])
        kwargs["inputs_embeds"] = torch.cat([prompt.to(embeds.dtype), embeds], dim=1)
        kwargs["input_ids"] = None
        self.inside = count
        self.without = None if present is None or positioned else ~present
        try:
            output = inner(**kwargs)
        finally:
            self.inside, self.without = 0, None
        return _mark(_strip(output, count) if self.strips else output, count)

    def prompt(self, kwargs: dict[str, Any], links: list[Link]) -> tuple[Tensor, Tensor | None]:
        tensor = (
            kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        )
        weight = next(self.embedding.parameters())
        pieces: list[Tensor] = []
        present: Tensor | None = None
        for link in links:
            if link.method.embeds_for():
                tokens, some = self.made_for(link, kwargs)
            else:
                (tokens,), some = tokens_of(link, tensor.shape[0], weight.dtype, pair=False)
            pieces.insert(0, tokens)
            if some is not None and present is not None and not torch.equal(some, present):
                raise UnsupportedError("Two prompts on one stack must be routed to the same rows.")
            present = some if some is not None else present
        return torch.cat(pieces, dim=1), present

    def made_for(self, link: Link, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The tokens that depend on the text of the call."""
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length() - getattr(cache, _MARK, 0)
        text = text_of(kwargs, self.host, link.method.name, self.causal, past)
        assert text is not None
        return tokens_for(link, self.embeds(kwargs), text)

    def embeds(self, kwargs: dict[str, Any]) -> Tensor:
        given: Tensor | None = kwargs.get("inputs_embeds")
        if given is not None:
            return given
        embedded: Tensor = self.embedding(kwargs["input_ids"])
        return embedded

    def filled(self, kwargs: dict[str, Any], count: int) -> bool:
        cache = kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            return False
        held = getattr(cache, _MARK, None)
        if held != count:
            raise StateError(
                f"This cache was filled with {held or 'no'} virtual tokens, the delta has {count}. "
                "Start with an empty cache after a delta is attached, switched or detached."
            )
        return True

    def check_positions(self, length: int) -> None:
        if not isinstance(self.table, nn.Embedding):
            return
        limit = self.table.num_embeddings - first_position(self.table)
        limit -= getattr(self.table, "offset", 0)  # BART's and OPT's, which they add themselves
        if length > limit:
            raise ConfigurationError(
                f"The prompt and the text need {length} positions; {type(self.stack).__name__} "
                f"has {limit}. Shorten the prompt or truncate the text."
            )


@dataclass(eq=False)
class _StripFirst:
    """Around a pooler: it sees the text, so that its first position is the text's."""

    owner: _Lengthen

    def __call__(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return inner(args[0][:, self.owner.inside :], *args[1:], **kwargs)


@dataclass(eq=False)
class _ShiftBack:
    """Around a table of positions that a stack counts itself: rows without virtual tokens count
    from their text.
    """

    owner: _Lengthen

    def __call__(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found, without = inner(*args, **kwargs), self.owner.without
        if without is None:
            return found
        found = found if found.dim() == 3 else found.unsqueeze(0)
        shifted = found.roll(self.owner.inside, dims=1)
        return torch.where(without[:, None, None], shifted, found)


@dataclass(eq=False)
class _ShowPrompt:
    """Around the decoder of an encoder-decoder: its mask over the source gains the prompt."""

    owner: _Lengthen
    names: tuple[str, ...]  # of the decoder's arguments

    def __call__(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        links = self.owner.live()
        kwargs = bound(self.names, args, kwargs)
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if links and states is not None:
            present = links[0].rows(states.shape[0])
            shown = torch.tensor([slot is not None for slot in present.slots], device=states.device)
            if mask is None and not shown.all():
                count = sum(count_of(link) for link in links)
                mask = torch.ones(states.shape[0], states.shape[1] - count, device=states.device)
            if mask is not None and mask.shape[-1] < states.shape[1]:
                front = shown[:, None].expand(-1, states.shape[1] - mask.shape[-1]).to(mask.dtype)
                kwargs["encoder_attention_mask"] = torch.cat([front, mask], dim=-1)
        return inner(**kwargs)


def _extend(
    kwargs: dict[str, Any], count: int, present: Tensor | None, filled: bool, first: int | None
) -> None:
    """Lengthens what belongs to the tokens: mask, types, positions.

    Args:
        kwargs: of the stack, changed in place.
        count: virtual tokens.
        present: [rows], which have them; None: all.
        filled: whether they are in the cache already.
        first: the position of a first token; None where the stack takes no positions.
    """
    tensor = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    size, length = tensor.shape[:2]
    past = kwargs["past_key_values"].get_seq_length() - count if filled else 0  # of the text
    mask = text = kwargs.get("attention_mask")
    if mask is None and present is not None:
        mask = torch.ones(size, past + length, dtype=torch.long, device=tensor.device)
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            found = f"a {type(mask).__name__}" if isinstance(mask, dict) else tuple(mask.shape)
            raise UnsupportedError(
                f"A prompt needs a mask [rows, tokens]; it got {found}. Static caches on "
                "decoder-only models make such masks, and have no room for a prompt: use a dynamic "
                "cache."
            )
        shown = mask.new_ones(size, count)
        if present is not None:
            shown = shown * present[:, None].to(mask.dtype)
        kwargs["attention_mask"] = torch.cat([shown, mask], dim=1)
    shift = count if present is None else count * present[:, None].long()
    positions = kwargs.get("position_ids")
    if positions is None and first:  # RoBERTa: it counts what is no padding, which it cannot see
        text = torch.ones(size, length, device=tensor.device) if text is None else text
        positions = ((text.cumsum(1).long() - 1).clamp_min(0) + first)[:, -length:]
    elif positions is None and present is not None and first is not None:
        # The model would count from the cache, where rows without a prompt hold its columns too.
        positions = torch.arange(past, past + length, device=tensor.device).expand(size, -1)
    if positions is not None:
        positions = positions + shift
        front = torch.arange(count, device=positions.device).expand(positions.shape[0], -1)
        front = front + (first or 0)
        kwargs["position_ids"] = positions if filled else torch.cat([front, positions], dim=1)
    if filled:
        return
    kinds = kwargs.get("token_type_ids")
    if kinds is not None:
        kwargs["token_type_ids"] = functional.pad(kinds, (count, 0))


def _strip(output: Any, count: int) -> Any:
    """The output without its first `count` positions."""
    # As one piece: a head multiplies a slice row by row, which takes several times as long.
    if isinstance(output, tuple):
        return (output[0][:, count:].contiguous(), *output[1:])
    output["last_hidden_state"] = output["last_hidden_state"][:, count:].contiguous()
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(h[:, count:] for h in output["hidden_states"])
    if output.get("attentions") is not None:
        output["attentions"] = tuple(a[..., count:, count:] for a in output["attentions"])
    return output


def _mark(output: Any, count: int) -> Any:
    cache = None if isinstance(output, tuple) else output.get("past_key_values")
    if cache is not None:
        setattr(cache, _MARK, count)
    return output


class EmbedSeam(Seam):
    """Virtual tokens in front of the embedded text of a token stack."""

    def sites(self, model: nn.Module, target: str) -> Sequence[Site]:
        """See Seam."""
        found: dict[str, Site] = {}
        for place in find_places(model, target):
            if place.part != "embedding":
                raise TargetError(
                    f"A prompt goes in front of an embedding; {target!r} names {place.role}."
                )
            path = token_stack(model, place.module)
            if path is not None:
                embedding = model.get_submodule(place.module)
                width = storage_of(embedding).widths(embedding)[1]
                name = place.stack
                stack = model.get_submodule(path) if path else model
                entry = (place.module, embedding)
                found.setdefault(name, Site(name, stack, path, width, width, place, entry=entry))
        if "encoder" in found:
            return (found["encoder"],)
        if "decoder" not in found or getattr(
            getattr(model, "config", None), "is_encoder_decoder", False
        ):
            raise UnsupportedError(
                f"{type(model).__name__} has no token stack at {target!r} whose forward takes "
                "`inputs_embeds` and `attention_mask`, which a prompt needs. In an "
                "encoder-decoder it goes to the encoder."
            )
        return (found["decoder"],)

    def install(self, host: Host, links: Sequence[Link]) -> None:
        """See Seam."""
        for link in links:
            chain = host.chain(link.site.module)
            around = next((a for a in chain.arounds if isinstance(a, _Lengthen)), None)
            if around is None:
                around = self._around(host, link)
                chain.arounds.append(around)
            around.links.append(link)

    def _around(self, host: Host, link: Link) -> _Lengthen:
        model, stack = host.model, link.site.module
        assert link.site.entry is not None
        both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        table = position_table(stack)
        causal, embedding = is_causal(host, link.site.path), link.site.entry[1]
        around = _Lengthen(host, causal, stack, embedding, parameter_names(stack), not both, table)
        if table is not None:
            host.chain(table).arounds.append(_ShiftBack(around))
        if both:
            decoder = model.get_decoder()  # type: ignore[operator]
            host.chain(decoder).arounds.append(_ShowPrompt(around, parameter_names(decoder)))
        pooler = getattr(stack, "pooler", None)
        if isinstance(pooler, nn.Module):
            host.chain(pooler).arounds.append(_StripFirst(around))
        return around

    def remove(self, host: Host, links: Sequence[Link]) -> None:
        """See Seam."""
        for link in links:
            chain = host.chain(link.site.module)
            around = next((a for a in chain.arounds if isinstance(a, _Lengthen)), None)
            if around is None or link not in around.links:
                continue
            around.links.remove(link)
            if around.links:
                continue
            chain.arounds.remove(around)
            for other in host.chains:
                other.arounds = [
                    a for a in other.arounds if getattr(a, "owner", None) is not around
                ]


SEAMS.add("embed", EmbedSeam())
