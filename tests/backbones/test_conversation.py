"""`prompt`/`completion` and `messages`: which tokens are read, and on which the loss falls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.backbones.test_encoding import _tokenizer

from deltatune.backbones.conversation import conversation_ids
from deltatune.backbones.encoding import IGNORED, encode, encode_prompts
from deltatune.core.errors import ConfigurationError, DataError
from deltatune.tasks import task_from_files

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "two and two?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "and two?"},
    {"role": "assistant", "content": "six"},
]


def written(folder: Path, *rows: dict[str, Any]) -> Any:
    """A task over a file of rows, and its first training example."""
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return task_from_files(path)


def chat_tokenizer(template: str | None = TEMPLATE) -> Any:
    tokenizer = _tokenizer("decoder")
    tokenizer.chat_template = template
    return tokenizer


def example(task: Any) -> Any:
    from deltatune.tasks.sources.files import FilesSource

    (row,) = FilesSource(task.source).read(task).splits["train"]
    return task.example(row)


def test_a_conversation_by_the_chat_template_token_by_token(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    one = example(written(tmp_path, {"messages": TALK}))
    (row,) = encode([one], tokenizer, "decoder", maximum_source=200, maximum_target=20)
    asked = (
        "<system>be brief</s><user>two and two?</s><assistant>four</s><user>and two?</s><assistant>"
    )
    assert tokenizer.decode(row.input_ids) == asked + "six</s>"
    learned = [token for token in row.labels if token != IGNORED]
    assert tokenizer.decode(learned) == "six</s>"
    assert row.labels == (*[IGNORED] * len(tokenizer(asked).input_ids), *learned)
    (prompt,) = encode_prompts([one], tokenizer, "decoder", maximum_source=200)
    assert tokenizer.decode(prompt.input_ids) == asked


def test_a_long_conversation_keeps_its_end(tmp_path: Path) -> None:
    one = example(written(tmp_path, {"messages": TALK}))
    found = encode([one], chat_tokenizer(), "decoder", maximum_source=20, maximum_target=20)
    assert chat_tokenizer().decode(found[0].input_ids).endswith("<assistant>six</s>")
    assert found.sources_truncated == 1 and found.warning is not None


@pytest.mark.parametrize("form", ["decoder", "encoder_decoder"])
def test_a_conversation_without_a_chat_template(tmp_path: Path, form: Any) -> None:
    tokenizer = _tokenizer(form)
    one = example(written(tmp_path, {"messages": TALK[1:3]}))
    (row,) = encode([one], tokenizer, form, maximum_source=200, maximum_target=20)
    asked = "user:\ntwo and two?\nassistant:\n"
    whole = asked + ("four</s>" if form == "decoder" else "</s>")
    assert tokenizer.decode(row.input_ids) == whole
    assert tokenizer.decode([token for token in row.labels if token != IGNORED]) == "four</s>"


@pytest.mark.parametrize("form", ["decoder", "encoder_decoder"])
def test_a_completion_goes_on_where_the_prompt_ends(tmp_path: Path, form: Any) -> None:
    tokenizer = _tokenizer(form)
    task = written(tmp_path, {"prompt": "a b ", "completion": "c d"})
    assert (task.kind, task.metric) == ("generation", "Rouge-L")
    (row,) = encode([example(task)], tokenizer, form, maximum_source=50, maximum_target=20)
    assert tokenizer.decode([token for token in row.labels if token != IGNORED]) == "c d</s>"
    asked = len(tokenizer("a b ", add_special_tokens=False).input_ids)
    if form == "decoder":
        assert tokenizer.decode(row.input_ids) == "a b c d</s>"
        assert row.labels[:asked] == (IGNORED,) * asked and IGNORED not in row.labels[asked:]
    else:
        assert tokenizer.decode(row.input_ids) == "a b </s>"


@pytest.mark.parametrize(
    ("turns", "missed"),
    [
        ("hello", "a list of two turns"),
        (TALK[:1], "a list of two turns"),
        ([{"role": "user", "text": "a"}, TALK[2]], "'role' and 'content'"),
        ([{"role": "users", "content": "a"}, TALK[2]], "user"),
        ([{"role": "user", "content": 3}, TALK[2]], "a content is a text"),
        (TALK[:2], "must be of the assistant"),
    ],
)
def test_what_is_no_conversation_names_its_line(tmp_path: Path, turns: Any, missed: str) -> None:
    with pytest.raises(DataError, match=rf"mine\.jsonl.*{missed}"):
        example(written(tmp_path, {"messages": turns}))


def test_a_template_that_rewrites_or_refuses_is_named() -> None:
    turns = [(turn["role"], turn["content"]) for turn in TALK]
    rewriting = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ConfigurationError, match="differently once it is answered"):
        conversation_ids(turns, chat_tokenizer(rewriting))
    refusing = "{{ raise_exception('no system turns') }}"
    with pytest.raises(ConfigurationError, match=r"refuses.*no system turns"):
        conversation_ids(turns, chat_tokenizer(refusing))


def test_an_end_token_is_added_where_the_template_has_none() -> None:
    tokenizer = chat_tokenizer(TEMPLATE.replace("</s>", ""))
    _, answer = conversation_ids([("user", "a"), ("assistant", "b")], tokenizer)
    assert tokenizer.decode(answer) == "b</s>"
