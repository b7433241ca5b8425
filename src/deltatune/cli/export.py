"""`deltatune export`: a saved delta in a form that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltatune.cli.options import Backbone, Json
from deltatune.cli.output import print_json, show
from deltatune.core.errors import ConfigurationError, UnknownNameError

if TYPE_CHECKING:
    from deltatune.backbones.load import Backbone as Loaded
    from deltatune.core.delta import Delta

__all__ = ["FORMS", "export"]

FORMS = ("checkpoint", "lora", "peft")
# What a checkpoint is compared on: prose, names and numbers, in sentences of several lengths.
TEXTS = (
    "The bridge was closed after the storm, and nobody knew when it would open again.",
    "In 1969 Neil Armstrong walked on the moon; about 600 million people watched.",
    "Is this film worth two hours of an evening? The second half is, for its music alone.",
)


def export(
    delta: Annotated[Path, typer.Argument(help="Folder of a saved delta.")],
    out: Annotated[Path, typer.Option(help="Folder to write, which must not exist.")],
    form: Annotated[
        str,
        typer.Option(
            "--as",
            help="checkpoint: the whole model with the delta in its weights, compared on text;"
            " peft: a folder of PEFT; lora: a delta of LoRAs and differences, by SVD.",
            metavar="FORM",
        ),
    ],
    backbone: Backbone = None,
    rank: Annotated[int | None, typer.Option(help="Of lora: the most of a weight.")] = None,
    as_json: Json = False,
) -> None:
    """Write a saved delta in a form that other programs read.

    What acts on activations is in no weight, and only PEFT has a form for some of it.
    """
    from deltatune import api

    if form not in FORMS:
        raise UnknownNameError("form", form, FORMS)
    if rank is not None and form != "lora":
        raise ConfigurationError(f"--rank is of --as lora; found --as {form}.")
    loaded = _backbone(delta, backbone)
    found = _written(api.load(delta, loaded.model, inputs=_inputs(loaded)), loaded, form, out, rank)
    if as_json:
        print_json({"folder": str(out), **found})
    else:
        show(f"{form}: {out}", *(f"{name}: {value}" for name, value in found.items()))


def _backbone(folder: Path, name: str | None) -> Loaded:
    """That which a delta names, or another one."""
    from deltatune.backbones.load import load_backbone
    from deltatune.core.artefact import read

    facts = read(folder).facts
    known = name or facts.get("backbone")
    if not isinstance(known, str):
        raise ConfigurationError(f"{folder} does not name its backbone. Give --backbone.")
    return load_backbone(known, labels=facts.get("head_width") or None)


def _written(
    delta: Delta, loaded: Loaded, form: str, out: Path, rank: int | None
) -> dict[str, Any]:
    """Writes it, and returns what is to be said of it."""
    from dataclasses import asdict

    from deltatune.composition import as_delta, effective
    from deltatune.core.artefact import save
    from deltatune.interop import checkpoint, peft

    if form == "peft":
        peft.write(delta, out)
        return {}
    if form == "checkpoint":
        parity = checkpoint.write(delta, out, _inputs(loaded), tokenizer=loaded.tokenizer)
        return asdict(parity)
    made = as_delta(effective(delta), rank=rank)
    delta.detach()
    save(made.delta, out)
    return {"method": str(made.delta.expression), "left out of the change": made.error}


def _inputs(loaded: Loaded) -> dict[str, Any]:
    tokens = loaded.tokenizer(list(TEXTS), return_tensors="pt", padding=True)
    given = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
    if loaded.form == "encoder_decoder":
        given["decoder_input_ids"] = tokens.input_ids[:, :4]
    return given
