"""Virtual tokens: the one owner of masks, positions and caches where a delta lengthens a sequence.

`attend` joins keys and values after the cache update, through transformers' attention registry, on
every call: caches and positions never hear of a prefix. `embed` lengthens at the token stack and
strips on the way out: heads, labels, pooling and the caller's tensors are untouched, and the cache
is marked with the number of virtual positions it holds.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deltatune.core.chain import Inner, Link
from deltatune.core.errors import ConfigurationError, StateError, TargetError, UnsupportedError
from deltatune.core.host import Host
from deltatune.core.seam import SEAMS, Seam
from deltatune.core.site import Place, Site
from deltatune.core.storage import storage_of
from deltatune.core.target import find_places, site_at

__all__ = ["AttendSeam", "EmbedSeam"]

_ATTEND, _CONFIGS = "_deltatune_attend", "_deltatune_attention"
_MARK = "_deltatune_virtual"  # on a cache: how many virtual positions it holds
_KERNELS = ("sdpa", "eager")
_OURS = "delta_"
_USERS: dict[int, int] = {}  # models may share a config: it is put back when the last has let go


# --- attend ---------------------------------------------------------------------------------------


def _tokens(
    link: Link, size: int, dtype: torch.dtype, pair: bool
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The virtual tokens of each of `size` rows, [rows, tokens, width], and which rows have them
    (None: all).
    """
    rows = link.rows(size)
    leaves = link.stacked(dtype)

    def made(slot: int) -> tuple[Tensor, ...]:
        p = {name: leaf[slot] for name, leaf in leaves.items()}
        return link.method.attend(p) if pair else (link.method.embed(p),)

    if rows.uniform is not None:
        return tuple(
            t.to(dtype).unsqueeze(0).expand(size, -1, -1) for t in made(rows.uniform)
        ), None
    used = [slot for slot in rows.groups if slot is not None] or [0]
    stacks = [torch.stack(parts).to(dtype) for parts in zip(*map(made, used), strict=True)]
    index = torch.tensor([used.index(s) if s is not None else 0 for s in rows.slots])
    present = torch.tensor([s is not None for s in rows.slots], device=stacks[0].device)
    return tuple(stack[index.to(stack.device)] for stack in stacks), (
        None if present.all() else present
    )


def _attention(base: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
               attention_mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if base == "eager":
        kernel = sys.modules[type(module).__module__].eager_attention_forward
    else:
        kernel = ALL_ATTENTION_FUNCTIONS[base]
    links = [link for link in module.__dict__.get(_ATTEND, ()) if link.live]
    if not links:
        return kernel(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    columns = 0
    shown: list[Tensor] = []
    size, heads, length, _ = key.shape
    for link in links:
        (k, v), present = _tokens(link, size, key.dtype, pair=True)
        key = torch.cat([_heads(k, heads), key], dim=2)
        value = torch.cat([_heads(v, heads), value], dim=2)
        every = (
            torch.ones(size, dtype=torch.bool, device=key.device) if present is None else present
        )
        shown.insert(0, every[:, None].expand(-1, k.shape[1]))
        columns += k.shape[1]
    causal = kwargs.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    seen = torch.cat(shown, dim=1)
    mask = _mask(attention_mask, bool(causal), query.shape[2], length, seen)
    if mask is not None and base == "eager" and mask.dtype == torch.bool:
        mask = _additive(mask, query.dtype)
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = functional.pad(kwargs["position_bias"], (columns, 0))
    output, weights = kernel(module, query, key, value, mask, is_causal=False, **kwargs)
    return output, None if weights is None else weights[..., columns:]


def _heads(tokens: Tensor, heads: int) -> Tensor:
    """[rows, tokens, width] to [rows, heads, tokens, width of a head]."""
    return tokens.reshape(*tokens.shape[:2], heads, -1).transpose(1, 2)


def _mask(
    mask: Tensor | None, causal: bool, queries: int, keys: int, seen: Tensor
) -> Tensor | None:
    """The mask with virtual columns in front; `seen` [rows, columns] says which of them a row has."""
    everything = bool(seen.all())
    if mask is None:
        if everything and not (causal and queries > 1):
            return None
        mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=seen.device)
        if causal and queries > 1:
            mask = mask.tril()  # from the upper left: right at prefill into a static cache too
    front = seen[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
    if everything:
        front = front[: mask.shape[0]]
    mask = mask.expand(front.shape[0], -1, -1, -1)
    if mask.dtype != torch.bool:
        front = _additive(front, mask.dtype)
    return torch.cat([front, mask], dim=-1)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    hidden = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, hidden)


def _register() -> None:
    for base in _KERNELS:
        AttentionInterface.register(_OURS + base, functools.partial(_attention, base))
        AttentionMaskInterface.register(_OURS + base, ALL_MASK_ATTENTION_FUNCTIONS[base])


class AttendSeam(Seam):
    """Keys and values in front of those of an attention, for every family of the registry."""

    def sites(self, model: nn.Module, target: str) -> Sequence[Site]:
        """See Seam."""
        projections: dict[str, dict[str, Place]] = {}
        for place in find_places(model, target):
            if place.sublayer and place.part in ("k", "v"):
                projections.setdefault(place.module.rpartition(".")[0], {})[place.part] = place
        sites = [
            _attention_site(model, path, parts["k"], parts["v"])
            for path, parts in projections.items()
            if len(parts) == 2
        ]
        if not sites:
            raise TargetError(
                f"The target {target!r} names no attention. Use attention, self_attention, ..."
            )
        return tuple(sites)

    def install(self, host: Host, links: Sequence[Link]) -> None:
        """See Seam."""
        if _CONFIGS not in host.model.__dict__:
            host.model.__dict__[_CONFIGS] = _switch(host.model)
        for link in links:
            link.site.module.__dict__.setdefault(_ATTEND, []).append(link)

    def remove(self, host: Host, links: Sequence[Link]) -> None:
        """See Seam."""
        for link in links:
            held: list[Link] = link.site.module.__dict__[_ATTEND]
            held.remove(link)
            if not held:
                del link.site.module.__dict__[_ATTEND]
        if not any(_ATTEND in module.__dict__ for module in host.model.modules()):
            for config, name in host.model.__dict__.pop(_CONFIGS):
                _USERS[id(config)] = _USERS.get(id(config), 1) - 1
                if _USERS[id(config)] <= 0:
                    del _USERS[id(config)]
                    config._attn_implementation = name


def _attention_site(model: nn.Module, path: str, key: Place, value: Place) -> Site:
    module = model.get_submodule(path)
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
        raise UnsupportedError(
            f"{type(module).__name__} does not call attention through transformers' registry, so keys and "
            "values cannot be joined to it. Use a method with another face: lora, adapter, prompt."
        )
    k, v = (site_at(model.get_submodule(p.module), p.module, p) for p in (key, value))
    sort = Place(path, key.stack, key.block, key.sublayer, "")
    name = key.role.rpartition(".")[0]
    return Site(
        name, module, path, k.inputs, k.outputs, sort, key_width=k.outputs, value_width=v.outputs
    )


def _switch(model: nn.Module) -> list[tuple[Any, str]]:
    """Sends every attention of the model through ours; returns what to put back."""
    found: list[Any] = [m.config for m in model.modules() if hasattr(m, "config")]
    configs = {id(config): config for config in found}
    changed: list[tuple[Any, str]] = []
    for config in configs.values():
        name = config._attn_implementation.removeprefix(_OURS)
        if name not in _KERNELS:
            raise UnsupportedError(
                f"Prefixes work with the attention kernels {' and '.join(_KERNELS)}; this model uses {name!r}. "
                "Call model.set_attn_implementation('sdpa') first."
            )
        changed.append((config, name))
    for config, name in changed:
        if id(config) not in _USERS:
            weakref.finalize(config, _USERS.pop, id(config), None)
        _USERS[id(config)] = _USERS.get(id(config), 0) + 1
        config._attn_implementation = _OURS + name
    return changed


# --- embed ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Lengthen:
    """What goes around a token stack: virtual tokens in front on the way in, off on the way out."""

    stack: nn.Module
    embedding: nn.Module
    strips: bool
    links: list[Link] = field(default_factory=list)
    inside: int = 0  # virtual positions of the forward under way

    def live(self) -> list[Link]:
        return [link for link in self.links if link.live]

    def __call__(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        links = self.live()
        if not links:
            return inner(*args, **kwargs)
        kwargs = _bound(self.stack, args, kwargs)
        prompt, present = self.prompt(kwargs, links)
        count = prompt.shape[1]
        filled = self.filled(kwargs, count)
        _extend(
            kwargs, count, present, filled, "position_ids" in _parameters(type(self.stack).forward)
        )
        if filled:
            return _mark(inner(**kwargs), count)
        embeds = self.embeds(kwargs)
        self.check_positions(count + embeds.shape[1])
        kwargs["inputs_embeds"] = torch.cat([prompt.to(embeds.dtype), embeds], dim=1)
        kwargs["input_ids"] = None
        self.inside = count
        try:
            output = inner(**kwargs)
        finally:
            self.inside = 0
        return _mark(_strip(output, count) if self.strips else output, count)

    def prompt(self, kwargs: dict[str, Any], links: list[Link]) -> tuple[Tensor, Tensor | None]:
        tensor = (
            kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        )
        weight = next(self.embedding.parameters())
        pieces: list[Tensor] = []
        present: Tensor | None = None
        for link in links:
            (tokens,), some = _tokens(link, tensor.shape[0], weight.dtype, pair=False)
            pieces.insert(0, tokens)
            if some is not None and present is not None and not torch.equal(some, present):
                raise UnsupportedError("Two prompts on one stack must be routed to the same rows.")
            present = some if some is not None else present
        return torch.cat(pieces, dim=1), present

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
        config = getattr(self.stack, "config", None)
        limit = getattr(config, "max_position_embeddings", None)
        absolute = getattr(config, "model_type", "") in ("bert", "gpt2")
        if absolute and limit is not None and length > limit:
            raise ConfigurationError(
                f"The prompt and the text need {length} positions; {type(self.stack).__name__} has {limit}. "
                "Shorten the prompt or truncate the text."
            )


@dataclass(eq=False)
class _StripFirst:
    """Around a pooler: it sees the text, so that its first position is the text's."""

    owner: _Lengthen

    def __call__(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return inner(args[0][:, self.owner.inside :], *args[1:], **kwargs)


@dataclass(eq=False)
class _ShowPrompt:
    """Around the decoder of an encoder-decoder: its mask over the source gains the virtual tokens."""

    owner: _Lengthen
    decoder: nn.Module

    def __call__(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        links = self.owner.live()
        kwargs = _bound(self.decoder, args, kwargs)
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if links and states is not None:
            present = links[0].rows(states.shape[0])
            shown = torch.tensor([slot is not None for slot in present.slots], device=states.device)
            if mask is None and not shown.all():
                count = sum(link.method.embed(link.leaves(0)).shape[0] for link in links)
                mask = torch.ones(states.shape[0], states.shape[1] - count, device=states.device)
            if mask is not None and mask.shape[-1] < states.shape[1]:
                front = shown[:, None].expand(-1, states.shape[1] - mask.shape[-1]).to(mask.dtype)
                kwargs["encoder_attention_mask"] = torch.cat([front, mask], dim=-1)
        return inner(**kwargs)


@functools.cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a forward's arguments, without self."""
    return tuple(inspect.signature(forward).parameters)[1:]


def _bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name."""
    names = _parameters(type(module).forward)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _extend(
    kwargs: dict[str, Any], count: int, present: Tensor | None, filled: bool, positioned: bool
) -> None:
    """Lengthens what belongs to the tokens: mask, types, positions."""
    tensor = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    size, length = tensor.shape[:2]
    mask = kwargs.get("attention_mask")
    if mask is None and present is not None:
        mask = torch.ones(size, length, dtype=torch.long, device=tensor.device)
    if mask is not None:
        if mask.dim() != 2:
            raise UnsupportedError(
                f"A prompt needs a mask [rows, tokens]; it got {tuple(mask.shape)}. Static caches on "
                "decoder-only models make such masks: use a dynamic cache."
            )
        shown = mask.new_ones(size, count)
        if present is not None:
            shown = shown * present[:, None].to(mask.dtype)
        kwargs["attention_mask"] = torch.cat([shown, mask], dim=1)
    shift = count if present is None else count * present[:, None].long()
    positions = kwargs.get("position_ids")
    if positions is None and present is not None and positioned and not filled:
        positions = torch.arange(length, device=tensor.device).expand(size, -1)
    if positions is not None:
        positions = positions + shift
        front = torch.arange(count, device=positions.device).expand(positions.shape[0], -1)
        kwargs["position_ids"] = positions if filled else torch.cat([front, positions], dim=1)
    if filled:
        return
    kinds = kwargs.get("token_type_ids")
    if kinds is not None:
        kwargs["token_type_ids"] = functional.pad(kinds, (count, 0))


def _strip(output: Any, count: int) -> Any:
    """The output without its first `count` positions."""
    if isinstance(output, tuple):
        return (output[0][:, count:], *output[1:])
    output["last_hidden_state"] = output["last_hidden_state"][:, count:]
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
            path = _stack_path(model, place.module)
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
                f"{type(model).__name__} has no token stack at {target!r} that takes embedded input. "
                "In an encoder-decoder a prompt goes to the encoder."
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
        around = _Lengthen(stack, link.site.entry[1], strips=not both)
        if both:
            decoder = model.get_decoder()  # type: ignore[operator]
            host.chain(decoder).arounds.append(_ShowPrompt(around, decoder))
        pooler = getattr(stack, "pooler", None)
        if isinstance(pooler, nn.Module):
            host.chain(pooler).arounds.append(_StripFirst(around))
        return around

    def remove(self, host: Host, links: Sequence[Link]) -> None:
        """See Seam."""
        for link in links:
            chain = host.chain(link.site.module)
            around = next(a for a in chain.arounds if isinstance(a, _Lengthen))
            around.links.remove(link)
            if around.links:
                continue
            chain.arounds.remove(around)
            for other in host.chains:
                other.arounds = [
                    a for a in other.arounds if getattr(a, "owner", None) is not around
                ]


def _stack_path(model: nn.Module, embedding: str) -> str | None:
    """The nearest module around an embedding that takes embedded input and a mask."""
    path = embedding
    while path:
        path = path.rpartition(".")[0]
        kind = type(model.get_submodule(path) if path else model)
        if {"inputs_embeds", "attention_mask"} <= set(_parameters(kind.forward)):
            return path
    return None


_register()
SEAMS.add("attend", AttendSeam())
SEAMS.add("embed", EmbedSeam())
