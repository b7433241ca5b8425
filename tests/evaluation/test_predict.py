"""Prediction with tiny models: the batch must not matter, and what is trained must be answered."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deltatune
from deltatune.backbones.encoding import Form, collate, encode
from deltatune.core.errors import ConfigurationError, UnknownNameError
from deltatune.evaluation import predict, score
from deltatune.evaluation.predicting import longest_answer
from deltatune.tasks import TASKS, Example, Task
from deltatune.tasks.example import Row

TEXTS = ["a cat", "the dog ran over there", "b", "one more cat in a far larger house", "dog dog"]


def _tokenizer() -> Any:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )


TOKENIZER = _tokenizer()


def _model(form: Form, labels: int = 2) -> Any:
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    torch.manual_seed(0)
    size = len(TOKENIZER)
    if form == "encoder_decoder":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=size, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
                decoder_start_token_id=0, eos_token_id=1, dropout_rate=0.0,
            )
        )  # fmt: skip
    if form == "decoder":
        config = GPT2Config(
            vocab_size=size, n_embd=32, n_layer=1, n_head=4, n_positions=128,
            bos_token_id=1, eos_token_id=1,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        return GPT2LMHeadModel(config)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=size, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
            intermediate_size=64, num_labels=labels,
        )
    )  # fmt: skip


def _examples(task: Task) -> list[Example]:
    return [task.example(Row({"text": text, "label": int("dog" in text)}, "x")) for text in TEXTS]


def _task(**changes: Any) -> Task:
    return Task.model_validate(
        TASKS["ag_news"].model_dump() | {"labels": ["no", "yes_it_is"], "metric": "ACC"} | changes
    )


@pytest.mark.parametrize("mode", ["generate", "rank"])
@pytest.mark.parametrize("form", ["encoder_decoder", "decoder", "encoder"])
def test_the_batch_does_not_matter(form: Form, mode: Any) -> None:
    task, model = _task(), _model(form)
    examples = _examples(task)
    one = predict(model, TOKENIZER, form, examples, task, batch_size=1, mode=mode)
    assert one == predict(model, TOKENIZER, form, examples, task, batch_size=4, mode=mode)
    backwards = predict(model, TOKENIZER, form, examples[::-1], task, batch_size=3, mode=mode)
    assert one == backwards[::-1]
    assert len(one) == len(examples)


@pytest.mark.parametrize("form", ["encoder_decoder", "decoder"])
def test_what_was_trained_is_answered(form: Form) -> None:
    """Encoding, collating and generating agree on where the answer begins and ends."""
    task, model = _task(), _model(form)
    examples = _examples(task)
    rows = encode(examples, TOKENIZER, form, maximum_source=64, maximum_target=16).rows
    batch = collate(rows, TOKENIZER, form)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimiser.step()
        if loss.item() < 0.01:
            break
    answers = predict(model, TOKENIZER, form, examples, task, batch_size=2)
    assert score(task, answers, examples) == {"ACC": 1.0, "invalid": 0.0}
    assert predict(model, TOKENIZER, form, examples, task, mode="rank") == answers
    assert predict(model, TOKENIZER, form, examples, task, beams=2) == answers


@pytest.mark.parametrize("form", ["encoder_decoder", "decoder"])
@pytest.mark.parametrize(
    "method",
    [None, "prompt(length=3)", "prefix(length=2)", "attempt", "x_lora(lora(rank=2), pfeiffer)"],
)
def test_rank_is_the_likelihood_of_the_label(form: Form, method: str | None) -> None:
    """Against a loop over rows and labels with the model's own loss, an encoder pass for each."""
    task, model = _task(), _model(form).eval()
    if method is not None:
        random = torch.Generator().manual_seed(0)
        for leaf in deltatune.attach(model, method).parameters():
            leaf.data.normal_(std=0.7, generator=random)
    examples = _examples(task)
    expected = []
    for example in examples:
        losses = []
        for label in task.labels:
            fake = Example(example.source, (label,), (), None, "0")
            rows = encode([fake], TOKENIZER, form, maximum_source=256, maximum_target=32).rows
            batch = collate(rows, TOKENIZER, form)
            tokens = (batch["labels"] != -100).sum()
            losses.append((model(**batch).loss * tokens).item())
        expected.append(task.labels[losses.index(min(losses))])
    assert predict(model, TOKENIZER, form, examples, task, mode="rank") == expected


def test_a_head_wider_than_the_label_set() -> None:
    task, model = _task(), _model("encoder", labels=9)
    with torch.no_grad():
        model.classifier.bias[5] = 100.0
    assert set(predict(model, TOKENIZER, "encoder", _examples(task), task)) <= {0, 1}


def test_regression_values() -> None:
    task = TASKS["glue_stsb"]
    rows = [Row({"sentence1": text, "sentence2": "b", "label": 1.0}, "x") for text in TEXTS]
    found = predict(
        _model("encoder", labels=1), TOKENIZER, "encoder", [task.example(r) for r in rows], task
    )
    assert all(isinstance(value, float) for value in found) and len(set(found)) > 1


def test_a_head_too_narrow() -> None:
    task = TASKS["trec"]
    examples = [task.example(Row({"text": "a", "coarse_label": 0}, "x"))]
    with pytest.raises(ConfigurationError, match=r"needs a head of 6 outputs.*labels=6"):
        predict(_model("encoder"), TOKENIZER, "encoder", examples, task)


def test_modes() -> None:
    task, model = _task(), _model("encoder_decoder")
    with pytest.raises(UnknownNameError, match="Did you mean 'rank'"):
        predict(model, TOKENIZER, "encoder_decoder", _examples(task), task, mode="ranks")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="no label words to rank"):
        predict(model, TOKENIZER, "encoder_decoder", [], TASKS["samsum"], mode="rank")


def test_truncation_is_told() -> None:
    task, told = _task(), list[str]()
    model = _model("encoder")
    predict(model, TOKENIZER, "encoder", _examples(task), task, maximum_source=10, warnings=told)
    assert told == ["ag_news: Truncated, of 5 rows: 2 inputs to 10 tokens."]
    predict(model, TOKENIZER, "encoder", _examples(task), task, warnings=told)
    assert len(told) == 1


def test_the_model_is_left_as_it_was() -> None:
    task, model = _task(), _model("encoder")
    for training in (True, False):
        model.train(training)
        predict(model, TOKENIZER, "encoder", _examples(task), task)
        assert model.training is training
    parameter = next(model.parameters())
    assert parameter.requires_grad and not parameter.is_inference()


def test_bfloat16() -> None:
    task, model = _task(), _model("encoder")
    examples = _examples(task)
    found = predict(model, TOKENIZER, "encoder", examples, task, precision=torch.bfloat16)
    assert len(found) == len(examples)
    assert next(model.parameters()).dtype == torch.float32


def test_no_examples_no_predictions() -> None:
    assert predict(_model("encoder"), TOKENIZER, "encoder", [], _task()) == []


def test_room_for_the_answer() -> None:
    assert longest_answer(TOKENIZER, "encoder_decoder", _task()) == len("yes_it_is") + 1
    assert longest_answer(TOKENIZER, "decoder", _task()) == len(" yes_it_is") + 1
    assert longest_answer(TOKENIZER, "decoder", TASKS["samsum"]) == 64
