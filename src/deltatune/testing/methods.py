"""The laws of methods, L1 to L12 and those of the house, as one suite.

    @pytest.mark.parametrize("law", laws(), ids=lambda law: law.__name__)
    def test_law(law, tmp_path): law(Case("mine(rank=2)", "llama"), tmp_path)

No law asks which method it has. It asks what the method declares: whether a fresh delta is the identity,
whether it trains in place, which leaves mathematics leaves without a gradient.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from deltatune import api
from deltatune.core.artefact import read, stored_tensors
from deltatune.core.delta import Delta, deltas_of
from deltatune.core.errors import BackboneMismatchError, StateError, UnsupportedError
from deltatune.core.grammar import Expression, parse
from deltatune.testing.families import FAMILIES, Family

__all__ = ["Case", "Law", "laws"]

Law = Callable[["Case", Path], None]
_CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@dataclass(frozen=True)
class Case:
    """A method on a family.

    Attributes:
        method: an expression in the grammar of methods.
        family: a name in `deltatune.testing.families`.
    """

    method: str
    family: str

    @property
    def expression(self) -> Expression:
        return parse(self.method)

    @property
    def kin(self) -> Family:
        return FAMILIES[self.family]

    @property
    def in_place(self) -> bool:
        return any(method.in_place for method in self.expression)

    def model(self) -> PreTrainedModel:
        """A frozen model: attention kernels differ between a base that trains and one that does not."""
        return self.kin.build().requires_grad_(False)

    @contextmanager
    def attached(self, *, moved: bool = True, slots: int = 1) -> Iterator[tuple[PreTrainedModel, Delta]]:
        """A model with the delta, its leaves moved off their initial values."""
        model = self.model()
        delta = api.attach(model, self.expression, slots=slots)
        if moved:
            move(delta)
        yield model, delta

    @torch.no_grad()
    def logits(self, model: PreTrainedModel, **kwargs: int) -> Tensor:
        """Logits of the family's batch."""
        return self.kin.logits(model, self.kin.batch(**kwargs))


@torch.no_grad()
def move(delta: Delta, seed: int = 0) -> None:
    """Adds small noise to every trained entry."""
    random = torch.Generator().manual_seed(seed)
    for row in delta.bank.slots:
        row.add_(0.05 * torch.randn(row.shape, generator=random).to(row.dtype))


def law_identity(case: Case, folder: Path) -> None:
    """L1: where every method declares it, a fresh delta leaves the logits bit for bit as they were."""
    del folder
    base = case.logits(case.model())
    with case.attached(moved=False) as (model, _):
        fresh = case.logits(model)
    if all(method.identity for method in case.expression):
        assert torch.equal(fresh, base)
    else:
        assert torch.isfinite(fresh).all() and not torch.equal(fresh, base)


def law_acts(case: Case, folder: Path) -> None:
    """Every site acts: moving the leaves of one site alone changes the logits, or is declared idle."""
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


def law_count(case: Case, folder: Path) -> None:
    """L2: plan, bank and artefact agree, with weights and on the meta device."""
    del folder
    model = case.model()
    planned = api.plan(model, case.expression)
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        ghost = type(model)(config)
    assert api.plan(ghost, case.expression) == planned
    delta = api.attach(model, case.expression)
    assert planned.trainable == delta.bank.numel
    assert planned.stored == sum(t.numel() for t in stored_tensors(delta).values())
    assert planned.base == sum(p.numel() for p in model.parameters())


def law_merge(case: Case, folder: Path) -> None:
    """L3 and L4: merged equals live; unmerged is the base bit for bit; or merging is refused in words."""
    del folder
    with case.attached() as (model, delta):
        base = {name: value.clone() for name, value in model.state_dict().items()}
        live = case.logits(model)
        try:
            delta.merge()
        except UnsupportedError:
            _same_state(model, base)
            return
        if not case.in_place:
            torch.testing.assert_close(case.logits(model), live, **_CLOSE)
            with delta.active(False):
                torch.testing.assert_close(case.logits(model), live, **_CLOSE)
        delta.unmerge()
        _same_state(model, base)
        assert torch.equal(case.logits(model), live)


def law_gradients(case: Case, folder: Path) -> None:
    """L5: every trained leaf gets a gradient; the base none, and not one of its bits moves."""
    del folder
    with case.attached() as (model, delta):
        base = {name: value.clone() for name, value in model.state_dict().items()}
        case.kin.logits(model, case.kin.batch()).square().sum().backward()
        if case.in_place:
            assert sum(p.grad is not None for p in delta.bank.slots) > len(delta.bank.slots) / 2
            return
        gradient = _named_gradients(delta, 0)
        for part in delta.parts:
            for site, names in zip(part.sites, part.names, strict=True):
                for leaf, full in names.items():
                    if part.leaves[full].trained and not part.method.idle(site, leaf):
                        assert gradient[full].abs().max() > 0, f"{full} gets no gradient"
        assert all(p.grad is None for p in model.parameters())
        torch.optim.AdamW(delta.parameters(), lr=0.1, weight_decay=0.1).step()
        _same_state(model, base)


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
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]


def law_checkpoint(case: Case, folder: Path) -> None:
    """L6: saved and loaded, the logits are the same bit for bit; another backbone refuses in words."""
    with case.attached() as (model, delta):
        live = case.logits(model)
        delta_folder = api.save(delta, folder / "delta")
        stored = stored_tensors(delta)
    assert set(read(delta_folder).tensors) == set(stored)
    fresh = case.model()
    api.load(delta_folder, fresh)
    assert torch.equal(case.logits(fresh), live)
    other = case.model()
    with torch.no_grad():
        next(other.parameters()).view(-1)[3] += 1e-3
    try:
        api.load(delta_folder, other)
    except BackboneMismatchError as error:
        assert "other weights" in str(error)
    else:
        raise AssertionError("a delta was loaded on another backbone")
    assert not deltas_of(other)


def law_composition(case: Case, folder: Path) -> None:
    """L7: beside another delta, counts add, and switching that one off leaves this one's logits."""
    del folder
    with case.attached() as (model, delta):
        alone = case.logits(model)
        try:
            second = api.attach(model, "lora(rank=2, at='ffn.down') + bitfit(at='norm')", seed=5)
        except StateError:
            assert case.in_place
            return
        assert torch.equal(case.logits(model), alone)
        move(second, 5)
        both = case.logits(model)
        assert not torch.equal(both, alone)
        with second.active(False):
            assert torch.equal(case.logits(model), alone)
        delta.detach()
        second.detach()
        assert not deltas_of(model)


def law_detach(case: Case, folder: Path) -> None:
    """L8: after detaching, in any order, the model is as it was: bytes, flags, hooks, instance names."""
    del folder
    model = case.kin.build()
    model.get_parameter(next(name for name, _ in model.named_parameters())).requires_grad_(False)
    base, marks = {n: v.clone() for n, v in model.state_dict().items()}, _marks(model)
    logits = case.logits(model)
    delta = api.attach(model, case.expression)
    move(delta)
    delta.detach()
    _same_state(model, base)
    assert _marks(model) == marks
    assert torch.equal(case.logits(model), logits)


def law_draws(case: Case, folder: Path) -> None:
    """L9 and L12: leaves depend on the seed alone, not on the dtype of the base."""
    del folder
    wide, narrow = case.model(), case.model()
    wide.to(torch.bfloat16).to(torch.float32)
    narrow.to(torch.bfloat16)
    one, two = (api.attach(model, case.expression, seed=3) for model in (wide, narrow))
    for name, value in one.tensors().items():
        assert torch.equal(value.float(), two.tensors()[name].float()), name


def law_cache(case: Case, folder: Path) -> None:
    """L10: generation with a cache equals generation without, padded on either side it may be."""
    del folder
    if not case.kin.generates:
        return
    with case.attached() as (model, _):
        for left in (True, False) if case.kin.decoder_only else (False,):
            batch = case.kin.batch(left=left)
            batch.pop("decoder_input_ids", None)
            with torch.no_grad():
                cached, plain = (
                    model.generate(
                        **batch, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=use
                    )
                    for use in (True, False)
                )
            assert torch.equal(cached, plain)


def law_beams(case: Case, folder: Path) -> None:
    """L10: beams follow their rows: a row generates the same alone."""
    del folder
    if not case.kin.generates:
        return
    with case.attached() as (model, _):
        batch = {k: v[:1] for k, v in case.kin.batch().items() if k != "decoder_input_ids"}
        pair = {k: v.repeat(2, 1) for k, v in batch.items()}
        with torch.no_grad():
            alone, twice = (
                model.generate(**b, max_new_tokens=4, min_new_tokens=4, num_beams=2, do_sample=False)
                for b in (batch, pair)
            )
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
        torch.testing.assert_close(alone, expected, **_CLOSE)


def law_slots(case: Case, folder: Path) -> None:
    """K slots in one batch equal K separate deltas, in values and gradients; rows without one the base."""
    del folder
    if case.in_place:
        _refuses_slots(case)
        return
    batch = case.kin.batch(rows=6)
    base = case.kin.logits(case.model(), batch)
    for rows in ([0, 0, 1, 1, 2, 2], [2, 0, None, 2, 1, 2], [None] * 6, [1] * 6):
        with case.attached(slots=3) as (model, bank):
            with bank.route(rows):
                mixed = case.kin.logits(model, batch)
            if mixed.requires_grad:
                mixed.square().sum().backward()
            for index, slot in enumerate(rows):
                if slot is None:
                    torch.testing.assert_close(mixed[index], base[index], **_CLOSE)
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
    torch.testing.assert_close(mixed[mine], logits[mine], **_CLOSE)
    logits[mine].square().sum().backward()
    gradient, expected = bank.bank.slots[slot].grad, single.bank.slots[0].grad
    assert gradient is not None and expected is not None
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def _refuses_slots(case: Case) -> None:
    try:
        api.attach(case.model(), case.expression, slots=2)
    except StateError:
        return
    raise AssertionError("a control that trains in place took two slots")


def law_copies(case: Case, folder: Path) -> None:
    """A deep copy and a pickle of the model carry a delta of their own, equal and independent."""
    del folder
    with case.attached() as (model, delta):
        live = case.logits(model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            (theirs,) = deltas_of(other)
            assert torch.equal(case.logits(other), live)
            move(theirs, 9)
            assert not torch.equal(case.logits(other), live)
            assert torch.equal(case.logits(model), live)
            theirs.detach()
            assert not deltas_of(other) and deltas_of(model) == (delta,)
        assert torch.equal(case.logits(model), live)


def law_bfloat16(case: Case, folder: Path) -> None:
    """On a bf16 base the delta acts in bf16, its leaves and their gradients stay fp32."""
    del folder
    model = case.model()
    model.to(torch.bfloat16)
    delta = api.attach(model, case.expression)
    move(delta)
    logits = case.kin.logits(model, case.kin.batch())
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()
    logits.float().square().sum().backward()
    wanted = torch.bfloat16 if case.in_place else torch.float32
    assert all(row.dtype == wanted for row in delta.bank.slots)


def law_checkpointing(case: Case, folder: Path) -> None:
    """Gradient checkpointing gives the same gradients."""
    del folder
    gradients = []
    for checkpointing in (False, True):
        with case.attached() as (model, delta):
            if checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
                model.train()
            case.kin.logits(model, case.kin.batch()).square().sum().backward()
            found = [row.grad for row in delta.bank.slots if row.grad is not None]
            gradients.append(torch.cat([g.flatten() for g in found]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * float(gradients[0].abs().max()))


def law_base_is_kept(case: Case, folder: Path) -> None:
    """`save_pretrained` of the base under a delta writes the whole base, by its own names."""
    with case.attached() as (model, _):
        if case.in_place:
            return
        clean = case.model()
        model.save_pretrained(folder / "base")
    again = type(clean).from_pretrained(folder / "base")
    _same_state(again, dict(clean.state_dict()))
    config = AutoConfig.from_pretrained(folder / "base")
    assert "delta" not in str(config.to_dict().get("_attn_implementation", ""))
    assert torch.equal(case.logits(again), case.logits(clean))


def laws() -> tuple[Law, ...]:
    """Every law, in the order of this file."""
    return tuple(value for name, value in globals().items() if name.startswith("law_"))


def _named_gradients(delta: Delta, slot: int) -> dict[str, Tensor]:
    row = delta.bank.slots[slot]
    assert row.grad is not None
    held, row.data = row.data.clone(), row.grad
    try:
        return {name: value.detach().clone() for name, value in delta.bank.read(slot).items()}
    finally:
        row.data = held


def _same_state(model: torch.nn.Module, wanted: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert list(state) == list(wanted)
    for name, value in state.items():
        assert torch.equal(value, wanted[name]), name


def _marks(model: torch.nn.Module) -> list[object]:
    """All that a delta could leave behind on a model, bytes apart."""
    return [
        [
            (
                name,
                type(module),
                module.training,
                sorted(k for k in module.__dict__ if not k.startswith("_is_hf")),
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
                [p is not None and p.requires_grad for p in module._parameters.values()],
            )
            for name, module in model.named_modules()
        ],
        getattr(model.config, "_attn_implementation", None),
    ]
