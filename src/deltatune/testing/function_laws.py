"""Laws of a delta's function: what it computes, alone, beside others, in any batch and dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from deltatune import api
from deltatune.core.delta import Delta
from deltatune.core.errors import StateError, UnsupportedError
from deltatune.core.host import host_of
from deltatune.testing.case import (
    Case,
    cast,
    close,
    close_gradients,
    move,
    named_gradients,
    same_state,
)


def law_identity(case: Case, folder: Path) -> None:
    """L1: where every method declares it, a fresh delta leaves the logits bit for bit."""
    del folder
    base = case.logits(case.model())
    with case.attached(moved=False) as (model, _):
        fresh = case.logits(model)
    if all(method.identity for method in case.expression):
        assert torch.equal(fresh, base)
    else:
        assert torch.isfinite(fresh).all() and not torch.equal(fresh, base)


def law_acts(case: Case, folder: Path) -> None:
    """Every site acts: moving its leaves alone changes the logits, or it is declared idle."""
    del folder
    with case.attached(moved=False) as (model, delta):
        move(delta)
        before = case.logits(model)
        row = delta.bank.read(0)
        for part in delta.parts:
            for site, names in zip(part.sites, part.names, strict=True):
                trained = [n for n in names if part.leaves[names[n]].trained]
                if all(part.method.idle(site, leaf) for leaf in trained):
                    continue
                with torch.no_grad():
                    kept = {n: row[names[n]].clone() for n in trained}
                    for n in trained:
                        row[names[n]].mul_(1.5).add_(0.1)
                    after = case.logits(model)
                    for n in trained:
                        row[names[n]].copy_(kept[n])
                assert not torch.equal(after, before), f"{part.key} does nothing at {site.name}"


def law_gradients(case: Case, folder: Path) -> None:
    """L5: every trained leaf gets a gradient; the base none, and not one of its bits moves."""
    del folder
    with case.attached() as (model, delta):
        base = {name: value.clone() for name, value in model.state_dict().items()}
        torch.autograd.backward(case.kin.logits(model, case.kin.batch()).square().sum())
        if case.in_place:
            assert sum(p.grad is not None for p in delta.bank.slots) > len(delta.bank.slots) / 2
            return
        gradient = named_gradients(delta, 0)
        for part in delta.parts:
            for site, names in zip(part.sites, part.names, strict=True):
                for leaf, full in names.items():
                    if part.leaves[full].trained and not part.method.idle(site, leaf):
                        assert gradient[full].abs().max() > 0, f"{full} gets no gradient"
        assert all(p.grad is None for p in model.parameters())
        torch.optim.AdamW(delta.parameters(), lr=0.1, weight_decay=0.1).step()
        same_state(model, base)


def law_trains(case: Case, folder: Path) -> None:
    """A bare PyTorch loop brings the loss down."""
    del folder
    with case.attached(moved=False) as (model, delta):
        batch = case.kin.batch()
        shape = case.kin.logits(model, batch).shape
        wanted = torch.randint(0, shape[-1], shape[:-1], generator=torch.Generator().manual_seed(3))
        optimiser = torch.optim.AdamW(delta.parameters(), lr=0.02, weight_decay=0.0)
        losses = []
        for _ in range(12):
            logits = case.kin.logits(model, batch)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), wanted.flatten())
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]


def law_cache(case: Case, folder: Path) -> None:
    """L10: generation with a cache equals generation without, padded on either side it may be."""
    del folder
    if not case.kin.generates:
        return
    with case.attached() as (model, _):
        for left in (True, False) if case.kin.decoder_only else (False,):
            batch = case.kin.batch(left=left)
            batch.pop("decoder_input_ids", None)
            with _told(model, batch):
                found = [case.generate(model, **batch, use_cache=use) for use in (True, False)]
            assert torch.equal(*found)


def _told(model: nn.Module, batch: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    """Says where the prompts end: without a cache a model reads them with what it has generated."""
    host = host_of(model)
    assert host is not None
    return host.labels.set(torch.full_like(batch["input_ids"], -100))


def law_beams(case: Case, folder: Path) -> None:
    """L10: beams follow their rows: a row generates the same alone."""
    del folder
    if not case.kin.generates:
        return
    with case.attached() as (model, _):
        batch = {k: v[:1] for k, v in case.kin.batch().items() if k != "decoder_input_ids"}
        pair = {k: v.repeat(2, 1) for k, v in batch.items()}
        alone, twice = (case.generate(model, **b, num_beams=2) for b in (batch, pair))
        assert torch.equal(twice[0], alone[0]) and torch.equal(twice[1], alone[0])


def law_batch(case: Case, folder: Path) -> None:
    """L11: a row's logits do not depend on its batch mates or on padding."""
    del folder
    with case.attached() as (model, _):
        batch = case.kin.batch()
        together = case.kin.logits(model, batch)
        length = int(batch["attention_mask"][1].sum())
        row = {
            k: v[1:2, :length] if k in ("input_ids", "attention_mask") else v[1:2]
            for k, v in batch.items()
        }
        alone = case.kin.logits(model, row)
        expected = together[1:2, :length] if case.kin.decoder_only else together[1:2]
        close(alone, expected)


def law_slots(case: Case, folder: Path) -> None:
    """K slots in one batch equal K separate deltas, gradients too; rows without one the base."""
    del folder
    if case.in_place:
        _refuses_slots(case)
        return
    batch = case.kin.batch(rows=6)
    base = case.kin.logits(case.model(), batch)
    for rows in ([0, 0, 1, 1, 2, 2], [2, 0, None, 2, 1, 2], [None] * 6, [1] * 6):
        with case.attached(slots=3) as (model, bank):
            with bank.route(rows):
                try:
                    mixed = case.kin.logits(model, batch)
                except UnsupportedError as error:
                    assert case.kin.shares and len(set(rows)) > 1 and "one slot" in str(error)
                    continue
            if mixed.requires_grad:
                torch.autograd.backward(mixed.square().sum())
            for index, slot in enumerate(rows):
                if slot is None:
                    close(mixed[index], base[index])
            for slot in sorted({slot for slot in rows if slot is not None}):
                _equals_alone(case, bank, slot, rows, batch, mixed)


def _equals_alone(
    case: Case,
    bank: Delta,
    slot: int,
    rows: Sequence[int | None],
    batch: dict[str, Tensor],
    mixed: Tensor,
) -> None:
    model = case.model()
    single = api.attach(model, case.expression)
    single.bank.write(0, bank.bank.read(slot))
    logits = case.kin.logits(model, batch)
    mine = [index for index, used in enumerate(rows) if used == slot]
    close(mixed[mine], logits[mine])
    torch.autograd.backward(logits[mine].square().sum())
    gradient, expected = bank.bank.slots[slot].grad, single.bank.slots[0].grad
    assert gradient is not None and expected is not None
    close_gradients(gradient, expected)


def _refuses_slots(case: Case) -> None:
    try:
        api.attach(case.model(), case.expression, slots=2)
    except StateError:
        return
    raise AssertionError("a control that trains in place took two slots")


def law_sampling(case: Case, folder: Path) -> None:
    """L10: drawn tokens are the same with a cache and without, from one state of the generator."""
    del folder
    if not case.kin.generates:
        return
    with case.attached() as (model, _):
        batch = {k: v for k, v in case.kin.batch().items() if k != "decoder_input_ids"}
        drawn = []
        for use in (True, False):
            with torch.random.fork_rng(), _told(model, batch):
                torch.manual_seed(5)
                drawn.append(case.generate(model, **batch, do_sample=True, use_cache=use))
        assert torch.equal(*drawn)


def law_kernels(case: Case, folder: Path) -> None:
    """The kernels of attention agree, where the family has both."""
    del folder
    if not case.model()._supports_sdpa:
        return
    found = []
    for kernel in ("sdpa", "eager"):
        model = case.model()
        model.set_attn_implementation(kernel)
        move(api.attach(model, case.expression))
        found.append(case.logits(model))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def law_bfloat16(case: Case, folder: Path) -> None:
    """On a bf16 base the delta acts in bf16, its leaves and their gradients stay fp32."""
    del folder
    _acts_in(case, torch.bfloat16)


def law_float16(case: Case, folder: Path) -> None:
    """On an fp16 base the delta acts in fp16, its leaves and their gradients stay fp32."""
    del folder
    _acts_in(case, torch.float16)


def _acts_in(case: Case, dtype: torch.dtype) -> None:
    model = case.model()
    cast(model, dtype)
    delta = api.attach(model, case.expression)
    move(delta)
    logits = case.kin.logits(model, case.kin.batch())
    assert logits.dtype == dtype and torch.isfinite(logits).all()
    torch.autograd.backward(logits.float().square().mean())
    wanted = dtype if case.in_place else torch.float32
    for row in delta.bank.slots:
        assert row.dtype == wanted and (row.grad is None or row.grad.isfinite().all())


def law_checkpointing(case: Case, folder: Path) -> None:
    """Gradient checkpointing, of either kind, gives the same gradients."""
    del folder
    gradients = []
    # Torch's reentrant kind cannot train what several blocks share (DeBERTa's table of distances).
    for reentrant in (None, False) if case.in_place else (None, False, True):
        with case.attached() as (model, delta):
            model.train()
            if reentrant is not None:
                model.activation_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:  # this kind sees no gradient where no input of a block asks for one
                model.enable_input_require_grads()  # type: ignore[no-untyped-call]
            torch.autograd.backward(case.kin.logits(model, case.kin.batch()).square().sum())
            found = [row.grad for row in delta.bank.slots if row.grad is not None]
            gradients.append(torch.cat([g.flatten() for g in found]))
    for other in gradients[1:]:
        close_gradients(other, gradients[0])
