"""Kinds that change modules each by itself, and whose tensors are our leaves in another form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.core.errors import ConfigurationError
from deltatune.core.grammar import build
from deltatune.core.layout import Part
from deltatune.core.method import Leaves, Method
from deltatune.core.site import Site
from deltatune.core.storage import storage_of
from deltatune.interop.configuration import Configuration, Keys
from deltatune.interop.dialects.dialect import ModuleDialect, Renamed, placed

__all__ = ["BEFT", "BOFT", "C3A", "HRA", "OFT", "DeLoRA", "GraLoRA", "HiRA", "LoHa", "LoKr", "MiSS"]
__all__ += ["RoAd"]

_RANK: Mapping[str, tuple[str, Any]] = {"rank": ("r", 8)}
_LYCORIS = frozenset({"module_dropout", "rank_dropout", "rank_dropout_scale"}) | frozenset(
    {"use_effective_conv2d"}
)


class LoHa(Renamed):
    """LoHa."""

    kind = "LOHA"
    reads = writes = ("loha",)
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {**_RANK, "alpha": ("alpha", 8)}
    patterns: ClassVar[Mapping[str, str]] = {"rank": "rank_pattern", "alpha": "alpha_pattern"}
    keys = Keys(idle=_LYCORIS)
    names: ClassVar[Mapping[str, str]] = {
        "B1": "hada_w1_a",
        "A1": "hada_w1_b",
        "B2": "hada_w2_a",
        "A2": "hada_w2_b",
    }


class LoKr(Renamed):
    """LoKr; a dense second factor is scaled in PEFT, too."""

    kind = "LOKR"
    reads = writes = ("lokr",)
    note = "decompose_both=False; decompose_factor divides the widths"
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {
        **_RANK,
        "alpha": ("alpha", 8),
        "factor": ("decompose_factor", -1),
    }
    patterns: ClassVar[Mapping[str, str]] = {"rank": "rank_pattern", "alpha": "alpha_pattern"}
    keys = Keys(only={"decompose_both": (False,)}, idle=_LYCORIS)
    names: ClassVar[Mapping[str, str]] = {
        "C": "lokr_w1",
        "D": "lokr_w2",
        "B": "lokr_w2_a",
        "A": "lokr_w2_b",
    }

    def values_at(self, configuration: Configuration, path: str) -> dict[str, Any]:
        """See ModuleDialect."""
        values = super().values_at(configuration, path)
        return {**values, "factor": 0 if values["factor"] == -1 else values["factor"]}

    def at_site(self, site: Site, method: Method, p: Leaves) -> dict[str, Tensor]:
        """See ModuleDialect."""
        found = super().at_site(site, method, p)
        return found | ({"lokr_w2": p["D"] / _scale(method)} if "D" in p else {})

    def from_site(self, site: Site, method: Method, found: Leaves) -> dict[str, Tensor]:
        """See ModuleDialect."""
        leaves = super().from_site(site, method, found)
        return leaves | ({"D": found["lokr_w2"] * _scale(method)} if "lokr_w2" in found else {})

    def settings(self, *args: Any) -> dict[str, Any]:
        """See Dialect."""
        values = super().settings(*args)
        return {**values, "decompose_factor": values["decompose_factor"] or -1}


def _scale(method: Method) -> float:
    scale: float = method.scale  # type: ignore[attr-defined]
    if scale == 0:
        raise ConfigurationError("lokr with alpha=0 changes nothing. There is nothing to keep.")
    return scale


class HiRA(Renamed):
    """HiRA, without a scale in PEFT."""

    kind = "HIRA"
    reads = writes = ("hira",)
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {"rank": ("r", 32)}
    patterns: ClassVar[Mapping[str, str]] = {"rank": "rank_pattern"}
    keys = Keys(idle=frozenset({"hira_dropout"}))
    conv1d = True
    names: ClassVar[Mapping[str, str]] = {"A": "hira_A", "B": "hira_B"}

    def values_at(self, configuration: Configuration, path: str) -> dict[str, Any]:
        """See ModuleDialect."""
        values = super().values_at(configuration, path)
        return {**values, "alpha": values["rank"]}

    def at_site(self, site: Site, method: Method, p: Leaves) -> dict[str, Tensor]:
        """See ModuleDialect."""
        return {"hira_A": p["A"], "hira_B": _scale(method) * p["B"]}


class GraLoRA(ModuleDialect):
    """GraLoRA; PEFT lays the ranks of a row of blocks side by side."""

    kind = "GRALORA"
    reads = writes = ("gralora",)
    note = "hybrid_r=0"
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "rank": ("r", 32),
        "alpha": ("alpha", 64),
        "blocks": ("gralora_k", 2),
    }
    keys = Keys(only={"hybrid_r": (0,)}, idle=frozenset({"gralora_dropout"}))
    conv1d = True

    def at_site(self, site: Site, method: Method, p: Leaves) -> dict[str, Tensor]:
        """See ModuleDialect."""
        # A [row, column, rank, in] to [column, in, ranks], B [row, column, out, rank] to
        # [row, ranks, out].
        A, B = p["A"].permute(1, 3, 0, 2).flatten(2), p["B"].permute(0, 1, 3, 2).flatten(1, 2)
        return {"gralora_A": A, "gralora_B": B}

    def from_site(self, site: Site, method: Method, found: Leaves) -> dict[str, Tensor]:
        """See ModuleDialect."""
        shape = len(found["gralora_A"]), -1
        A = torch.unflatten(found["gralora_A"], 2, shape).permute(2, 0, 3, 1)
        B = torch.unflatten(found["gralora_B"], 1, shape).permute(0, 1, 3, 2)
        return {"A": A, "B": B}


class DeLoRA(Renamed):
    """DeLoRA."""

    kind = "DELORA"
    reads = writes = ("delora",)
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {**_RANK, "alpha": ("delora_lambda", 15)}
    patterns: ClassVar[Mapping[str, str]] = {"rank": "rank_pattern", "alpha": "lambda_pattern"}
    keys = Keys(idle=frozenset({"module_dropout"}))
    names: ClassVar[Mapping[str, str]] = {
        "A": "delora_A",
        "B": "delora_B",
        "bound": "delora_lambda",
        "norms": "delora_w_norm",
    }


class MiSS(Renamed):
    """MiSS, which was Bone."""

    kind = "MISS"
    reads = writes = ("miss",)
    note = "neither `bat` nor `mini`"
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {"rank": ("r", 64)}
    keys = Keys(only={"init_weights": (True, False)}, idle=frozenset({"mini_r", "miss_dropout"}))
    names: ClassVar[Mapping[str, str]] = {"D": "miss_block"}
    drawn = ("sums",)


class C3A(Renamed):
    """C3A."""

    kind = "C3A"
    reads = writes = ("c3a",)
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {"block": ("block_size", 256)}
    patterns: ClassVar[Mapping[str, str]] = {"block": "block_size_pattern"}
    behind_a_dot = True
    names: ClassVar[Mapping[str, str]] = {"w": "c3a_kernel"}


class RoAd(Renamed):
    """RoAd."""

    kind = "ROAD"
    reads = writes = ("road",)
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "group": ("group_size", 64),
        "variant": ("variant", "road_1"),
    }
    names: ClassVar[Mapping[str, str]] = {"theta": "road_theta", "alpha": "road_alpha"}

    def values_at(self, configuration: Configuration, path: str) -> dict[str, Any]:
        """See ModuleDialect."""
        values = super().values_at(configuration, path)
        name = configuration.text("variant")
        if name not in ("road_1", "road_2", "road_4"):
            configuration.refuse("variant", "road_1, road_2 or road_4")
        return {**values, "variant": int(name[-1])}

    def settings(self, *args: Any) -> dict[str, Any]:
        """See Dialect."""
        values = super().settings(*args)
        return {**values, "variant": f"road_{values['variant']}"}


class HRA(ModuleDialect):
    """HRA."""

    kind = "HRA"
    reads = writes = ("hra",)
    note = "an even rank, apply_GS=False"
    fields = _RANK
    keys = Keys(only={"apply_GS": (False,)})

    def at_site(self, site: Site, method: Method, p: Leaves) -> dict[str, Tensor]:
        """See ModuleDialect."""
        return {"hra_u": p["u"].mT}

    def from_site(self, site: Site, method: Method, found: Leaves) -> dict[str, Tensor]:
        """See ModuleDialect."""
        return {"u": found["hra_u"].mT}


class OFT(ModuleDialect):
    """OFT, whose exact map of Cayley has the other sign of Q."""

    kind = "OFT"
    reads = writes = ("oft",)
    note = "use_cayley_neumann=False: the series is no rotation; neither coft nor block_share"
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {"block": ("oft_block_size", 32)}
    keys = Keys(
        read={"r": 0, "use_cayley_neumann": True},
        only={"block_share": (False,), "coft": (False,)},
        idle=frozenset({"eps", "module_dropout", "num_cayley_neumann_terms"}),
    )
    constants: ClassVar[Mapping[str, Any]] = {"r": 0, "use_cayley_neumann": False}

    def method_at(self, configuration: Configuration, path: str, module: nn.Module) -> Method:
        """See ModuleDialect."""
        if configuration.flag("use_cayley_neumann"):  # as it is, too, where the key is absent
            configuration.refuse("use_cayley_neumann", "false: the series is no rotation")
        count = configuration.whole("r")
        if not count:
            return super().method_at(configuration, path, module)
        width = storage_of(module).widths(module)[0]
        if count < 0 or width % count:
            configuration.refuse("r", f"a divisor of {width}, the width of what {path} reads")
        return build("oft", {"block": width // count})

    def at_site(self, site: Site, method: Method, p: Leaves) -> dict[str, Tensor]:
        """See ModuleDialect."""
        return {"oft_R.weight": -p["Q"]}

    def from_site(self, site: Site, method: Method, found: Leaves) -> dict[str, Tensor]:
        """See ModuleDialect."""
        return {"Q": -found["oft_R.weight"]}

    def settings(
        self, parts: Sequence[Part], held: Leaves, model: nn.Module, origin: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See Dialect. Blocks of several sizes are told by how many there are, if that is one."""
        counts = {p.leaves[names["Q"]].shape[0] for p, _, names in placed(parts)}
        sizes = {p.leaves[names["Q"]].shape[1] for p, _, names in placed(parts)}
        if len(sizes) > 1 and len(counts) == 1:
            paths = sorted(site.path for _, site, _ in placed(parts))
            fixed = {**self.constants, "r": counts.pop(), "oft_block_size": 0}
            return {"target_modules": paths, **fixed}
        return super().settings(parts, held, model, origin)


class BOFT(ModuleDialect):
    """BOFT, with the other sign of Q."""

    kind = "BOFT"
    reads = writes = ("boft",)
    note = "boft_n_butterfly_factor=1, to which PEFT falls back without CUDA"
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {"block": ("boft_block_size", 4)}
    keys = Keys(
        only={"boft_n_butterfly_factor": (1,), "boft_block_num": (0,)},
        idle=frozenset({"boft_dropout"}),
    )
    constants: ClassVar[Mapping[str, Any]] = {"boft_block_num": 0, "boft_n_butterfly_factor": 1}

    def takes(self, method: Method) -> bool:
        """See Dialect."""
        return super().takes(method) and method.depth == 1  # type: ignore[attr-defined]

    def at_site(self, site: Site, method: Method, p: Leaves) -> dict[str, Tensor]:
        """See ModuleDialect."""
        return {"boft_R": -p["Q"], "boft_s": p["s"].unsqueeze(-1)}

    def from_site(self, site: Site, method: Method, found: Leaves) -> dict[str, Tensor]:
        """See ModuleDialect."""
        return {"Q": -found["boft_R"], "s": found["boft_s"].squeeze(-1)}


class BEFT(ModuleDialect):
    """BEFT: a bias for each of some linear modules, which is BitFit there."""

    kind = "BEFT"
    reads = writes = ("bitfit",)
    note = "at linear modules"

    def at_site(self, site: Site, method: Method, p: Leaves) -> dict[str, Tensor]:
        """See ModuleDialect."""
        return {"beft_bias": p["bias"].unsqueeze(0)}

    def from_site(self, site: Site, method: Method, found: Leaves) -> dict[str, Tensor]:
        """See ModuleDialect."""
        return {"bias": found["beft_bias"].squeeze(0)}


class SHiRA(ModuleDialect):
    """SHiRA, whatever its mask: the places are stored."""

    kind = "SHIRA"
    reads = writes = ("shira",)
    fields: ClassVar[Mapping[str, tuple[str, Any]]] = {"rank": ("r", 32)}
    keys = Keys(idle=frozenset({"mask_type", "random_seed"}))
    whole = ("shira_indices",)

    def at_site(self, site: Site, method: Method, p: Leaves) -> dict[str, Tensor]:
        """See ModuleDialect."""
        rows, columns = p["places"] // site.inputs, p["places"] % site.inputs
        return {"shira_weight": p["S"], "shira_indices": torch.stack([rows, columns]).int()}

    def from_site(self, site: Site, method: Method, found: Leaves) -> dict[str, Tensor]:
        """See ModuleDialect."""
        rows, columns = found["shira_indices"]
        ok = (rows >= 0) & (rows < site.outputs) & (columns >= 0) & (columns < site.inputs)
        if not ok.all():
            raise ConfigurationError(f"shira_indices of {site.path} lie outside of its weight.")
        return {"S": found["shira_weight"], "places": rows * site.inputs + columns}
