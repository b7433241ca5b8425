"""A model's answers to examples, in batches of similar length.

`generate` is the paper's way: greedy decoding, special tokens left out, tokenisation cleaned up,
stripped. `rank` asks a text-to-text model only which label word it finds most likely, which tells
more about a weak model. An encoder's head has no mode: the largest of the task's outputs wins, or
the value is taken.

Gradients are switched off with `torch.no_grad`: tensors made in inference mode cannot be saved for
a later backward pass, and caches of a delta may outlive the evaluation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltatune.backbones.encoding import (
    IGNORED,
    Encoding,
    Form,
    Row,
    collate,
    collate_prompts,
    encode_prompts,
    target_ids,
)
from deltatune.core.errors import ConfigurationError, UnknownNameError
from deltatune.tasks.example import Example
from deltatune.tasks.task import Task

__all__ = ["Mode", "Prediction", "longest_answer", "predict"]

Mode = Literal["generate", "rank"]
Prediction = list[str] | list[int] | list[float]

_MODES = ("generate", "rank")


def predict(
    model: nn.Module,
    tokenizer: Any,
    form: Form,
    examples: Sequence[Example],
    task: Task,
    *,
    batch_size: int = 32,
    mode: Mode = "generate",
    maximum_source: int | None = None,
    precision: torch.dtype = torch.float32,
    beams: int = 1,
    warnings: list[str] | None = None,
) -> Prediction:
    """Returns one prediction per example, in their order.

    Args:
        model: a model of transformers, with or without deltas attached; put in evaluation mode
            meanwhile.
        tokenizer: its tokenizer.
        form: encoder (with a head), encoder_decoder or decoder.
        examples: what to answer to; only inputs are looked at.
        task: their record.
        batch_size: rows per forward pass.
        mode: "generate" or "rank"; "rank" needs a classification task. An encoder ignores it.
        maximum_source: longest input in tokens. None takes the record's.
        precision: bfloat16 or float16 runs under autocast; float32 does not.
        beams: beams of the search, 1 is greedy.
        warnings: a list to which a line is added if inputs had to be truncated.

    Returns:
        Texts for the text-to-text forms; class indices for a head; values for a head of regression.

    Raises:
        UnknownNameError: there is no such mode or form.
        ConfigurationError: the mode does not fit the task, or the head is narrower than the label
            set.
    """
    if mode not in _MODES:
        raise UnknownNameError("mode", mode, _MODES)
    if mode == "rank" and not task.labels and form != "encoder":
        raise ConfigurationError(
            f"{task.name} has no label words to rank. Use mode='generate' for this task."
        )
    prompts = encode_prompts(
        examples, tokenizer, form, maximum_source=maximum_source or task.lengths.source
    )
    if prompts.warning and warnings is not None:
        warnings.append(f"{task.name}: {prompts.warning}")
    answers: list[Any] = [None] * len(prompts)
    with _evaluating(model), torch.no_grad(), _cast(model, precision):
        for chosen in _batches(prompts, batch_size):
            rows = [prompts.rows[index] for index in chosen]
            if form == "encoder":
                found: Sequence[Any] = _head(model, tokenizer, rows, task)
            elif mode == "rank":
                found = _ranked(model, tokenizer, form, rows, task)
            else:
                found = _generated(model, tokenizer, form, rows, task, beams)
            for index, answer in zip(chosen, found, strict=True):
                answers[index] = answer
    return answers


def longest_answer(tokenizer: Any, form: Form, task: Task) -> int:
    """Returns how many tokens an answer may need: the longest label, or the record's length."""
    if not task.labels:
        return task.lengths.target
    return max(len(target_ids(tokenizer, form, label)) for label in task.labels)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _cast(model: nn.Module, precision: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    if precision == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(_device(model).type, dtype=precision)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _batches(prompts: Encoding, size: int) -> list[list[int]]:
    # The longest first: a batch that does not fit into memory is found at once.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts.rows[index]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _on(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    device = _device(model)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _head(
    model: nn.Module, tokenizer: Any, rows: list[Row], task: Task
) -> Sequence[int] | Sequence[float]:
    logits = model(**_on(model, collate_prompts(rows, tokenizer, "encoder"))).logits.float()
    width = task.head_width or 0
    if logits.ndim != 2 or logits.shape[1] < width:
        raise ConfigurationError(
            f"{task.name} needs a head of {width} outputs, found logits of shape "
            f"{tuple(logits.shape)}. "
            f"Load the backbone with labels={width}."
        )
    if task.kind == "regression":
        values: list[float] = logits[:, 0].tolist()
        return values
    # A head may be wider than this task's label set, when several tasks share it.
    classes: list[int] = logits[:, :width].argmax(dim=-1).tolist()
    return classes


def _generated(
    model: Any, tokenizer: Any, form: Form, rows: list[Row], task: Task, beams: int
) -> list[str]:
    batch = _on(model, collate_prompts(rows, tokenizer, form))
    batch.pop("token_type_ids", None)
    ids = model.generate(
        **batch,
        max_new_tokens=longest_answer(tokenizer, form, task),
        do_sample=False,
        num_beams=beams,
        pad_token_id=tokenizer.eos_token_id
        if tokenizer.pad_token_id is None
        else tokenizer.pad_token_id,
    )
    if form == "decoder":
        ids = ids[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)
    return [text.strip() for text in texts]


def _ranked(model: Any, tokenizer: Any, form: Form, rows: list[Row], task: Task) -> list[str]:
    encoded: dict[str, Any] = {}
    if form == "encoder_decoder":
        # What the encoder makes of a row is the same for every label.
        batch = _on(model, collate_prompts(rows, tokenizer, form))
        batch.pop("token_type_ids", None)
        outputs = model.get_encoder()(**batch, return_dict=True)
        encoded = {"encoder_outputs": outputs, "attention_mask": batch["attention_mask"]}
    scores = [
        _likelihood(model, tokenizer, rows, target_ids(tokenizer, form, label), encoded)
        for label in task.labels
    ]
    return [task.labels[index] for index in torch.stack(scores).argmax(dim=0).tolist()]


def _likelihood(
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    target: tuple[int, ...],
    encoded: Mapping[str, Any],
) -> Tensor:
    """Returns the log-likelihood [rows] of `target`, end token included, after each row: of an
    encoder-decoder after what its encoder made of the rows, of a decoder (`encoded` is empty) after
    the rows themselves.
    """
    if encoded:
        labels = torch.tensor([target] * len(rows), device=_device(model))
        logits = model(**encoded, labels=labels).logits.float()
    else:
        answered = [
            Row((*row.input_ids, *target), (*(IGNORED for _ in row.input_ids), *target))
            for row in rows
        ]
        batch = _on(model, collate(answered, tokenizer, "decoder"))
        # A decoder's output at a token speaks of the next one.
        logits, labels = model(**batch).logits[:, :-1].float(), batch["labels"][:, 1:]
    chosen = labels.clamp_min(0).unsqueeze(-1)
    each = logits.log_softmax(dim=-1).gather(-1, chosen).squeeze(-1)
    total: Tensor = each.masked_fill(labels == IGNORED, 0.0).sum(dim=-1)
    return total
