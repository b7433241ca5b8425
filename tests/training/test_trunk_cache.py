"""With a trunk cache a run ends as it would without, and computes what lies below once a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from tests.training.standin import StandIn, quick
from tests.training.test_many import collate, rows_for
from torch import Tensor, nn

from deltatune import api
from deltatune.core.errors import ArtefactError, ConfigurationError, UnsupportedError
from deltatune.core.run import Run
from deltatune.testing.families import FAMILIES
from deltatune.training import Epochs, Job, Result, Steps, TrunkCache, fit, fit_many
from deltatune.training.progress import SilentProgress
from deltatune.training.trunk_cache import _Rows

TOP = "lora(rank=2, dropout=0.2, at='block[1].linear')"
Rows = Sequence[dict[str, Any]]


class Heard(SilentProgress):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def a_run(family: str = "bert", method: str = TOP) -> Run:
    return Run(api.attach(FAMILIES[family].build(), method, seed=1))


def trained(
    run: Run, rows: Rows, cache: TrunkCache | None = None, heard: Heard | None = None, **more: Any
) -> Result:
    arguments: dict[str, Any] = {
        "settings": quick(base_dropout=False, schedule="constant"),
        "budget": Epochs(3),
        "progress": heard,
        "trunk_cache": cache,
    }
    return fit(run, rows, collate, **(arguments | more))


def same(one: Result, other: Result, limit: float = 1e-6) -> None:
    assert len(one.losses) == len(other.losses)
    apart = [abs(a - b) for a, b in zip(one.losses, other.losses, strict=True)]
    assert max(apart) < limit


def calls(model: nn.Module, path: str) -> list[int]:
    """Grows by the rows of every call of a module."""
    found: list[int] = []
    model.get_submodule(path).register_forward_hook(
        lambda module, inputs, output: found.append(len(inputs[0]))
    )
    return found


CASES = [
    ("bert", TOP, "bert.encoder.layer.0.attention.self.query"),
    ("bert", "head(labels=3)", "bert.encoder.layer.1.attention.self.query"),
    ("gpt2", "adapter(bottleneck=2, at='block[1].ffn')", "transformer.h.0.attn.c_attn"),
    ("llama", "prefix(length=2, at='block[1].attention')", "model.layers.0.self_attn.q_proj"),
    ("t5", "lora(rank=2, at='decoder.attention.q')", "encoder.block.1.layer.0.SelfAttention.q"),
]


@pytest.mark.parametrize(("family", "method", "below"), CASES)
def test_from_the_second_epoch_on_nothing_below_is_computed(
    family: str, method: str, below: str
) -> None:
    kin = "llama" if family == "gpt2" else family  # the form of its rows
    rows, cache, heard = rows_for(kin, 0), TrunkCache(), Heard()
    expected = trained(a_run(family, method), rows)
    run = a_run(family, method)
    found = calls(run.model, below)
    result = trained(run, rows, cache, heard)
    same(result, expected)
    assert cache.computed == len(rows)
    assert cache.served == 2 * len(rows)
    # Of the first batch, of 4 rows, two passes more: it is computed both ways.
    assert sum(found) == len(rows) + 2 * 4
    assert len(heard.said) == 1
    assert heard.said[0].startswith("trunk cache used: ")


@examples(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=st.sampled_from(["bert", "llama", "t5"]),
    lengths=st.lists(st.integers(2, 7), min_size=5, max_size=9),
    folder=st.booleans(),
    size=st.integers(1, 4),
)
def test_losses_are_the_same_however_rows_are_padded(
    family: str,
    lengths: list[int],
    folder: bool,
    size: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    rows = rows_for(family, 3, len(lengths))
    for row, length in zip(rows, lengths, strict=True):
        row["input_ids"] = (row["input_ids"] * 3)[:length]
        if family == "llama":
            row["labels"] = [-100, 5, *row["input_ids"]][:length]
    settings = quick(base_dropout=False, per_device_batch_size=size, accumulation=2)
    method = "last_layer" if family == "t5" else TOP
    cache = TrunkCache(folder=tmp_path_factory.mktemp("cache") if folder else None)
    results = [
        trained(a_run(family, method), rows, one, settings=settings, budget=Epochs(2))
        for one in (None, cache)
    ]
    same(*results)


@pytest.mark.parametrize(
    ("family", "method"), [("bert", TOP), ("t5", "last_layer"), ("t5", "lora(at='decoder.block')")]
)
def test_runs_that_share_data_share_what_is_kept(family: str, method: str) -> None:
    rows = rows_for(family, 0)

    def together(cache: TrunkCache | None) -> list[Any]:
        bank = api.attach(FAMILIES[family].build(), method, slots=3, seed=[0, 1, 2])
        settings = [quick(base_dropout=False, seed=seed) for seed in range(3)]
        jobs = [Job(rows, one, Epochs(2)) for one in settings]
        return fit_many(bank, jobs, collate, trunk_cache=cache)

    cache = TrunkCache()
    for one, other in zip(together(cache), together(None), strict=True):
        assert len(one.losses) == len(other.losses) == 6
        assert max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True)) < 1e-5
    assert cache.computed == len(rows)
    assert cache.served == 5 * len(rows)


def test_another_method_on_the_same_trunk_computes_nothing() -> None:
    rows, cache = rows_for("bert", 0), TrunkCache()
    trained(a_run(), rows, cache)
    trained(a_run(method="bitfit(at='block[1]')"), rows, cache, budget=Epochs(1))
    assert cache.computed == len(rows)


def test_a_full_cache_keeps_what_it_has() -> None:
    rows, heard = rows_for("bert", 0), Heard()
    cache = TrunkCache(capacity=2000)  # 3 or 4 rows of 3 to 5 tokens, 32 wide
    same(trained(a_run(), rows, cache, heard), trained(a_run(), rows))
    assert sum("is full" in text for text in heard.said) == 1
    assert len(rows) < cache.computed < 3 * len(rows)


def test_bf16_takes_half_of_the_bytes() -> None:
    rows = rows_for("bert", 0)
    exact, rounded = trained(a_run(), rows), TrunkCache(capacity=4000, dtype=torch.bfloat16)
    heard = Heard()
    same(trained(a_run(), rows, rounded, heard), exact, 5e-2)
    assert rounded.computed == len(rows)
    assert not any("full" in text for text in heard.said)


def test_precision_bf16_has_states_of_its_own() -> None:
    rows, cache = rows_for("bert", 0), TrunkCache()
    settings = quick(base_dropout=False, precision="bf16")
    expected = trained(a_run(), rows, settings=settings)
    same(trained(a_run(), rows, cache, settings=settings), expected, 2e-2)
    trained(a_run(), rows, cache)
    assert cache.computed == 2 * len(rows)


def test_evaluations_are_computed_as_ever() -> None:
    run, cache = a_run(), TrunkCache()

    def validate() -> dict[str, float]:
        with torch.no_grad():
            return {"loss": -float(run(**collate(rows_for("bert", 9))).loss)}

    rows = rows_for("bert", 0)
    settings = quick(base_dropout=False, evaluation_every=2)
    trained(run, rows, cache, validate=validate, settings=settings)
    assert cache.computed + cache.served == 3 * len(rows)


def test_when_it_does_not_pay_it_is_not_used() -> None:
    rows = rows_for("bert", 0)
    for method, budget, told in (
        ("lora(rank=2)", Epochs(3), "no block lies below bert.encoder.layer.0"),
        (TOP, Epochs(1), "every row is seen once"),
    ):
        heard, cache = Heard(), TrunkCache()
        trained(a_run(method=method), rows, cache, heard, budget=budget)
        assert heard.said == [next(text for text in heard.said if told in text)]
        assert cache.computed == cache.served == 0


def test_a_small_share_is_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltatune.training.trunk_cache._LEAST_SHARE", 0.5)
    heard = Heard()
    trained(a_run(), rows_for("bert", 0), TrunkCache(), heard)
    assert "is 33% of a step" in heard.said[0]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [({"capacity": 0}, "positive number of bytes"), ({"dtype": torch.long}, "int64 holds none")],
)
def test_a_cache_that_cannot_be_meant(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        TrunkCache(**arguments)


def test_a_run_that_cannot_be_served() -> None:
    rows, cache = rows_for("bert", 0), TrunkCache()
    with pytest.raises(UnsupportedError, match="base_dropout=False"):
        trained(a_run(), rows, cache, settings=quick(base_dropout=True))
    with pytest.raises(UnsupportedError, match="Switch one of the two off"):
        trained(a_run(), rows, cache, settings=quick(base_dropout=False, packing=True))
    with pytest.raises(UnsupportedError, match="backbone itself is trained"):
        trained(a_run(method="full"), rows, cache)
    with pytest.raises(ConfigurationError, match="needs a Run"):
        fit(StandIn(), rows, collate, settings=quick(base_dropout=False), budget=Steps(2),
            trunk_cache=cache)  # type: ignore[arg-type]  # fmt: skip


def with_scale(rows: Rows) -> dict[str, Any]:
    return {**collate(rows), "scale": torch.tensor(1.0)}


def with_square_mask(rows: Rows) -> dict[str, Any]:
    batch = collate(rows)
    mask = batch["attention_mask"].bool()[:, None, None, :]
    return {**batch, "attention_mask": mask.expand(-1, -1, mask.shape[-1], -1)}


def test_rows_that_cannot_be_told_apart() -> None:
    rows = rows_for("bert", 0)
    settings, budget = quick(base_dropout=False), Epochs(2)
    with pytest.raises(UnsupportedError, match="one entry for each row; found input_ids"):
        fit(a_run(), rows, with_scale, settings=settings, budget=budget, trunk_cache=TrunkCache())
    # A mask of another form is taken as it is, with its padding.
    plain, cached = (
        fit(a_run(), rows, with_square_mask, settings=settings, budget=budget, trunk_cache=one)
        for one in (None, TrunkCache())
    )
    same(cached, plain)


def keys(**rows: Any) -> list[bytes]:
    return list(_Rows.of({name: torch.tensor(value) for name, value in rows.items()}).keys)


def test_a_row_is_known_by_all_that_the_model_reads_of_it() -> None:
    short = keys(input_ids=[[5, 6, 7]], attention_mask=[[1, 1, 1]])
    padded = keys(
        input_ids=[[5, 6, 7, 0], [5, 6, 7, 9]],
        attention_mask=[[1, 1, 1, 0], [1, 1, 1, 1]],
        labels=[0, 1],
    )
    assert short == padded[:1]
    assert padded[0] != padded[1]
    # What pads on the left moves positions, which some families learn.
    assert keys(input_ids=[[0, 5, 6, 7]], attention_mask=[[0, 1, 1, 1]]) != short
    one, other = keys(
        input_ids=[[5, 6], [5, 6]], attention_mask=[[1, 1]] * 2, token_type_ids=[[0, 0], [0, 1]]
    )
    assert one != other
    # What nothing is known of counts to its end.
    one, other = keys(
        input_ids=[[5, 0], [5, 0]], attention_mask=[[1, 0]] * 2, scale=[[1.0, 2.0], [1.0, 3.0]]
    )
    assert one != other


class Sidelong(nn.Module):
    """A model whose first block leaves something for the head, past the second."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.embedding = nn.Embedding(99, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        x = self.embedding(input_ids) * attention_mask[..., None]
        if self.way == "flat":
            x = x.flatten(0, 1)
        first = self.blocks[0](x)
        second = self.blocks[1](first) + (first if self.way == "sidelong" else 0)
        pooled = second.view(*input_ids.shape, 4).mean(1)
        loss = nn.functional.cross_entropy(self.head(pooled), labels)
        return (loss,) if self.way == "bare" else SimpleNamespace(loss=loss)


@pytest.mark.parametrize(
    ("way", "told"),
    [
        ("sidelong", "not a function of what blocks.1 reads"),
        ("flat", "cannot be told apart"),
        ("bare", "no loss, logits or last_hidden_state"),
    ],
)
def test_a_model_that_goes_past_its_blocks_is_refused(way: str, told: str) -> None:
    run = Run(api.attach(Sidelong(way), "lora(rank=2, at='blocks.1.0')"))
    with pytest.raises(UnsupportedError, match=told):
        trained(run, rows_for("bert", 0), TrunkCache())


def test_a_model_in_which_padding_counts_is_refused() -> None:
    """Its first batch has no padding, and shows nothing."""
    batches: list[dict[str, Tensor]] = []

    def lengthening(rows: Rows) -> dict[str, Tensor]:
        batch = collate(rows)
        for name in ("input_ids", "attention_mask") if batches else ():
            batch[name] = nn.functional.pad(batch[name], (0, 2))
        batches.append(batch)
        return batch

    rows = [{"input_ids": [5, 6, 7 + k], "labels": k % 3} for k in range(8)]
    run = Run(api.attach(Sidelong("mean of all"), "lora(rank=2, at='blocks.1.0')"))
    settings = quick(base_dropout=False)
    with pytest.raises(UnsupportedError, match="or padding counts"):
        fit(run, rows, lengthening, settings=settings, budget=Epochs(2), trunk_cache=TrunkCache())
    assert len(batches) == 2


def test_a_later_run_reads_the_folder(tmp_path: Path) -> None:
    rows = rows_for("bert", 0)
    expected = trained(a_run(), rows)
    caches = [TrunkCache(folder=tmp_path) for _ in range(2)]
    for cache in caches:
        same(trained(a_run(), rows, cache), expected)
    assert [cache.computed for cache in caches] == [len(rows), 0]


def test_a_changed_weight_is_noticed(tmp_path: Path) -> None:
    def changed() -> Run:
        run = a_run()
        with torch.no_grad():
            run.model.get_parameter("bert.encoder.layer.0.output.dense.bias").add_(0.5)
        return run

    rows = rows_for("bert", 0)
    trained(a_run(), rows, TrunkCache(folder=tmp_path))
    cache = TrunkCache(folder=tmp_path)
    same(trained(changed(), rows, cache), trained(changed(), rows))
    assert cache.computed == len(rows)


def test_a_change_that_the_weights_do_not_show_is_noticed(tmp_path: Path) -> None:
    rows = rows_for("bert", 0)
    trained(a_run(), rows, TrunkCache(folder=tmp_path))
    run = a_run()
    run.model.get_submodule("bert.encoder.layer.0.output.LayerNorm").eps = 0.5  # type: ignore[assignment]
    with pytest.raises(ArtefactError, match="changed in a way that its weights do not show"):
        trained(run, rows, TrunkCache(folder=tmp_path))


class Stopped(Exception):
    """Ends a run on the way."""


@contextmanager
def stopping(run: Run, step: int) -> Any:
    usual: Callable[[int], None] = run.set_step

    def set_step(number: int) -> None:
        if number == step:
            raise Stopped
        usual(number)

    run.set_step = set_step  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        yield
    run.set_step = usual  # type: ignore[method-assign]


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_run_that_goes_on_gives_the_same_losses(on_disk: bool, tmp_path: Path) -> None:
    rows = rows_for("bert", 0)

    def cache() -> TrunkCache:
        return TrunkCache(folder=tmp_path / "states" if on_disk else None)

    expected = trained(a_run(), rows)
    run = a_run()
    with stopping(run, 5):
        trained(run, rows, cache(), folder=tmp_path / "run")
    assert "forward" not in run.model.get_submodule("bert.encoder.layer.0").__dict__
    same(trained(a_run(), rows, cache(), folder=tmp_path / "run"), expected)


def test_nothing_is_left_in_the_model() -> None:
    run = a_run()
    trained(run, rows_for("bert", 0), TrunkCache())
    run.delta.detach()
    assert not any("forward" in module.__dict__ for module in run.model.modules())
