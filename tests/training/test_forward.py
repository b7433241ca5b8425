"""The attention kernel: which is taken, and that it changes rounding alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from deltatune.testing.families import FAMILIES
from deltatune.training import forward

CPU = torch.device("cpu")


def kernels(precision: str, length: int) -> list[SDPBackend]:
    model = torch.nn.Linear(2, 2)
    batch = {"input_ids": torch.zeros(1, length), "labels": torch.zeros(1)}
    with forward.forward_context(model, precision, CPU, batch):
        return _cur_sdpa_kernel_backends()  # type: ignore[no-untyped-call,no-any-return]


def test_the_table_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[torch.dtype, int]] = []

    def slow_in_half_precision(dtype: torch.dtype, length: int) -> bool:
        asked.append((dtype, length))
        return dtype is torch.bfloat16

    monkeypatch.setattr(forward, "plain_is_faster", slow_in_half_precision)
    usual = _cur_sdpa_kernel_backends()  # type: ignore[no-untyped-call]
    assert kernels("bf16", 100) == [SDPBackend.MATH]
    assert kernels("fp32", 5) == kernels("bf16", 513) == usual
    assert asked == [(torch.bfloat16, 128), (torch.float32, 32)]
    with forward._attention_kernel(torch.device("cuda"), torch.bfloat16, 100):
        assert _cur_sdpa_kernel_backends() == usual  # type: ignore[no-untyped-call]
    assert _cur_sdpa_kernel_backends() == usual  # type: ignore[no-untyped-call]


def test_the_measurement_says_something_for_every_length() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert {forward.plain_is_faster(dtype, n) for n in (32, 64)} <= {True, False}


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_the_kernel_changes_rounding_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kin = FAMILIES[family]
    model = kin.build()
    batch = kin.batch()

    def gradients(plain: bool) -> list[Tensor]:
        monkeypatch.setattr(forward, "plain_is_faster", lambda dtype, length: plain)
        model.zero_grad()
        with forward.forward_context(model, "fp32", CPU, batch):
            loss = kin.logits(model, batch).square().mean()  # type: ignore[arg-type]
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, other)
