"""Kinds whose modules share frozen projections, a bank of vectors, or places drawn from a seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.core.errors import ConfigurationError
from deltatune.core.layout import Part
from deltatune.core.method import Leaves, Method
from deltatune.core.site import Site
from deltatune.interop.configuration import Configuration, Keys
from deltatune.interop.dialects.dialect import PREFIX, ModuleDialect, Renamed, placed

__all__ = ["FourierFT", "RandLoRA", "VBLoRA", "VeRA", "WaveFT"]

_SEED = 777  # of PEFT, for places


class VeRA(Renamed):
    """VeRA: A and B of all modules are cut out of one pair, as wide as the widest."""

    kind = "VERA"
    reads = writes = ("vera",)
    note = "written where the projections of all widths are parts of one pair"
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "rank": ("r", 256),
        "d_start": ("d_initial", 0.1),
    }
    keys = Keys(
        read={"projection_prng_key": 0, "save_projection": True}, idle=frozenset({"vera_dropout"})
    )
    constants: ClassVar[Mapping[str, Any]] = {"projection_prng_key": 0, "save_projection": True}
    conv1d = True
    names: ClassVar[Mapping[str, str]] = {"d": "vera_lambda_d", "b": "vera_lambda_b"}

    def unsaved(self, configuration: Configuration) -> tuple[str, ...]:
        """See Dialect."""
        saved = configuration.flag("save_projection")
        return () if saved else ("base_model.vera_A", "base_model.vera_B")

    def tensors(self, parts: Sequence[Part], held: Leaves, model: nn.Module) -> dict[str, Tensor]:
        """See Dialect."""
        found = super().tensors(parts, held, model)
        for leaf in "AB":
            cuts = [held[names[leaf]] for _, _, names in placed(parts)]
            found[f"base_model.vera_{leaf}"] = _assembled(self.kind, cuts)
        return found

    def leaves(
        self, configuration: Configuration, parts: Sequence[Part], found: Leaves, model: nn.Module
    ) -> dict[str, Tensor]:
        """See Dialect."""
        made = super().leaves(configuration, parts, found, model)
        A, B = found.get("base_model.vera_A"), found.get("base_model.vera_B")
        if A is None or B is None:
            sites = [site for _, site, _ in placed(parts)]
            A, B = self._drawn(configuration, sites)
        for _, site, names in placed(parts):
            made[names["A"]], made[names["B"]] = A[:, : site.inputs], B[: site.outputs]
        return made

    def _drawn(self, configuration: Configuration, sites: Sequence[Site]) -> tuple[Tensor, Tensor]:
        """The projections as PEFT draws them, A first."""
        random = _generator(configuration, "projection_prng_key")
        rank = configuration.whole("r")
        shapes = (rank, max(site.inputs for site in sites)), (max(s.outputs for s in sites), rank)
        drawn = [torch.empty(shape) for shape in shapes]
        for value in drawn:
            bound = math.sqrt(3) * math.sqrt(2) / math.sqrt(value.shape[1])
            value.uniform_(-bound, bound, generator=random)
        return drawn[0], drawn[1]


class RandLoRA(ModuleDialect):
    """RandLoRA: as VeRA, the pair being kept with every module again."""

    kind = "RANDLORA"
    reads = writes = ("randlora",)
    note = "save_projection=True; written where the bases of all shapes are parts of one pair"
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "rank": ("r", 32),
        "alpha": ("randlora_alpha", 640),
    }
    keys = Keys(
        only={"save_projection": (True,)},
        idle=frozenset({"projection_prng_key", "randlora_dropout", "sparse", "very_sparse"}),
    )
    constants: ClassVar[Mapping[str, Any]] = {"projection_prng_key": 0, "save_projection": True}
    conv1d = True

    def at_site(self, site: Site, method: Method, p: Leaves) -> dict[str, Tensor]:
        """See ModuleDialect."""
        return {"randlora_lambda": p["u"].mT, "randlora_gamma": p["v"]}

    def from_site(self, site: Site, method: Method, found: Leaves) -> dict[str, Tensor]:
        """See ModuleDialect."""
        return {"u": found["randlora_lambda"].mT, "v": found["randlora_gamma"]}

    def tensors(self, parts: Sequence[Part], held: Leaves, model: nn.Module) -> dict[str, Tensor]:
        """See Dialect."""
        found = super().tensors(parts, held, model)
        sites = [site for _, site, _ in placed(parts)]
        widths = max(s.inputs for s in sites), max(s.outputs for s in sites)
        rank = next(iter(parts)).method.rank  # type: ignore[attr-defined]
        shapes = (rank, 1, min(widths)), (max(widths), -(-min(widths) // rank), rank)
        bases: list[list[Tensor]] = [[], []]
        for _, site, names in placed(parts):
            A, B = held[names["A"]], held[names["B"]]
            small, large = (A, B) if site.inputs <= site.outputs else (B.mT, A.mT)
            bases[0].append(small.unsqueeze(1))
            # PEFT pairs rank j of term n with the column of another rank and term, all drawn alike.
            large = torch.unflatten(large, 1, (-1, rank)).transpose(1, 2).flatten(1)
            bases[1].append(torch.unflatten(large, 1, (-1, rank)))
        whole = {
            "A": _assembled(self.kind, bases[0], shapes[0]),
            "B": _assembled(self.kind, bases[1], shapes[1]),
        }
        for name, value in whole.items():
            places = [f"{PREFIX}{site.path}." for site in sites] + ["base_model."]
            found |= {f"{place}randlora_{name}": value for place in places}
        return found

    def leaves(
        self, configuration: Configuration, parts: Sequence[Part], found: Leaves, model: nn.Module
    ) -> dict[str, Tensor]:
        """See Dialect."""
        made = super().leaves(configuration, parts, found, model)
        A, B = found["base_model.randlora_A"], found["base_model.randlora_B"]
        for part, site, names in placed(parts):
            own = f"{PREFIX}{site.path}.randlora_"
            if not (torch.equal(found[f"{own}A"], A) and torch.equal(found[f"{own}B"], B)):
                raise ConfigurationError(f"The bases of {site.path} are not those of all modules.")
            rank: int = part.method.rank  # type: ignore[attr-defined]
            smaller, larger = sorted((site.inputs, site.outputs))
            terms = -(-smaller // rank)
            small = A[:, 0, :smaller]
            large = torch.unflatten(B[:larger, :terms].flatten(1), 1, (rank, terms))
            large = large.transpose(1, 2).flatten(1)
            on_input = site.inputs <= site.outputs
            made[names["A"]] = small if on_input else large.mT
            made[names["B"]] = large if on_input else small.mT
        return made


class VBLoRA(ModuleDialect):
    """VB-LoRA, with all logits."""

    kind = "VBLORA"
    reads = writes = ("vb_lora",)
    note = "save_only_topk_weights=False"
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "rank": ("r", 4),
        "vectors": ("num_vectors", 256),
        "block": ("vector_length", 256),
        "chosen": ("topk", 2),
    }
    keys = Keys(
        only={"save_only_topk_weights": (False,)},
        idle=frozenset({"init_logits_std", "init_vector_bank_bound", "vblora_dropout"}),
    )
    conv1d = True
    _BANK: ClassVar[str] = "base_model.vblora_vector_bank"

    def at_site(self, site: Site, method: Method, p: Leaves) -> dict[str, Tensor]:
        """See ModuleDialect."""
        return {"vblora_logits_A": p["A"], "vblora_logits_B": p["B"].transpose(0, 1)}

    def from_site(self, site: Site, method: Method, found: Leaves) -> dict[str, Tensor]:
        """See ModuleDialect."""
        return {"A": found["vblora_logits_A"], "B": found["vblora_logits_B"].transpose(0, 1)}

    def tensors(self, parts: Sequence[Part], held: Leaves, model: nn.Module) -> dict[str, Tensor]:
        """See Dialect."""
        found = super().tensors(parts, held, model)
        banks = {names["bank"]: held[names["bank"]] for _, _, names in placed(parts)}
        if len(banks) > 1:
            raise ConfigurationError("PEFT has one bank of vectors; found two. Save each alone.")
        return {**found, self._BANK: next(iter(banks.values()))}

    def leaves(
        self, configuration: Configuration, parts: Sequence[Part], found: Leaves, model: nn.Module
    ) -> dict[str, Tensor]:
        """See Dialect."""
        made = super().leaves(configuration, parts, found, model)
        return made | {names["bank"]: found[self._BANK] for _, _, names in placed(parts)}


class _Placed(Renamed):
    """A kind whose places PEFT draws from a seed, those of each shape anew."""

    conv1d = True

    def leaves(
        self, configuration: Configuration, parts: Sequence[Part], found: Leaves, model: nn.Module
    ) -> dict[str, Tensor]:
        """See Dialect."""
        made = super().leaves(configuration, parts, found, model)
        for part, site, names in placed(parts):
            random = _generator(configuration, "random_loc_seed")
            made[names["places"]] = _places(site, part.leaves[names["places"]].shape[0], random)
        return made

    def settings(
        self, parts: Sequence[Part], held: Leaves, model: nn.Module, origin: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See Dialect. Raises ConfigurationError for places that no known seed gives."""
        values = super().settings(parts, held, model, origin)
        seed = origin.get("random_loc_seed", _SEED)
        for _, site, names in placed(parts):
            own = held[names["places"]].cpu()
            random = torch.Generator().manual_seed(seed)
            if not torch.equal(own, _places(site, len(own), random)):
                raise ConfigurationError(
                    f"PEFT's {self.kind} keeps no places, but a seed that draws them, and none is "
                    f"known for those of {site.path}. Nearest: a LoRA, as_delta(effective(delta)); "
                    "or begin from a folder of PEFT."
                )
        return {**values, "random_loc_seed": seed}


class FourierFT(_Placed):
    """FourierFT."""

    kind = "FOURIERFT"
    reads = writes = ("fourierft",)
    note = "written where the places are those of PEFT's seed, as after reading"
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "frequencies": ("n_frequency", 1000),
        "scale": ("scaling", 150.0),
    }
    patterns: ClassVar[Mapping[str, str]] = {"frequencies": "n_frequency_pattern"}
    keys = Keys(read={"random_loc_seed": _SEED})
    behind_a_dot = True
    names: ClassVar[Mapping[str, str]] = {"c": "fourierft_spectrum"}


class WaveFT(_Placed):
    """WaveFT with the wavelet of Haar."""

    kind = "WAVEFT"
    reads = writes = ("waveft",)
    note = "wavelet_family='db1', use_idwt=True; written as FourierFT is"
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "coefficients": ("n_frequency", 2592),
        "scale": ("scaling", 25.0),
    }
    patterns: ClassVar[Mapping[str, str]] = {"coefficients": "n_frequency_pattern"}
    keys = Keys(
        read={"random_loc_seed": _SEED},
        only={
            "wavelet_family": ("db1",),
            "use_idwt": (True,),
            "proportional_parameters": (False,),
        },
    )
    names: ClassVar[Mapping[str, str]] = {"c": "waveft_spectrum"}


def _generator(configuration: Configuration, key: str) -> torch.Generator:
    seed = configuration.whole(key)
    if not -(2**63) <= seed < 2**63:
        configuration.refuse(key, "a seed of 63 bits")
    return torch.Generator().manual_seed(seed)


def _places(site: Site, count: int, random: torch.Generator) -> Tensor:
    return torch.randperm(site.outputs * site.inputs, generator=random)[:count]


def _assembled(kind: str, cuts: Sequence[Tensor], shape: tuple[int, ...] | None = None) -> Tensor:
    """The tensor of which all are the first entries along each dimension; zero where none is."""
    if shape is None:
        shape = tuple(map(max, zip(*(cut.shape for cut in cuts), strict=True)))
    whole, known = cuts[0].new_zeros(shape), cuts[0].new_zeros(shape, dtype=torch.bool)
    for cut in cuts:
        place = tuple(slice(width) for width in cut.shape)
        if not cut.is_meta and bool((known[place] & (whole[place] != cut)).any()):
            raise ConfigurationError(
                f"PEFT's {kind} cuts the projections of all widths out of one pair; here each "
                "width has its own. Nearest: a LoRA, write(..., as_lora=True); or modules of one "
                "width."
            )
        whole[place], known[place] = cut, True
    return whole
