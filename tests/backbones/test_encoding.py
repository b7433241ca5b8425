from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltatune.backbones.encoding import (
    DECODER_CUE,
    IGNORED,
    Form,
    Row,
    RowOfSeveral,
    collate,
    collate_prompts,
    encode,
    encode_prompts,
    target_ids,
)
from deltatune.core.errors import ConfigurationError, UnknownNameError

FORMS: tuple[Form, ...] = ("encoder_decoder", "decoder", "encoder")
TEXT = st.text("abc de.\n", max_size=60)


@dataclass(frozen=True)
class Plain:
    """The least that can be encoded."""

    source: str
    targets: tuple[str, ...] = ("yes",)
    texts: tuple[str, ...] = ()
    label: int | float | None = 0
    continues: bool = False
    turns: tuple[tuple[str, str], ...] = ()


def _plain(text: str, label: int | float | None = 0) -> Plain:
    return Plain(text, ("yes",), (text,), label)


def _tokenizer(kind: str) -> Any:
    """A byte-level tokenizer whose special tokens stand where those of T5, GPT-2 or BERT stand."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "[CLS]", "[SEP]"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    template = tokenizers.processors.TemplateProcessing
    ids = [(token, vocabulary[token]) for token in special]
    if kind == "encoder_decoder":
        tokenizer.post_processor = template(single="$A </s>", special_tokens=ids)
    if kind == "encoder":
        tokenizer.post_processor = template(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
        )
    padding = {} if kind == "decoder" else {"pad_token": "<pad>"}
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if kind == "encoder" else [])]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", model_input_names=names, **padding
    )


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    """A tokenizer for each form."""
    return {form: _tokenizer(form) for form in FORMS}


def test_encoder_decoder(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["encoder_decoder"]
    encoding = encode(
        [_plain("ab")], tokenizer, "encoder_decoder", maximum_source=8, maximum_target=8
    )
    (row,) = encoding
    assert tokenizer.decode(row.input_ids) == "ab</s>"
    assert isinstance(row.labels, tuple)
    assert tokenizer.decode(row.labels) == "yes</s>"
    assert len(row) == 3 + 4
    assert encoding.warning is None


def test_decoder_learns_the_target_only(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["decoder"]
    (row,) = encode([_plain("ab")], tokenizer, "decoder", maximum_source=20, maximum_target=8)
    assert tokenizer.decode(row.input_ids) == f"ab{DECODER_CUE} yes</s>"
    assert isinstance(row.labels, tuple)
    learnt = [label for label in row.labels if label != IGNORED]
    assert tokenizer.decode(learnt) == " yes</s>"
    assert row.labels[-len(learnt) :] == row.input_ids[-len(learnt) :] == tuple(learnt)
    assert len(row) == len(row.input_ids)
    (prompt,) = encode_prompts([_plain("ab")], tokenizer, "decoder", maximum_source=20)
    assert prompt.input_ids == row.input_ids[: -len(learnt)] and prompt.labels is None


@pytest.mark.parametrize("form", ["encoder_decoder", "decoder"])
def test_several_right_answers(tokenizers: dict[str, Any], form: Form) -> None:
    limits = {"maximum_source": 64, "maximum_target": 6}
    answers = ("yes", "no", "far too long")
    (row,) = encode([Plain("a b", answers)], tokenizers[form], form, **limits).rows
    alone = [
        encode([Plain("a b", (answer,))], tokenizers[form], form, **limits).rows[0]
        for answer in answers
    ]
    assert isinstance(row, RowOfSeveral)
    assert Row(row.input_ids, row.labels) == alone[0] and list(row.others) == alone[1:]
    both = encode([Plain("a b", answers), Plain("a")], tokenizers[form], form, **limits)
    assert both.targets_truncated == 1 and type(both.rows[1]) is Row


def test_a_prompt_does_not_end(tokenizers: dict[str, Any]) -> None:
    # A tokenizer that ends every text with its end token: the end must not stand before the cue.
    tokenizer = tokenizers["encoder_decoder"]
    (prompt,) = encode_prompts([_plain("ab")], tokenizer, "decoder", maximum_source=20)
    assert tokenizer.eos_token_id not in prompt.input_ids


def test_encoder_pairs(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["encoder"]
    example = Plain("", (), ("ab", "c"), 2)
    (row,) = encode([example], tokenizer, "encoder", maximum_source=8, maximum_target=2)
    assert tokenizer.decode(row.input_ids) == "[CLS]ab[SEP]c[SEP]"
    assert row.token_type_ids == (0, 0, 0, 0, 1, 1)
    assert row.labels == 2


def test_truncation_is_counted(tokenizers: dict[str, Any]) -> None:
    texts = ["a" * 3, "a" * 30, "a" * 40]
    examples = [Plain(text, (text,), (text,), 0) for text in texts]
    for form in FORMS:
        room = 9 + (len(DECODER_CUE) if form == "decoder" else 0)
        encoding = encode(examples, tokenizers[form], form, maximum_source=room, maximum_target=7)
        assert encoding.sources_truncated == 2
        assert max(len(row.input_ids) for row in encoding) <= room + 7
        assert encoding.warning is not None
        assert f"Truncated, of 3 rows: 2 inputs to {room} tokens" in encoding.warning
        if form != "encoder":
            assert encoding.targets_truncated == 2
            assert "2 targets to 7 tokens" in encoding.warning
            assert all(row.labels[-1] == tokenizers[form].eos_token_id for row in encoding)


def test_a_truncated_pair_keeps_both_segments(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["encoder"]
    example = Plain("", (), ("a" * 30, "b" * 5), 0)
    (row,) = encode([example], tokenizer, "encoder", maximum_source=13, maximum_target=2)
    assert tokenizer.decode(row.input_ids) == "[CLS]aaaaa[SEP]bbbbb[SEP]"


@settings(deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=5), st.sampled_from(FORMS))
def test_collating_only_pads(texts: list[str], form: Form) -> None:
    tokenizer = CACHED[form]
    rows = encode(
        [_plain(text) for text in texts], tokenizer, form, maximum_source=40, maximum_target=6
    ).rows
    batch = collate(rows, tokenizer, form)
    width = max(len(row.input_ids) for row in rows)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(rows), width)
    for row, ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
        assert ids[mask.bool()].tolist() == list(row.input_ids)
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
    if form == "encoder":
        assert batch["labels"].tolist() == [0] * len(rows)
        assert batch["labels"].dtype == torch.long
    else:
        for row, labels in zip(rows, batch["labels"], strict=True):
            assert isinstance(row.labels, tuple)
            kept = len(row.labels)
            assert labels[:kept].tolist() == list(row.labels)
            assert set(labels[kept:].tolist()) <= {IGNORED}
    left = collate_prompts(rows, tokenizer, "decoder")["attention_mask"]
    assert all(mask.tolist() == sorted(mask.tolist()) for mask in left)


CACHED = {form: _tokenizer(form) for form in FORMS}


def test_values_of_a_regression(tokenizers: dict[str, Any]) -> None:
    examples = [_plain("a", 1.5), _plain("b", 2.0)]
    rows = encode(
        examples, tokenizers["encoder"], "encoder", maximum_source=8, maximum_target=2
    ).rows
    labels = collate(rows, tokenizers["encoder"], "encoder")["labels"]
    assert labels.dtype == torch.float32 and labels.tolist() == [1.5, 2.0]


def test_rows_without_labels(tokenizers: dict[str, Any]) -> None:
    batch = collate([Row((5, 6), None)], tokenizers["encoder"], "encoder")
    assert set(batch) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("target", ["not_entailment", "Sci/Tech", "sentence 1", "no_impact", "2.4"])
def test_targets_round_trip(tokenizers: dict[str, Any], target: str) -> None:
    for form in ("encoder_decoder", "decoder"):
        ids = target_ids(tokenizers[form], form, target)
        assert tokenizers[form].decode(ids, skip_special_tokens=True).strip() == target


def test_no_example_is_no_row(tokenizers: dict[str, Any]) -> None:
    for form in FORMS:
        assert not encode([], tokenizers[form], form, maximum_source=9, maximum_target=9).rows


def test_what_cannot_be_encoded(tokenizers: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"maximum_source": 20, "maximum_target": 8}
    with pytest.raises(UnknownNameError, match="Did you mean 'encoder'"):
        encode([_plain("a")], tokenizers["encoder"], "encodr", **sizes)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="one or two texts"):
        encode([Plain("a")], tokenizers["encoder"], "encoder", **sizes)
    with pytest.raises(ConfigurationError, match="at least 4 and 2 tokens, found 3 and 8"):
        encode([_plain("a")], tokenizers["encoder"], "encoder", maximum_source=3, maximum_target=8)
    endless = _tokenizer("decoder")
    endless.eos_token = None
    with pytest.raises(ConfigurationError, match="no end token"):
        encode([_plain("a")], endless, "decoder", **sizes)


def test_a_loss_over_padded_rows_is_that_of_the_rows(tokenizers: dict[str, Any]) -> None:
    """Padding takes no part: a batch's loss is the mean over its rows' target tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    tokenizer = tokenizers["decoder"]
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    ).eval()
    rows = encode(
        [_plain("a"), _plain("longer text")], tokenizer, "decoder",
        maximum_source=30, maximum_target=8,
    ).rows  # fmt: skip
    with torch.no_grad():
        whole = model(**collate(rows, tokenizer, "decoder")).loss.item()
        single = [model(**collate([row], tokenizer, "decoder")).loss.item() for row in rows]
    assert math.isclose(whole, sum(single) / 2, rel_tol=1e-5)


def test_label_words_survive_the_embedded_tokenizer() -> None:
    """Every label of every record comes back as it was, underscores, slashes and digits too."""
    from transformers import AutoTokenizer

    from deltatune.backbones.ladder import TOKENIZER
    from deltatune.tasks import TASKS

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    words = {label for task in TASKS.values() for label in task.labels} | {"0.0", "2.4", "5.0"}
    for word in sorted(words):
        for form in ("encoder_decoder", "decoder"):
            ids = target_ids(tokenizer, form, word)
            (back,) = tokenizer.batch_decode(
                [list(ids)], skip_special_tokens=True, clean_up_tokenization_spaces=True
            )
            assert back.strip() == word
