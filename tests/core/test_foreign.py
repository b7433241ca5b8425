"""A transformer that no library knows, by names that say nothing: roles come from its structure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from deltatune import api
from deltatune.core.errors import TargetError, UnsupportedError
from deltatune.core.roles import places
from deltatune.testing.case import close, move

WIDTH, HEADS, WORDS = 16, 2, 50


class Gaze(nn.Module):
    """Self-attention, its queries, keys and values apart or fused."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.trio = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.asker = nn.Linear(WIDTH, WIDTH)
            self.keeper = nn.Linear(WIDTH, WIDTH)
            self.giver = nn.Linear(WIDTH, WIDTH)
        self.mixer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        made = (
            self.trio(x).chunk(3, -1)
            if self.fused
            else (self.asker(x), self.keeper(x), self.giver(x))
        )
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in made)
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.mixer(seen.transpose(1, 2).flatten(-2))


class Stage(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.calm = nn.LayerNorm(WIDTH)
        self.gaze = Gaze(fused)
        self.calmer = nn.LayerNorm(WIDTH)
        self.widen = nn.Linear(WIDTH, 2 * WIDTH)
        self.narrow = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gaze(self.calm(x))
        return x + self.narrow(functional.gelu(self.widen(self.calmer(x))))


class Brain(nn.Module):
    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wordbook = nn.Embedding(WORDS, WIDTH)
        self.stages = nn.ModuleList(Stage(fused) for _ in range(2))
        self.scribe = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wordbook(ids)
        for stage in self.stages:
            x = stage(x)
        return self.scribe(x)


IDS = torch.arange(12).view(3, 4) % WORDS
ROLES = {
    "wordbook": ["embedding"],
    "stages.0.calm": ["block[0].norm"],
    "stages.0.gaze.asker": ["block[0].self_attention.q"],
    "stages.0.gaze.keeper": ["block[0].self_attention.k"],
    "stages.0.gaze.giver": ["block[0].self_attention.v"],
    "stages.0.gaze.trio": [f"block[0].self_attention.{part}" for part in "qkv"],
    "stages.0.gaze.mixer": ["block[0].self_attention.output"],
    "stages.0.calmer": ["block[0].norm"],
    "stages.0.widen": ["block[0].ffn.up"],
    "stages.0.narrow": ["block[0].ffn.down"],
    "scribe": ["head"],
}


@pytest.mark.parametrize("fused", [False, True])
def test_roles_come_from_structure(fused: bool) -> None:
    found: dict[str, list[str]] = {}
    for place in places(Brain(fused)):
        if place.block in (None, 0):
            found.setdefault(place.module, []).append(place.role.removeprefix("encoder."))
    assert found == {name: role for name, role in ROLES.items() if name in found}
    assert len(found) == (8 if fused else 10)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "method",
    ["lora(rank=2)", "adapter(bottleneck=4)", "parallel(bottleneck=4)", "bitfit", "last_layer"],
)
def test_methods_live_on_it(method: str, fused: bool, tmp_path: Path) -> None:
    model = Brain(fused)
    base = model(IDS)
    delta = api.attach(model, method)
    optimiser = torch.optim.AdamW(delta.parameters(), lr=0.01)
    losses = []
    for _ in range(10):
        loss = functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    live = model(IDS)
    folder = api.save(delta, tmp_path / "delta")
    fresh = Brain(fused)
    api.load(folder, fresh)
    assert torch.equal(fresh(IDS), live)
    delta.detach()
    assert torch.equal(model(IDS), base)


def test_rows_of_a_batch_use_different_slots() -> None:
    model = Brain()
    bank = api.attach(model, "lora(rank=2) + adapter(bottleneck=4)", slots=2)
    move(bank)
    with bank.route([0, None, 1]):
        mixed = model(IDS)
    for row, slot in ((0, 0), (2, 1)):
        with bank.route([slot]):
            close(model(IDS[row : row + 1]), mixed[row : row + 1])
    close(Brain()(IDS)[1], mixed[1])


@pytest.mark.parametrize(
    ("method", "error", "missed"),
    [
        ("prefix", UnsupportedError, "Gaze does not call attention through transformers' registry"),
        ("prompt", UnsupportedError, "`inputs_embeds` and `attention_mask`"),
        (
            "lora(at='cross_attention.q')",
            TargetError,
            "'cross_attention.q' matches nothing in Brain",
        ),
    ],
)
def test_what_it_cannot_take_says_what_was_missed(
    method: str, error: type[Exception], missed: str
) -> None:
    model = Brain()
    with pytest.raises(error, match=missed):
        api.attach(model, method)
    assert all(p.requires_grad for p in model.parameters())
