"""Roles: what the modules of a model are, from one table per family, else inferred from structure.

A table maps paths to roles. In a path, `{stack}` is encoder or decoder, `{block}` a number, `*` one
part of a name; `{a,b}` in path and role runs over both in step. Families are registered by
`backbones`.

    "{stack}.block.{block}.layer.*.SelfAttention.{q,k,v,o}": "self_attention.{q,k,v,output}"

A role with "+" is a fused projection: `self_attention.q+k+v` are three equal slices of one module.
With "&" the parts are mixed within it, `self_attention.k&v`, and each names all of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from deltatune.core.registry import Registry
from deltatune.core.site import Place
from deltatune.core.storage import storage_of

__all__ = ["FAMILIES", "Family", "block_path", "places"]


@dataclass(frozen=True)
class Family:
    """How one family of models names its parts.

    Attributes:
        types: values of `config.model_type` that it covers.
        stack: the stack of paths without `{stack}`.
        roles: path pattern to role.
    """

    types: tuple[str, ...]
    stack: str
    roles: Mapping[str, str]


FAMILIES: Registry[Family] = Registry("family", source="deltatune.backbones")

# What the parts of a block are called where no table speaks: last part of the name to role.
_NAMES: tuple[tuple[str, str], ...] = (
    (r"(q|query|q_proj|q_lin|query_proj|wq|to_q|q_linear|query_layer)", "q"),
    (r"(k|key|k_proj|k_lin|key_proj|wk|to_k|k_linear|key_layer)", "k"),
    (r"(v|value|v_proj|v_lin|value_proj|wv|to_v|v_linear|value_layer)", "v"),
    (r"(c_attn|qkv|qkv_proj|query_key_value|in_proj|Wqkv|to_qkv)", "q+k+v"),
    (r"(o|out|o_proj|out_proj|out_lin|wo|to_out|proj|attn_out|o_linear)", "output"),
    (r"(gate|gate_proj|w1_gate|wi_0)", "gate"),
    (r"(up|up_proj|fc1|fc_in|lin1|linear1|c_fc|w1|wi|wi_1|dense_h_to_4h|fc)", "up"),
    (r"(down|down_proj|fc2|fc_out|lin2|linear2|w2|wo|dense_4h_to_h)", "down"),
)
_ATTENTION = re.compile(r"(^|\.)\w*(attn|attention)\w*(\.|$)", re.IGNORECASE)
_CROSS = re.compile(r"cross|encdec|enc_dec|encoder_attn", re.IGNORECASE)
_HEAD = re.compile(r"(^|\.)(lm_head|classifier|score|head|cls|qa_outputs|embed_out)(\.|$)")
_NORM = re.compile(r"norm|(^|\.|_)ln(_|\d|\.|$)", re.IGNORECASE)


def places(model: nn.Module) -> tuple[Place, ...]:
    """The places of a model, in the order of its modules."""
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    for name in FAMILIES:
        family = FAMILIES[name]
        if kind in family.types:
            found = tuple(_from_table(model, family))
            break
    else:
        found = tuple(_inferred(model))
    return (*found, *_mixtures(model, found))


def block_path(place: Place) -> str:
    """The path of the block that a place lies in: up to the first number that is the block's."""
    words = place.module.split(".")
    return ".".join(words[: words.index(str(place.block)) + 1])


def _mixtures(model: nn.Module, found: Sequence[Place]) -> Iterator[Place]:
    """The sublayers that choose among experts: what holds the choice and the experts is one."""
    blocks = {block_path(place): place for place in found if place.block is not None}
    for path, place in blocks.items():
        for name, child in model.get_submodule(path).named_children():
            if any(inner.rpartition(".")[2] == "experts" for inner, _ in child.named_modules()):
                yield Place(f"{path}.{name}", place.stack, place.block, "ffn", "experts")


def _from_table(model: nn.Module, family: Family) -> Iterator[Place]:
    rules = [rule for path, role in family.roles.items() for rule in _rules(path, role)]
    for name, _ in model.named_modules():
        for pattern, role in rules:
            match = pattern.fullmatch(name)
            if match is not None:
                found = match.groupdict()
                stack = found.get("stack") or family.stack
                block = found.get("block")
                yield from _places(name, stack, None if block is None else int(block), role)
                break


def _places(name: str, stack: str, block: int | None, role: str) -> Iterator[Place]:
    *sublayer, part = role.split(".")
    within = sublayer[0] if sublayer else None
    parts = part.split("+")
    for index, one in enumerate(parts):
        share = (index, len(parts)) if len(parts) > 1 else None
        for each in one.split("&"):
            yield Place(name, stack, block, within, each, share)


def _rules(path: str, role: str) -> Iterator[tuple[re.Pattern[str], str]]:
    choices = re.search(r"\{([^{}]*,[^{}]*)\}", path)
    if choices is None:
        yield _pattern(path), role
        return
    lists = [choices.group(1).split(",")]
    in_role = re.search(r"\{([^{}]*)\}", role)
    if in_role is not None:
        lists.append(in_role.group(1).split(","))
    for values in zip(*lists, strict=True):
        one_path = path[: choices.start()] + values[0] + path[choices.end() :]
        one_role = (
            role if in_role is None else role[: in_role.start()] + values[1] + role[in_role.end() :]
        )
        yield from _rules(one_path, one_role)


def _pattern(path: str) -> re.Pattern[str]:
    escaped = re.escape(path)
    for written, meant in (
        (r"\{stack\}", r"(?P<stack>encoder|decoder)"),
        (r"\{block\}", r"(?P<block>\d+)"),
        (r"\*", r"[^.]+"),
    ):
        escaped = escaped.replace(written, meant)
    return re.compile(rf"(?:.*\.)?{escaped}")


def _inferred(model: nn.Module) -> Iterator[Place]:
    stacks = list(_block_lists(model))
    shapes = {
        f"{stack}.{index}": _by_shape(block)
        for stack in stacks
        for index, block in model.get_submodule(stack).named_children()
    }
    passed = False  # whether the last block lies behind
    for name, module in model.named_modules():
        if not any(p is not None for p in module._parameters.values()):
            continue
        inside = next((s for s in stacks if name.startswith(s + ".")), None)
        stack = "decoder" if _is_decoder(model, inside or name) else "encoder"
        if inside is None:
            part = _outside(name, module, passed)
            if part is not None:
                yield Place(name, stack, None, None, part)
            continue
        passed = passed or inside == stacks[-1]
        index, _, rest = name[len(inside) + 1 :].partition(".")
        role = shapes[f"{inside}.{index}"].get(rest) or _inside(rest, module)
        yield from _places(name, stack, int(index), role)


def _block_lists(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0:
            kinds = {type(child) for child in module}
            if len(kinds) == 1 and any(storage_of(m).linear for m in module[0].modules()):
                yield name


def _is_decoder(model: nn.Module, name: str) -> bool:
    if re.search(r"(^|\.)decoder(\.|$)", name):
        return True
    if re.search(r"(^|\.)encoder(\.|$)", name):
        return False
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_decoder", False)) or "CausalLM" in type(model).__name__


def _outside(name: str, module: nn.Module, passed: bool) -> str | None:
    if _HEAD.search(name):
        return "head"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if _NORM.search(name) or "norm" in type(module).__name__.lower():
        return "norm"
    if not storage_of(module).linear or not passed:
        return None
    inputs, outputs = storage_of(module).widths(module)
    return "pooler" if inputs == outputs else "head"


def _by_shape(block: nn.Module) -> dict[str, str]:
    """Roles of linear modules whose names say nothing, by the company they keep.

    Three that read the same, side by side, and a fourth that reads what the first gives and leads
    back are taken for queries, keys, values and output, in that order. One that is three times as
    wide as what it reads, and one that leads back, are a fused projection and output.
    """
    companies: dict[str, list[tuple[str, int, int]]] = {}
    for name, module in block.named_modules():
        if storage_of(module).linear:
            companies.setdefault(name.rpartition(".")[0], []).append(
                (name, *storage_of(module).widths(module))
            )
    found: dict[str, str] = {}
    for company in companies.values():
        if any(re.fullmatch(p, name.rpartition(".")[2]) for name, *_ in company for p, _ in _NAMES):
            continue
        (width, first), *rest = [widths for _, *widths in company]
        if len(company) >= 4 and rest[0] == rest[1] and rest[0][0] == width:
            if rest[2] == [first, width] and first >= rest[0][1]:
                parts = ("q", "k", "v", "output")
                found |= {
                    n: f"self_attention.{p}" for (n, *_), p in zip(company, parts, strict=False)
                }
        elif len(company) >= 2 and first == 3 * width and rest[0] == [width, width]:
            found |= {company[0][0]: "self_attention.q+k+v", company[1][0]: "self_attention.output"}
    return found


def _inside(rest: str, module: nn.Module) -> str:
    if not storage_of(module).linear:
        return "norm" if _NORM.search(rest) or "norm" in type(module).__name__.lower() else "other"
    last, attention = rest.rsplit(".", 1)[-1], _ATTENTION.search(rest)
    names: Sequence[str] = (
        ("q", "k", "v", "q+k+v", "output") if attention else ("gate", "up", "down")
    )
    known = next((r for p, r in _NAMES if r in names and re.fullmatch(p, last)), None)
    if attention:
        sublayer = "cross_attention" if _CROSS.search(rest) else "self_attention"
        return f"{sublayer}.{known or 'output'}"
    if known is None:
        inputs, outputs = storage_of(module).widths(module)
        known = "up" if outputs > inputs else "down"
    return f"ffn.{known}"
