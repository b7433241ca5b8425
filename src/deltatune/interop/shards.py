"""The weights of a model as files of transformers, written one after the other.

What the files hold is planned on the `meta` device first, by transformers' own functions: which
tied weights are written once, what a model calls otherwise in files than in memory (the experts of
Mixtral lie apart there), how all of it is divided. Then each file is made, written, and compared
with what was meant; beside the model there is one file's content at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from deltatune.core.errors import ArtefactError, UnsupportedError
from deltatune.core.whole import is_sharded, whole_parameter

__all__ = ["Shards"]

_NAME, _INDEX = "model{suffix}.safetensors", "model.safetensors.index.json"


class Shards:
    """The files of a model, planned; nothing is computed yet.

    Args:
        model: of transformers.
        largest: the most that one file holds, as "5GB"; a tensor that is larger has its own.

    Raises:
        UnsupportedError: a weight is sharded over processes or nowhere, it is no plain tensor, or
            tensors are tied in a way that transformers cannot say.
    """

    def __init__(self, model: Any, largest: str) -> None:
        blank = {name: _traced(name, value) for name, value in _kept(model).items()}
        made = revert_weight_conversion(model, dict(blank))
        self._model, self._needed = model, _needed(made, blank)
        self._renamed = {name for name, value in made.items() if blank.get(_first(value)) is value}
        # New ones: what is a part of another would count with all of that.
        self._planned = {name: _blank(value) for name, value in made.items()}
        self._split = split_torch_state_dict_into_shards(
            self._planned, filename_pattern=_NAME, max_shard_size=largest
        )

    def write(self, folder: Path, value_of: Callable[[str], Tensor]) -> None:
        """Writes the files, and their index where there are several.

        Args:
            folder: where.
            value_of: a tensor of the model's state dict by name, as it is to be written.

        Raises:
            ArtefactError: what a file holds is not what was meant.
            OSError, SafetensorError: a file cannot be written.
        """
        made: dict[str, Tensor] = {}
        for file, names in self._split.filename_to_tensors.items():
            shard: dict[str, Tensor] = {}
            for name in names:
                if name not in made:
                    made = self._converted(name, value_of)
                shard[name] = made.pop(name).contiguous()
            save_file(shard, folder / file, metadata={"format": "pt"})
            self._check(folder / file, shard)
        if self._split.is_sharded:
            total = {"total_parameters": self._model.num_parameters(), **self._split.metadata}
            index = {"metadata": total, "weight_map": self._split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / _INDEX).write_text(text, encoding="utf-8")

    def _converted(self, name: str, value_of: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The tensor that a file calls so, with all that is made together with it."""
        held = {one: value_of(one) for one in self._needed[name]}
        if name in self._renamed:
            return {name: held.popitem()[1]}
        made: dict[str, Tensor] = revert_weight_conversion(self._model, held)
        if name not in made:
            raise UnsupportedError(
                f"transformers makes {name} of more than {', '.join(self._needed[name])}, so that "
                "it cannot be written by itself."
            )
        return made

    def _check(self, path: Path, meant: Mapping[str, Tensor]) -> None:
        """Raises ArtefactError unless a file holds these tensors as they were planned, bit for bit;
        reads one at a time.
        """
        with safe_open(path, "pt") as file:
            if set(file.keys()) != set(meant):
                raise ArtefactError(f"{path} does not hold the tensors that were written to it.")
            for name, value in meant.items():
                found, planned = file.get_tensor(name), self._planned[name]
                same = (found.dtype, found.shape) == (planned.dtype, planned.shape)
                if not same or not torch.equal(_bytes(found), _bytes(value.cpu())):
                    raise ArtefactError(
                        f"{path}: {name} is {found.dtype} {tuple(found.shape)}, and not what was "
                        f"meant, {planned.dtype} {tuple(planned.shape)}. Write it again."
                    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _kept(model: Any) -> dict[str, Tensor]:
    """The state dict of a model without what transformers does not write."""
    state = dict(model.state_dict())
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    for name, value in state.items():
        path, _, own = name.rpartition(".")
        held = whole_parameter(model.get_submodule(path), own) if _plain(value) else None
        if held is None or held.is_meta:
            raise UnsupportedError(
                f"{name} is sharded over processes, without a value or no plain tensor, so that it "
                "cannot be written. Load the model as a whole and in plain numbers."
            )
    try:
        found: dict[str, Tensor] = remove_tied_weights_from_state_dict(state, model)
    except RuntimeError as error:
        raise UnsupportedError(
            f"Weights are tied in a way that a checkpoint cannot say: {error}"
        ) from None
    return found


def _plain(value: object) -> bool:
    return isinstance(value, Tensor) and not is_sharded(value)


class _Traced(Tensor):
    """A tensor without values that knows which names of the state dict it is made of."""

    sources: frozenset[str] = frozenset()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        given = _traced_in([*args, *(kwargs or {}).values()])
        # What is given may be changed in place. Where it is not, no harm is done: what two tensors
        # are made of is converted together once anything is made of both.
        for one in [*_traced_in([made]), *given]:
            one.sources = one.sources.union(*(other.sources for other in given))
        return made


def _blank(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _traced(name: str, value: Tensor) -> _Traced:
    made = _blank(value).as_subclass(_Traced)
    made.sources = frozenset([name])
    return made


def _traced_in(value: Any) -> list[_Traced]:
    """All of them in a value, in lists and in tuples."""
    if isinstance(value, _Traced):
        return [value]
    parts = value if isinstance(value, list | tuple) else ()
    return [one for part in parts for one in _traced_in(part)]


def _sources(value: Tensor) -> frozenset[str]:
    return value.sources if isinstance(value, _Traced) else frozenset()


def _first(value: Tensor) -> str:
    return min(_sources(value), default="")


def _needed(made: Mapping[str, Tensor], blank: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Of each tensor in the files, the names of the state dict that are converted with it: those
    that it is made of, and all that are joined with one of them; all names where nothing is known.
    """
    groups = {name: {name} for name in blank}
    for value in made.values():
        joined = set[str]().union(*(groups[name] for name in _sources(value) or blank))
        groups |= dict.fromkeys(joined, joined)
    return {
        name: tuple(sorted(groups[_first(value) or min(blank)])) for name, value in made.items()
    }
