"""Prompts, prefixes and single tokens: kinds that act in front of a text, or at its embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.core.errors import ArtefactError, ConfigurationError
from deltatune.core.grammar import build
from deltatune.core.layout import Part
from deltatune.core.method import Leaves, Method
from deltatune.core.site import Site
from deltatune.interop.configuration import COMMON, Configuration, Keys
from deltatune.interop.dialects.dialect import PREFIX, Dialect, placed
from deltatune.interop.places import ends, matching, target_of

__all__ = ["PTuning", "PrefixTuning", "PromptTuning", "TrainableTokens"]

_PROMPT = "prompt_embeddings"
_SHAPE = {"num_attention_heads": None, "num_layers": None, "token_dim": None}
_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
# Families whose keys are turned by their positions, all features of a head in halves, and whose
# attention sees all positions before its own.
_TURNING = ("llama", "qwen2", "qwen3")
_FREQUENCIES = ("default", "linear", "llama3")  # that do not depend on the length of the text


class PromptTuning(Dialect):
    """Prompt tuning."""

    kind = "PROMPT_TUNING"
    reads = ("prompt",)
    writes: ClassVar[tuple[str, ...]] = ("prompt",)
    note = "CAUSAL_LM and SEQ_2_SEQ_LM: a classifier of PEFT's reads the prompt"
    keys = COMMON | Keys(
        read={
            "modules_to_save": None,
            "num_virtual_tokens": None,
            "num_transformer_submodules": None,
            **_SHAPE,
        },
        idle=frozenset({"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs"})
        | frozenset({"tokenizer_name_or_path"}),
    )

    def methods(self, configuration: Configuration, model: nn.Module) -> tuple[Method, ...]:
        """See Dialect."""
        _check_task(configuration)
        return (build("prompt", {"length": configuration.whole("num_virtual_tokens")}),)

    def tensors(self, parts: Sequence[Part], held: Leaves, model: nn.Module) -> dict[str, Tensor]:
        """See Dialect."""
        (P,) = _alone(parts, held)
        # PEFT has tokens for the decoder, too, and never uses them.
        return {_PROMPT: torch.cat([P, torch.zeros_like(P)]) if _stacks(model) == 2 else P}

    def leaves(
        self, configuration: Configuration, parts: Sequence[Part], found: Leaves, model: nn.Module
    ) -> dict[str, Tensor]:
        """See Dialect."""
        ((part, _, names),) = placed(parts)
        length = part.leaves[names["P"]].shape[0]
        return {names["P"]: found[_PROMPT][:length]}

    def settings(
        self, parts: Sequence[Part], held: Leaves, model: nn.Module, origin: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See Dialect."""
        del origin
        (P,) = _alone(parts, held)
        return {
            "num_virtual_tokens": len(P),
            "token_dim": P.shape[1],
            "num_transformer_submodules": _stacks(model),
            "task_type": _task(model),
            **_heads(model),
        }


class PTuning(PromptTuning):
    """P-tuning, which PEFT stores as the tokens that its encoder makes."""

    kind = "P_TUNING"
    writes: ClassVar[tuple[str, ...]] = ()
    note = "becomes a prompt, and is written as one"
    keys = PromptTuning.keys | Keys(
        idle=frozenset({"encoder_dropout", "encoder_hidden_size", "encoder_num_layers"})
        | frozenset({"encoder_reparameterization_type"})
    )


class PrefixTuning(Dialect):
    """Prefix tuning, where keys are turned by their positions.

    PEFT's prefix lies in the cache, so that the text stands behind it and its queries are turned
    further by so many positions. Ours leaves the text where it is: the prefix's keys are turned
    back instead, which gives the same scores.
    """

    kind = "PREFIX_TUNING"
    reads = writes = ("prefix",)
    note = (
        "Llama and Qwen 2 and 3; with learned positions (GPT-2, BERT) or relative ones (T5) the "
        "text stands at other positions in PEFT. With prefix_projection, too: PEFT keeps what it "
        "makes"
    )
    keys = COMMON | Keys(
        read={
            "modules_to_save": None,
            "num_virtual_tokens": None,
            "num_transformer_submodules": None,
            **_SHAPE,
        },
        idle=frozenset({"encoder_hidden_size", "init_weights", "prefix_projection"}),
    )

    def methods(self, configuration: Configuration, model: nn.Module) -> tuple[Method, ...]:
        """See Dialect."""
        reason = _unturned(model)
        if reason:
            raise ArtefactError(f"{configuration.where}: {reason}")
        if configuration.values["task_type"] != "CAUSAL_LM":
            configuration.refuse("task_type", "CAUSAL_LM")
        if configuration.values["num_transformer_submodules"] not in (1, None):
            configuration.refuse("num_transformer_submodules", "1 where there is one stack")
        _check_alone(configuration)
        return (build("prefix", {"length": configuration.whole("num_virtual_tokens")}),)

    def tensors(self, parts: Sequence[Part], held: Leaves, model: nn.Module) -> dict[str, Tensor]:
        """See Dialect."""
        reason = _unturned(model)
        if reason:
            raise ConfigurationError(reason)
        found: list[Tensor] = []
        for _, _, names in _by_block(parts, model):
            found += [_turned(held[names["K"]], model, 1), held[names["V"]]]
        return {_PROMPT: torch.cat(found, dim=1)}

    def leaves(
        self, configuration: Configuration, parts: Sequence[Part], found: Leaves, model: nn.Module
    ) -> dict[str, Tensor]:
        """See Dialect."""
        made: dict[str, Tensor] = {}
        sites = _by_block(parts, model)
        widths = [width for _, site, _ in sites for width in (site.key_width, site.value_width)]
        pieces = iter(torch.split(found[_PROMPT], widths, dim=1))
        for _, _, names in sites:
            made[names["K"]] = _turned(next(pieces), model, -1)
            made[names["V"]] = next(pieces)
        return made

    def settings(
        self, parts: Sequence[Part], held: Leaves, model: nn.Module, origin: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See Dialect."""
        del origin
        sites = _by_block(parts, model)
        _, first, names = sites[0]
        return {
            "num_virtual_tokens": len(held[names["K"]]),
            "num_layers": len(sites),
            "token_dim": first.key_width,
            "num_attention_heads": first.key_width // _head_width(model),
            "num_transformer_submodules": 1,
            "prefix_projection": False,
            "task_type": "CAUSAL_LM",
        }


class TrainableTokens(Dialect):
    """Trainable tokens: PEFT keeps the rows, ours their differences."""

    kind = "TRAINABLE_TOKENS"
    reads = writes = ("trainable_tokens",)
    note = "rows are kept as differences, which rounds"
    keys = COMMON | Keys(
        read={"target_modules": None, "token_indices": None},
        idle=frozenset({"init_weights"}),
    )

    def methods(self, configuration: Configuration, model: nn.Module) -> tuple[Method, ...]:
        """See Dialect."""
        tokens = ", ".join(map(str, configuration.wholes("token_indices") or []))
        targets = configuration.values["target_modules"]
        named = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
        if isinstance(targets, str):
            where = configuration.where
            found = [n for n in named if ends(n, [targets]) or matching(targets, n, where)]
        else:
            found = [n for n in named if ends(n, configuration.texts("target_modules"))]
        if len(found) != 1:
            configuration.refuse("target_modules", "the name of one table of embeddings")
        target = target_of(model, found, "select")
        return (build("trainable_tokens", {"tokens": tokens, "at": target}),)

    def tensors(self, parts: Sequence[Part], held: Leaves, model: nn.Module) -> dict[str, Tensor]:
        """See Dialect."""
        (_, names), rows = _table(parts), _rows(parts)
        d = held[names["weight"]]
        # fp64, so that the sum is rounded once.
        values = (rows.to(d.device).double() + d.double()).float()
        return dict.fromkeys(_tied(parts), values)

    def leaves(
        self, configuration: Configuration, parts: Sequence[Part], found: Leaves, model: nn.Module
    ) -> dict[str, Tensor]:
        """See Dialect."""
        (_, names), rows = _table(parts), _rows(parts)
        values, *others = (found[name] for name in _tied(parts))
        if not all(values.equal(other) for other in others):
            raise ArtefactError(f"{configuration.where}: tables that are tied have other rows.")
        d = (values.double() - rows.double().cpu()).float()
        return {names["weight"]: d, names["weight.rows"]: torch.tensor(_tokens(parts))}

    def settings(
        self, parts: Sequence[Part], held: Leaves, model: nn.Module, origin: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See Dialect."""
        del held, model, origin
        return {"target_modules": [_table(parts)[0].path], "token_indices": _tokens(parts)}


def _table(parts: Sequence[Part]) -> tuple[Site, Mapping[str, str]]:
    """The site that keeps the rows; tied ones read them."""
    tables = {names["weight"]: (site, names) for _, site, names in reversed([*placed(parts)])}
    if len(tables) != 1 or len(parts) != 1:
        raise ConfigurationError(
            "PEFT's TRAINABLE_TOKENS has one table of embeddings; found "
            f"{', '.join(site.path for site, _ in tables.values())}. Save each alone."
        )
    return next(iter(tables.values()))


def _tied(parts: Sequence[Part]) -> list[str]:
    """PEFT's names of the rows: it keeps them at every module that reads the table."""
    return [f"{PREFIX}{site.path}.trainable_tokens_delta" for _, site, _ in placed(parts)]


def _tokens(parts: Sequence[Part]) -> list[int]:
    ranges: list[range] = parts[0].method.ranges()  # type: ignore[attr-defined]
    return [token for ids in ranges for token in ids]


def _rows(parts: Sequence[Part]) -> Tensor:
    """The backbone's own rows of the tokens, in fp32."""
    return _table(parts)[0].value("weight").detach()[_tokens(parts)].float()


def _check_task(configuration: Configuration) -> None:
    task = configuration.values["task_type"]
    if task not in _TASKS:
        configuration.refuse(
            "task_type", "CAUSAL_LM or SEQ_2_SEQ_LM: in others PEFT's classifier reads the prompt"
        )
    _check_alone(configuration)


def _check_alone(configuration: Configuration) -> None:
    if configuration.texts("modules_to_save"):
        configuration.refuse("modules_to_save", "null beside a prompt or prefix")


def _task(model: nn.Module) -> str:
    generates = getattr(model, "can_generate", lambda: False)()
    if not generates:
        raise ConfigurationError(
            f"PEFT's prompts of {type(model).__name__} are read by its classifier, ours are not. "
            "There is no nearest: keep it as a delta."
        )
    return "SEQ_2_SEQ_LM" if _stacks(model) == 2 else "CAUSAL_LM"


def _stacks(model: nn.Module) -> int:
    return 2 if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else 1


def _heads(model: nn.Module) -> dict[str, int]:
    """Two numbers that PEFT asks a configuration for, and reads for prefixes alone."""
    config = getattr(model, "config", None)
    layers, heads = (
        getattr(config, name, 1) for name in ("num_hidden_layers", "num_attention_heads")
    )
    return {"num_layers": layers, "num_attention_heads": heads}


def _alone(parts: Sequence[Part], held: Leaves) -> list[Tensor]:
    found = [held[name] for _, _, names in placed(parts) for name in names.values()]
    if len(found) != 1:
        raise ConfigurationError(f"PEFT has one prompt; found {len(found)}. Save each alone.")
    return found


def _by_block(
    parts: Sequence[Part], model: nn.Module
) -> list[tuple[Part, Site, Mapping[str, str]]]:
    """The sites of a prefix by block, one for each. Raises ConfigurationError for others."""
    found = sorted(placed(parts), key=lambda one: one[1].block or 0)
    blocks = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if [site.block for _, site, _ in found] != list(range(blocks or 0)):
        raise ConfigurationError(
            f"PEFT's prefix is one for every block; found {len(found)} of {blocks}. There is no "
            "nearest: keep it as a delta."
        )
    return found


def _unturned(model: nn.Module) -> str:
    """Why a prefix of PEFT's is none of ours on a model; empty where it is."""
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", type(model).__name__)
    generates = getattr(model, "can_generate", lambda: False)()
    if config is None or family not in _TURNING or not generates:
        return (
            f"a prefix of PEFT's moves the text of {family} to other positions, which ours does "
            f"not; the two are the same on {', '.join(_TURNING)} with a head for language alone. "
            "Train it anew here."
        )
    kind = getattr(_rotary(model), "rope_type", "default")
    sliding = getattr(config, "use_sliding_window", False)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if kind not in _FREQUENCIES or sliding or width != _head_width(model):
        return (
            f"how this {family} turns keys (rope_type={kind!r}, use_sliding_window={sliding}, "
            f"{_head_width(model)} of {width} features) is more than a prefix can be turned back "
            "by. Train it anew here."
        )
    return ""


def _rotary(model: nn.Module) -> nn.Module:
    for name, module in model.named_modules():
        if name.endswith("rotary_emb"):
            rotary: nn.Module = module
            return rotary
    raise ConfigurationError(f"{type(model).__name__} has no module `rotary_emb`. Upgrade it.")


def _head_width(model: nn.Module) -> int:
    return 2 * len(_rotary(model).inv_freq)  # type: ignore[arg-type]


def _turned(K: Tensor, model: nn.Module, way: int) -> Tensor:
    """Keys [tokens, heads * features], turned by as many positions as there are tokens.

    Args:
        K: the keys.
        model: whose frequencies.
        way: 1 forwards, -1 backwards.
    """
    if K.is_meta:
        return K
    frequencies: Tensor = _rotary(model).inv_freq  # type: ignore[assignment]
    angles = way * len(K) * frequencies.detach().to(K.device).double()
    heads = torch.unflatten(K.double(), 1, (-1, 2, len(angles)))
    first, second = heads.unbind(2)
    turned = [first * angles.cos() - second * angles.sin()]
    turned += [second * angles.cos() + first * angles.sin()]
    return torch.stack(turned, dim=2).flatten(1).to(K.dtype)
