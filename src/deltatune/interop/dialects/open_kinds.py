"""OpenDelta's kinds, but those that stand in front of a text: what each has at its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from deltatune.core.errors import ArtefactError
from deltatune.core.grammar import build
from deltatune.core.method import Leaves
from deltatune.core.site import Site
from deltatune.core.storage import storage_of
from deltatune.core.target import find_sites
from deltatune.interop.configuration import Configuration, Keys
from deltatune.interop.dialects.open_places import named_modules
from deltatune.interop.pieces import Piece

__all__ = ["COMMON", "KINDS", "Kind"]

Kind = tuple[Keys, Callable[[Configuration, nn.Module], Iterator[Piece]]]

COMMON = Keys(
    read={
        "delta_type": None,
        "modified_modules": None,
        "exclude_modules": ["lm_head"],
        "unfrozen_modules": ["deltas"],
        "common_structure": False,
    },
    idle=frozenset({"backbone_checkpoint_name", "backbone_class", "backbone_hash"})
    | frozenset({"opendelta_version", "transformers_version"}),
)  #: of every kind
_ACTIVATIONS: Mapping[str, str] = {
    "relu": "relu",
    "tanh": "tanh",
    "swish": "silu",
    "silu": "silu",
    "gelu": "gelu",
    "gelu_orig": "gelu",
    "gelu_new": "gelu_tanh",
}


def _activation(configuration: Configuration) -> str:
    name = configuration.text("non_linearity").lower()
    if name not in _ACTIVATIONS:
        configuration.refuse("non_linearity", f"one of {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[name]


def _linears(configuration: Configuration, model: nn.Module) -> Iterator[tuple[str, int, int]]:
    """The modules of a kind that acts at linear ones, with their widths. Raises ArtefactError."""
    key = "modified_modules"
    for path in named_modules(configuration, key, configuration.texts(key), model):
        module = model.get_submodule(path)
        storage = storage_of(module)
        if not storage.linear:
            raise ArtefactError(
                f"{configuration.where}: {path} is a {type(module).__name__}, and deltatune reads "
                f"{configuration.text('delta_type')} at linear modules alone."
            )
        yield path, *storage.widths(module)


def _picked(names: Mapping[str, str], found: Leaves, site: Site) -> dict[str, Tensor]:
    """Leaves that are the folder's tensors."""
    del site
    return {leaf: found[name] for leaf, name in names.items()}


def _turned(names: Mapping[str, str], found: Leaves, site: Site) -> dict[str, Tensor]:
    """The same, matrices and all of a stack of them transposed."""
    picked = _picked(names, found, site)
    return {leaf: value.mT if value.dim() > 1 else value for leaf, value in picked.items()}


def _lora(configuration: Configuration, model: nn.Module) -> Iterator[Piece]:
    rank, alpha = configuration.count("lora_r"), configuration.number("lora_alpha")
    dropout = configuration.number("lora_dropout")
    method = build("lora", {"rank": rank, "alpha": alpha, "dropout": dropout})
    for path, inputs, outputs in _linears(configuration, model):
        names = {"A": f"{path}.lora.lora_A", "B": f"{path}.lora.lora_B"}
        shapes = {names["A"]: (rank, inputs), names["B"]: (outputs, rank)}
        yield Piece(method, path, shapes, partial(_picked, names))


def _bottleneck(start: str, inputs: int, width: int, outputs: int) -> tuple[Any, Any]:
    """Names by leaves, and shapes by names."""
    names = {
        "D": f"{start}.modulelist.down_proj.weight",
        "c": f"{start}.modulelist.down_proj.bias",
        "U": f"{start}.modulelist.up_proj.weight",
        "e": f"{start}.modulelist.up_proj.bias",
    }
    sizes = ((width, inputs), (width,), (outputs, width), (outputs,))
    return names, dict(zip(names.values(), sizes, strict=True))


def _adapter(configuration: Configuration, model: nn.Module) -> Iterator[Piece]:
    width = configuration.count("bottleneck_dim")
    method = build("adapter", {"bottleneck": width, "activation": _activation(configuration)})
    for path, _, outputs in _linears(configuration, model):
        names, shapes = _bottleneck(f"{path}.adapter", outputs, width, outputs)
        yield Piece(method, path, shapes, partial(_picked, names))


def _parallel(configuration: Configuration, model: nn.Module) -> Iterator[Piece]:
    """Pairs of modules: it reads what the first reads, and adds to what the second gives."""
    width = configuration.count("bottleneck_dim")
    fields = {"bottleneck": width, "activation": _activation(configuration), "scale": 1.0}
    terms = configuration.texts("modified_modules")
    if len(terms) % 2:
        configuration.refuse("modified_modules", "pairs of names, as OpenDelta takes them")
    spans = {
        (site.entry[0], site.path): site
        for site in find_sites(model, "attention | ffn", "output")
        if site.entry is not None
    }
    wholes = {
        first.rpartition(".")[0]: site
        for (first, last), site in spans.items()
        if first.rpartition(".")[0] == last.rpartition(".")[0]
        and type(model.get_submodule(first.rpartition(".")[0])).__name__ == "GPT2Attention"
    }
    for one, two in zip(terms[::2], terms[1::2], strict=True):
        enter, leave = (
            named_modules(configuration, "modified_modules", [term], model) for term in (one, two)
        )
        if len(enter) != len(leave):
            configuration.refuse("modified_modules", "pairs that name as many modules each")
        for pair in zip(enter, leave, strict=True):
            site = wholes.get(pair[0]) if one == two else spans.get(pair)
            if site is None:
                raise ArtefactError(
                    f"{configuration.where}: from the input of {pair[0]} to the output of "
                    f"{pair[1]} is no sublayer without its residual and norm, which is what "
                    "parallel stands beside."
                )
            names, shapes = _bottleneck(
                f"{pair[0]}.parallel_adapter", site.inputs, width, site.outputs
            )
            make = partial(_picked, names)
            yield Piece(build("parallel", fields), site.name, shapes, make, module=False)


def _reduced(configuration: Configuration, width: int) -> int:
    reduced = width // configuration.count("reduction_factor")
    if reduced < 1:
        configuration.refuse("reduction_factor", f"at most {width}, the width of its modules")
    return reduced


def _low_rank(configuration: Configuration, model: nn.Module) -> Iterator[Piece]:
    """Of rank one, the only one that OpenDelta computes: it multiplies the factors entry by entry,
    which for a column and a row is their product.
    """
    activation = _activation(configuration)
    for path, _, outputs in _linears(configuration, model):
        m = _reduced(configuration, outputs)
        fields = {"bottleneck": m, "activation": activation, "rank": 1}
        start = f"{path}.low_rank_adapter."
        names = {
            "t": f"{start}down_sampler.W_left",
            "s": f"{start}down_sampler.W_right",
            "c": f"{start}down_sampler.b",
            "v": f"{start}up_sampler.W_left",
            "u": f"{start}up_sampler.W_right",
            "e": f"{start}up_sampler.b",
        }
        sizes = ((outputs, 1), (1, m), (m,), (m, 1), (1, outputs), (outputs,))
        shapes = dict(zip(names.values(), sizes, strict=True))
        yield Piece(build("low_rank_adapter", fields), path, shapes, partial(_turned, names))


def _compacter(configuration: Configuration, model: nn.Module) -> Iterator[Piece]:
    """A rule for each map, which is a PHM adapter; of low rank there, which is multiplied out."""
    n, r = configuration.count("hypercomplex_division"), configuration.count("phm_rank")
    activation = _activation(configuration)
    for path, _, outputs in _linears(configuration, model):
        m = _reduced(configuration, outputs)
        start = f"{path}.compactor."
        shapes: dict[str, tuple[int, ...]] = {}
        for part, into, out in (("down", outputs, m), ("up", m, outputs)):
            shapes |= {
                f"{start}{part}_sampler.phm_rule": (n, n, n),
                f"{start}{part}_sampler.W_left": (n, into // n, r),
                f"{start}{part}_sampler.W_right": (n, r, out // n),
                f"{start}{part}_sampler.b": (out,),
            }
        method = build("phm_adapter", {"bottleneck": m, "activation": activation, "terms": n})
        yield Piece(method, path, shapes, partial(_hypercomplex, start))


def _hypercomplex(start: str, found: Leaves, site: Site) -> dict[str, Tensor]:
    del site
    made: dict[str, Tensor] = {}
    for part, bias in (("down", "c"), ("up", "e")):
        own = f"{start}{part}_sampler."
        made[f"{part}_rule"] = found[f"{own}phm_rule"].mT
        made[part] = (found[f"{own}W_left"] @ found[f"{own}W_right"]).mT
        made[bias] = found[f"{own}b"]
    return made


def _bitfit(configuration: Configuration, model: nn.Module) -> Iterator[Piece]:
    """The biases within the modules, which the folder has as they are, and we as differences."""
    paths: dict[str, None] = {}
    key = "modified_modules"
    for path in named_modules(configuration, key, configuration.texts(key), model):
        for name, module in model.get_submodule(path).named_modules(prefix=path):
            if module._parameters.get("bias") is not None:
                paths[name] = None
            elif storage_of(module).linear or (module._parameters and not list(module.children())):
                raise ArtefactError(
                    f"{configuration.where}: {name} has no bias, and OpenDelta does not begin one "
                    "at zero. It is read for backbones that have them."
                )
    for path in paths:
        bias = model.get_submodule(path)._parameters["bias"]
        assert bias is not None
        shapes = {f"{path}.bias": tuple(bias.shape)}
        yield Piece(build("bitfit", {}), path, shapes, partial(_difference, f"{path}.bias"))


def _difference(name: str, found: Leaves, site: Site) -> dict[str, Tensor]:
    bias = site.parameters["bias"]
    assert bias is not None
    return {"bias": found[name] - bias.detach().float().cpu()}


KINDS: Mapping[str, Kind] = {
    "adapter": (
        Keys(read={"bottleneck_dim": 24, "non_linearity": "gelu_new"}),
        _adapter,
    ),
    "bitfit": (Keys(), _bitfit),
    "compacter": (
        Keys(
            read={
                "reduction_factor": 16,
                "non_linearity": "relu",
                "hypercomplex_division": 4,
                "phm_rank": 1,
            },
            only={
                "factorized_phm": (True,),
                "factorized_phm_rule": (False,),
                "shared_phm_rule": (False,),
                "shared_W_phm": (False,),
                "use_bias_down_sampler": (True,),
                "use_bias_up_sampler": (True,),
            },
            idle=frozenset({"bottleneck_dim", "hypercomplex_nonlinearity", "kronecker_prod"})
            | frozenset({"learn_phm", "phm_c_init", "phm_init_range", "sequential"}),
        ),
        _compacter,
    ),
    "lora": (
        Keys(read={"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0}),
        _lora,
    ),
    "low_rank_adapter": (
        Keys(
            read={"reduction_factor": 32, "non_linearity": "gelu_new"},
            only={"low_rank_rank": (1,)},
            idle=frozenset({"low_rank_w_init"}),
        ),
        _low_rank,
    ),
    "parallel_adapter": (
        # It never reads `scaled`.
        Keys(
            read={"bottleneck_dim": 24, "non_linearity": "gelu_new"},
            idle=frozenset({"scaled"}),
        ),
        _parallel,
    ),
}  #: `delta_type` to its keys, and to what it has on a model
