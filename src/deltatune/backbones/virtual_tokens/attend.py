"""`attend`: keys and values in front of the text's, after the cache, through the registry."""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deltatune.backbones.virtual_tokens.tokens import tokens_of
from deltatune.core.chain import Inner
from deltatune.core.errors import StateError, TargetError, UnsupportedError
from deltatune.core.host import Host
from deltatune.core.link import Link
from deltatune.core.mixing import weights_of
from deltatune.core.seam import SEAMS, Seam
from deltatune.core.site import Place, Site
from deltatune.core.target import find_places, site_at

__all__ = ["AttendSeam", "recording"]

_ATTEND, _CONFIGS = "_deltatune_attend", "_deltatune_attention"
_RECORD = "_deltatune_record"
_KERNELS = ("sdpa", "eager")
_OURS = "delta_"
_USERS: dict[int, int] = {}  # models may share a config: it is put back when the last has let go


def _attention(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if base == "eager":
        kernel = sys.modules[type(module).__module__].eager_attention_forward
    else:
        kernel = ALL_ATTENTION_FUNCTIONS[base]
    if _RECORD in module.__dict__:
        module.__dict__[_RECORD][module] = key, value
    for link in module.__dict__.get(_ATTEND, ()):
        link.delta.check_recomputation()
    links = [link for link in module.__dict__.get(_ATTEND, ()) if link.live]
    shares = _shares(links)
    made = [_tokens(link, key, shares.get(link)) for link in links]
    joined = [tokens for tokens in made if tokens.gate is None]
    scaling = kwargs.get("scaling")
    if joined:
        given = (module, query, key, value, attention_mask)
        output, weights = _joined(kernel, base, joined, *given, **kwargs)
    else:
        output, weights = kernel(module, query, key, value, attention_mask, **kwargs)
    for tokens in made:
        if tokens.gate is not None:
            beside = _beside(query, tokens, scaling)
            share = 1.0 if tokens.share is None else tokens.share[..., None, None]
            output = output + tokens.gate * share * beside
    return output, weights


@contextmanager
def recording(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Within it, attentions that a prefix is attached to keep their last keys and values, which are
    [rows, heads, tokens, width of a head].
    """
    kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    for module in modules:
        module.__dict__[_RECORD] = kept
    try:
        yield kept
    finally:
        for module in modules:
            module.__dict__.pop(_RECORD, None)


@dataclass(frozen=True)
class _Tokens:
    """The virtual tokens of one link.

    Attributes:
        key, value: [rows, heads, tokens, width of a head].
        present: [rows], which have them; None: all.
        gate: [rows, 1, 1, 1] of those that stand beside the text, zero for rows without them; None
            for those that join it.
        share: [rows, queries], by which a mixer weighs them; None: one.
    """

    key: Tensor
    value: Tensor
    present: Tensor | None
    gate: Tensor | None
    share: Tensor | None

    def columns(self) -> Tensor:
        """What a mask has for them, [rows, 1, queries or 1, tokens]: whether they are seen, or,
        where they have a share, what is added to the scores.
        """
        size, _, count, _ = self.key.shape
        every = torch.ones(size, dtype=torch.bool, device=self.key.device)
        present = (every if self.present is None else self.present)[:, None, None, None]
        if self.share is None:
            return present.expand(-1, -1, -1, count)
        least = torch.finfo(self.share.dtype).tiny
        scores = self.share.clamp_min(least).log()[:, None, :, None]
        return (scores + _additive(present, scores.dtype)).expand(-1, -1, -1, count)


def _shares(links: Sequence[Link]) -> dict[Link, Tensor]:
    """For each link that is weighed, its weight for each query, [rows, queries]."""
    mixers = {link.mixer: None for link in links if link.mixer is not None}
    shares: dict[Link, Tensor] = {}
    for mixer in mixers:
        x, mixer.entry_input = mixer.entry_input, None
        assert x is not None
        weights = weights_of(mixer, x, None)
        shares |= dict(zip(mixer.members, weights.unbind(-1), strict=True))
    return shares


def _tokens(link: Link, key: Tensor, share: Tensor | None) -> _Tokens:
    (k, v, *gates), present = tokens_of(link, key.shape[0], key.dtype, pair=True)
    if link.method.projected:
        of_keys, of_values = link.site.projections
        k, v = _projected(of_keys, k), _projected(of_values, v)
    gate = gates[0].unsqueeze(-1) if gates else None
    if gate is not None and present is not None:
        gate = gate * present[:, None, None, None]
    return _Tokens(_heads(k, key.shape[1]), _heads(v, key.shape[1]), present, gate, share)


def _projected(site: Site, states: Tensor) -> Tensor:
    """What a projection, with its deltas, makes of states [rows, tokens, inputs]."""
    made: Tensor = site.module(states.contiguous())  # GPT-2's takes no other
    return made if site.rows is None else made[..., slice(*site.rows)]


def _beside(query: Tensor, tokens: _Tokens, scaling: float | None) -> Tensor:
    """What the tokens alone give to the queries, [rows, queries, heads, width of a head]."""
    shared = query.shape[1] != tokens.key.shape[1]
    given = functional.scaled_dot_product_attention(
        query, tokens.key, tokens.value, scale=scaling, enable_gqa=shared
    )
    return given.transpose(1, 2)


def _joined(
    kernel: Callable[..., Any],
    base: str,
    joined: Sequence[_Tokens],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention with virtual tokens in front of the text."""
    length = key.shape[2]
    for tokens in joined:
        key = torch.cat([tokens.key, key], dim=2)
        value = torch.cat([tokens.value, value], dim=2)
    front = [tokens.columns() for tokens in reversed(joined)]
    everything = all(tokens.present is None and tokens.share is None for tokens in joined)
    columns = key.shape[2] - length
    causal = kwargs.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    mask = _mask(attention_mask, bool(causal), query.shape[2], length, front, everything)
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
    mask: Tensor | None,
    causal: bool,
    queries: int,
    keys: int,
    front: Sequence[Tensor],
    everything: bool,
) -> Tensor | None:
    """The mask with the columns of virtual tokens in front, see `_Tokens.columns`."""
    if mask is None:
        if everything and not (causal and queries > 1):
            return None
        mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=front[0].device)
        if causal and queries > 1:
            mask = mask.tril()  # from the upper left: right at prefill into a static cache too
    dtypes = {one.dtype for one in (mask, *front)} - {torch.bool}
    if dtypes:
        dtype = mask.dtype if mask.dtype in dtypes else dtypes.pop()
        mask, *front = (_additive(one, dtype) for one in (mask, *front))
    rows = mask.shape[0] if everything else front[0].shape[0]
    shape = (rows, mask.shape[1], mask.shape[2], -1)
    return torch.cat([one[:rows].expand(shape) for one in (*front, mask)], dim=-1)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to the scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
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
            host.chain(host.model).arounds.append(_SameKernel(host.model))
        for link in links:
            link.site.module.__dict__.setdefault(_ATTEND, []).append(link)

    def remove(self, host: Host, links: Sequence[Link]) -> None:
        """See Seam."""
        for link in links:
            held: list[Link] = link.site.module.__dict__.get(_ATTEND, [])
            if link in held:
                held.remove(link)
            if not held:
                link.site.module.__dict__.pop(_ATTEND, None)
        if not any(_ATTEND in module.__dict__ for module in host.model.modules()):
            root = host.chain(host.model)
            root.arounds = [a for a in root.arounds if not isinstance(a, _SameKernel)]
            for config, name in host.model.__dict__.pop(_CONFIGS, ()):
                _USERS[id(config)] = _USERS.get(id(config), 1) - 1
                if _USERS[id(config)] <= 0:
                    del _USERS[id(config)]
                    config._attn_implementation = name


@dataclass(eq=False)
class _SameKernel:
    """Around the model: a kernel changed under a prefix would switch the prefix off unseen."""

    model: nn.Module

    def __call__(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for config, name in self.model.__dict__[_CONFIGS]:
            if not config._attn_implementation.startswith(_OURS):
                raise StateError(
                    f"The attention kernel was changed from {name} to "
                    f"{config._attn_implementation} under a prefix, which it would not see. "
                    "Detach the prefix, change the kernel, attach again."
                )
        return inner(*args, **kwargs)


def _attention_site(model: nn.Module, path: str, key: Place, value: Place) -> Site:
    module = model.get_submodule(path)
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
        raise UnsupportedError(
            f"{type(module).__name__} does not call attention through transformers' registry, so "
            "keys and values cannot be joined to it. Use a method with another face: lora, "
            "adapter, prompt."
        )
    k, v = (site_at(model.get_submodule(p.module), p.module, p) for p in (key, value))
    widths = (k.outputs, v.outputs)
    projections: tuple[Site, ...] = (k, v)
    if key.module == value.module and key.share is None:  # made of a latent vector, head by head
        heads: Any = getattr(module, "num_heads", None)
        each: tuple[Any, Any] = (
            getattr(module, "qk_head_dim", None),
            getattr(module, "v_head_dim", None),
        )
        if None in (heads, *each):
            raise UnsupportedError(
                f"{type(module).__name__} mixes keys and values in {key.module} and does not say "
                "how wide they are. Use a method with another face: lora, adapter, prompt."
            )
        widths, projections = (heads * each[0], heads * each[1]), ()
    sort = Place(path, key.stack, key.block, key.sublayer, "")
    name = key.role.rpartition(".")[0]
    return Site(
        name,
        module,
        path,
        k.inputs,
        widths[0],
        sort,
        key_width=widths[0],
        value_width=widths[1],
        projections=projections,
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
                f"Prefixes work with the attention kernels {' and '.join(_KERNELS)}; this model "
                f"uses {name!r}. Call model.set_attn_implementation('sdpa') first."
            )
        changed.append((config, name))
    for config, name in changed:
        if id(config) not in _USERS:
            weakref.finalize(config, _USERS.pop, id(config), None)
        _USERS[id(config)] = _USERS.get(id(config), 0) + 1
        config._attn_implementation = _OURS + name
    return changed


_register()
SEAMS.add("attend", AttendSeam())
