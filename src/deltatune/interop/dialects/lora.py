"""LoRA and DoRA in PEFT, and what else is a product of two factors, written as LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.core.errors import ArtefactError, ConfigurationError
from deltatune.core.grammar import build
from deltatune.core.layout import Part
from deltatune.core.method import Leaves, Method
from deltatune.core.site import Site
from deltatune.core.storage import storage_of
from deltatune.interop.configuration import Configuration, Keys
from deltatune.interop.dialects.dialect import PREFIX, ModuleDialect, common, placed

__all__ = ["LoRA"]

# Starts that leave the backbone alone. Those of the other list take theirs out of it.
_STARTS = ("gaussian", "orthogonal", "eva")
_TAKEN = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class _Piece:
    """What one module has: A [rank, inputs], B [outputs, rank], scaled by alpha / rank; for DoRA
    the lengths m [outputs].
    """

    A: Tensor
    B: Tensor
    alpha: float
    m: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0]


class LoRA(ModuleDialect):
    """LoRA, rsLoRA and DoRA; on writing all products of two factors, side by side."""

    kind = "LORA"
    reads = ("lora", "rslora", "dora")
    writes = ("lora", "rslora", "dora")
    note = (
        "no bias, no embedding, no parameter that is no module's weight; a start that was taken "
        "out of the backbone (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) only once it is converted"
    )
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "rank": ("r", 8),
        "alpha": ("lora_alpha", 8),
        "dropout": ("lora_dropout", 0.0),
    }
    patterns: ClassVar[Mapping[str, str]] = {"rank": "rank_pattern", "alpha": "alpha_pattern"}
    conv1d = True
    keys: ClassVar[Keys] = Keys(
        read={"use_rslora": False, "use_dora": False, "init_lora_weights": True},
        only={
            "alora_invocation_tokens": (None,),
            "arrow_config": (None,),
            "ensure_weight_tying": (False,),
            "kasa_config": (None,),
            "layer_replication": (None,),
            "lora_bias": (False,),
            "megatron_config": (None,),
            "monteclora_config": (None,),
            "target_parameters": (None, []),
            "trainable_token_indices": (None,),
            "use_bdlora": (None,),
            "use_qalora": (False,),
            "velora_config": (None,),
        },
        idle=frozenset({"corda_config", "eva_config", "loftq_config", "lora_ga_config"})
        | frozenset({"megatron_core", "qalora_group_size"}),
    )

    def takes(self, method: Method) -> bool:
        """See Dialect."""
        return method.has_factors() or (method.name == "dora" and method.strength == 1)

    def method_at(self, configuration: Configuration, path: str, module: nn.Module) -> Method:
        """See ModuleDialect."""
        del module
        _check_start(configuration)
        values = self.values_at(configuration, path)
        rooted, directed = configuration.flag("use_rslora"), configuration.flag("use_dora")
        method = build("rslora" if rooted and not directed else "lora", values)
        if not directed:
            return method
        scale = math.sqrt(values["rank"]) if rooted else 1.0
        return build("dora", {"rank": values["rank"], "alpha": _alpha(method) * scale})

    def at_site(self, site: Site, method: Method, p: Leaves) -> dict[str, Tensor]:
        """See ModuleDialect."""
        return _named(_piece(site, method, p))

    def from_site(self, site: Site, method: Method, found: Leaves) -> dict[str, Tensor]:
        """See ModuleDialect."""
        leaves = {"A": found["lora_A.weight"], "B": found["lora_B.weight"]}
        if method.name == "dora":
            leaves["m"] = found["lora_magnitude_vector"]
        return leaves

    def tensors(self, parts: Sequence[Part], held: Leaves, model: nn.Module) -> dict[str, Tensor]:
        """See Dialect."""
        return {
            f"{PREFIX}{path}.{ending}": value
            for path, piece in _pieces(parts, held).items()
            for ending, value in _named(piece).items()
        }

    def settings(
        self, parts: Sequence[Part], held: Leaves, model: nn.Module, origin: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See Dialect."""
        pieces = _pieces(parts, held)
        rooted = _rooted(parts)
        rank, ranks = common({path: piece.rank for path, piece in pieces.items()})
        alpha, alphas = common({path: piece.alpha for path, piece in pieces.items()})
        drops = {part.method.dropout for part in parts}
        return {
            "target_modules": sorted(pieces),
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": drops.pop() if len(drops) == 1 else 0.0,
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
            "use_rslora": rooted,
            "use_dora": any(part.method.name == "dora" for part in parts),
        }


def _named(piece: _Piece) -> dict[str, Tensor]:
    found = {"lora_A.weight": piece.A, "lora_B.weight": piece.B}
    return found if piece.m is None else {**found, "lora_magnitude_vector": piece.m}


def _check_start(configuration: Configuration) -> None:
    start = configuration.values["init_lora_weights"]
    name = start.lower() if isinstance(start, str) else start
    if isinstance(name, str) and name.startswith(_TAKEN):
        raise ArtefactError(
            f"{configuration.where}: init_lora_weights={start!r} has changed the backbone beside "
            "the factors, and the folder holds the factors alone. Convert it with PEFT: "
            "save_pretrained(folder, path_initial_model_for_weight_conversion=...), for LoftQ "
            "train on the backbone that it was quantised to and set init_lora_weights to true."
        )
    if not isinstance(name, bool) and name not in _STARTS:
        configuration.refuse("init_lora_weights", f"true, false or one of {', '.join(_STARTS)}")


def _rooted(parts: Sequence[Part]) -> bool:
    """Whether all is written as rsLoRA."""
    alone = len({site.path for _, site, _ in placed(parts)}) == sum(len(p.sites) for p in parts)
    return alone and all(part.method.name == "rslora" for part in parts)


def _pieces(parts: Sequence[Part], held: Leaves) -> dict[str, _Piece]:
    """What each module has; where it has several products, their ranks lie side by side."""
    found: dict[str, list[_Piece]] = {}
    names = {part.method.name for part in parts}
    if "dora" in names and len(names) > 1:
        raise ConfigurationError(
            f"A folder of PEFT is DoRA or not; found {' and '.join(sorted(names))}. Save each "
            "alone."
        )
    rooted = _rooted(parts)
    for part, site, own in placed(parts):
        p = {leaf: held[full] for leaf, full in own.items()}
        piece = _piece(site, part.method, p, rooted=rooted)
        found.setdefault(site.path, []).append(piece)
    return {path: _joined(path, pieces) for path, pieces in found.items()}


def _piece(site: Site, method: Method, p: Leaves, *, rooted: bool = False) -> _Piece:
    plain = method.strength == 1 and site.rows is None
    if plain and method.name in ("lora", "dora"):
        return _Piece(p["A"], p["B"], _alpha(method), p.get("m"))
    if plain and method.name == "rslora":
        alpha = _alpha(method)
        return _Piece(p["A"], p["B"], alpha if rooted else alpha * math.sqrt(len(p["A"])))
    if method.name == "dora":
        raise ConfigurationError(
            f"dora acts on a part of {site.path}; PEFT's takes the fused module whole. Nearest: "
            "as_delta(effective(delta))."
        )
    A, B = method.at_site(site).factors(p)
    B = method.strength * B
    if site.rows is not None:
        whole = B.new_zeros(storage_of(site.module).widths(site.module)[1], B.shape[1])
        whole[slice(*site.rows)] = B
        B = whole
    return _narrow(A, B)


def _narrow(A: Tensor, B: Tensor) -> _Piece:
    """A product without a scale, of a rank that is no more than its widths."""
    outputs, inputs = len(B), A.shape[1]
    if len(A) > min(outputs, inputs):
        one = torch.eye(min(outputs, inputs), dtype=A.dtype, device=A.device)
        A, B = (B @ A, one) if outputs <= inputs else (one, B @ A)
    return _Piece(A, B, len(A))


def _alpha(method: Method) -> float:
    alpha: float = method.alpha  # type: ignore[attr-defined]
    return int(alpha) if alpha.is_integer() else alpha


def _joined(path: str, pieces: Sequence[_Piece]) -> _Piece:
    if len(pieces) == 1:
        return pieces[0]
    if any(piece.m is not None for piece in pieces):
        raise ConfigurationError(f"{path} has dora twice, which PEFT cannot keep. Save each alone.")
    A = torch.cat([piece.A for piece in pieces])
    B = torch.cat([piece.alpha / piece.rank * piece.B for piece in pieces], dim=1)
    return _narrow(A, B)
