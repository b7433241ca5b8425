"""The verbs: the one place where packages meet. Each is a thin call of what lies below."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast, get_args

from torch import Tensor, nn

from deltatune.core import artefact, attaching
from deltatune.core.delta import Delta, deltas_of
from deltatune.core.errors import (
    ConfigurationError,
    DeltatuneError,
    StateError,
    UnknownNameError,
)
from deltatune.core.grammar import Expression
from deltatune.core.layout import Sharing
from deltatune.core.method import Method
from deltatune.core.plan import Plan
from deltatune.core.plan import plan as plan_expression
from deltatune.study.cell import Cell, CellResult
from deltatune.study.cluster import open_pool
from deltatune.study.comparison import Comparison, run_comparison
from deltatune.study.runner import Watch
from deltatune.study.summary import Summary, summarise
from deltatune.tasks.example import SplitName
from deltatune.training.progress import Progress
from deltatune.training.settings import Settings
from deltatune.training.trunk_cache import TrunkCache

if TYPE_CHECKING:
    from deltatune.execution.studying import Workplace
    from deltatune.study.experiment import Study
    from deltatune.study.findings import Findings
    from deltatune.study.store import JournalStore

__all__ = [
    "attach",
    "compare",
    "evaluate",
    "load",
    "plan",
    "route",
    "save",
    "study",
    "train",
    "train_many",
]

Methods: TypeAlias = str | Method | Expression


def attach(
    model: nn.Module,
    method: Methods | Sequence[Methods],
    at: str | None = None,
    *,
    slots: int = 1,
    seed: int | Sequence[int] = 0,
    sharing: Sharing = "none",
) -> Delta:
    """Binds a method, or a sum of methods, to a model; the model is frozen and the delta acts.

    Args:
        model: a Hugging Face or plain PyTorch model.
        method: a value, `LoRA(rank=8) + Adapter()`, or a text, `"lora(rank=8) + adapter"`; a list
            gives each slot of the delta its own.
        at: the target of every method that names none itself.
        slots: how many deltas of the method to hold beside each other.
        seed: initial values and dropout depend on it alone.
        sharing: what the slots have in common, one tensor for all of them: "none", "method" for
            what the methods name as shared, "all" for all but heads.

    Raises:
        ConfigurationError, TargetError, UnsupportedError, StateError: see `core.attaching.attach`.
    """
    if isinstance(method, str | Method | Expression):
        return attaching.attach(
            model, Expression.of(method).at(at), slots=slots, seed=seed, sharing=sharing
        )
    if slots != 1:
        raise ConfigurationError("Give either `slots` or a list with a method for each slot.")
    return attaching.attach(
        model, [Expression.of(one).at(at) for one in method], seed=seed, sharing=sharing
    )


def plan(backbone: str | nn.Module, method: Methods, at: str | None = None) -> Plan:
    """What attaching would do: sites, shapes, counts, memory. Changes nothing and reads no weights.

    Args:
        backbone: a model, or what names one: embedded, hub id, folder, config.json.
        method: see `attach`.
        at: see `attach`.
    """
    if isinstance(backbone, str):
        from deltatune.backbones.load import load_architecture

        backbone = load_architecture(backbone)
    return plan_expression(backbone, Expression.of(method).at(at))


def save(
    trained: Delta,
    folder: str | Path,
    *,
    slot: int = 0,
    overwrite: bool = False,
    as_trained: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Writes one slot of a delta as `delta.json` and `delta.safetensors`, and `card.md`, which says
    to people what it is. Raises ArtefactError.

    With `as_trained` a method is written as it is trained, where it is stored in another form
    (`p_tuning`, `intrinsic_prompt`), so that others can start from it. Facts are kept in
    `delta.json`, any that JSON can hold; "backbone", "task", "test" and "validation" (scores by
    metric), "licence", "seed", "budget" are shown on the card and by a hub.
    """
    return artefact.save(
        trained, folder, slot=slot, overwrite=overwrite, as_trained=as_trained, facts=facts
    )


def load(
    folder: str | Path, model: nn.Module, *, across_formats: bool = False,
    other_weights: artefact.OnMismatch = "refuse", allow_pickle: bool = False,
    trusted: Sequence[str] = (), inputs: Mapping[str, Tensor] | None = None, tokenizer: Any = None,
) -> Delta:  # fmt: skip
    """Attaches the delta in a folder. Raises BackboneMismatchError on another backbone,
    ArtefactError.

    A folder of PEFT, AdapterHub or OpenDelta is read, too, see `deltatune.interop`: it has no
    fingerprint, so that the backbone is held to shapes alone. With `allow_pickle` those of the last
    two are read where their tensors are a pickle: tensors and nothing else, for whom you trust.

    With `across_formats` the backbone may be kept in another format (int8, NF4, plain numbers) than
    that which the delta was trained on; its weights are not compared then. With
    `other_weights="warn"` it may have been trained further since: a warning says so. Where public
    keys are `trusted`, one of them must have signed the delta; see `deltatune.hub.sign`. With
    `inputs`, keyword arguments of the model, it is computed before and after, and a warning says so
    if the delta changes no output. With a `tokenizer`, its tokens must have the numbers that they
    had when the delta was trained, where the delta says so.
    """
    from deltatune.core.probe import saying_if_idle
    from deltatune.interop.foreign import read_foreign

    if trusted:
        from deltatune.hub import check_signed

        check_signed(folder, trusted)
    with saying_if_idle(f"The delta in {folder}", model, inputs):
        if not artefact.files_of(Path(folder))[0].exists():
            found = read_foreign(folder, model, allow_pickle=allow_pickle)
            if found is not None:
                return found
        return artefact.load(
            model,
            folder,
            across_formats=across_formats,
            other_weights=other_weights,
            tokenizer=tokenizer,
        )


@contextmanager
def route(
    model: nn.Module, rows: Sequence[str | tuple[str, int] | Delta | tuple[Delta, int] | None]
) -> Iterator[None]:
    """Sends each row of the batches within it through its own delta.

    Args:
        model: with any number of deltas attached, of any methods.
        rows: for each row a delta or its name, with a slot where it has several; None for the
            backbone alone.

    Raises:
        UnknownNameError: no attached delta has the name.
        ConfigurationError: several attached deltas have the name, or there is no such slot.
        StateError: a delta is not attached to this model.

    Example:
        `with dt.route(model, [mine, (bank, 3), None]): model(**batch)`
    """
    wanted = [_routed(model, row) for row in rows]
    with ExitStack() as stack:
        for one in deltas_of(model):
            slots = [row[1] if row is not None and row[0] is one else None for row in wanted]
            stack.enter_context(one.route(slots))
        yield


def _routed(
    model: nn.Module, row: str | tuple[str, int] | Delta | tuple[Delta, int] | None
) -> tuple[Delta, int] | None:
    if row is None:
        return None
    which, slot = row if isinstance(row, tuple) else (row, 0)
    attached = deltas_of(model)
    if isinstance(which, Delta):
        if not any(one is which for one in attached):
            raise StateError(f"{which.name} is not attached to this model. Attach it first.")
        return which, slot
    named = [one for one in attached if one.name == which]
    if not named:
        raise UnknownNameError("attached delta", which, [one.name for one in attached])
    if len(named) > 1:
        raise ConfigurationError(
            f"{len(named)} attached deltas are called {which!r}. Name the row by the delta itself."
        )
    return named[0], slot


def train(
    backbone: str,
    task: str | Sequence[str],
    method: Methods,
    at: str | None = None,
    *,
    budget: str = "300 steps",
    settings: Settings | None = None,
    stages: Sequence[Mapping[str, Any]] = (),
    seed: int = 0,
    protocol: str = "clean",
    data: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    progress: Progress | None = None,
    trunk_cache: TrunkCache | None = None,
) -> CellResult:
    """Trains a method on a task and scores it; the delta is kept in `folder`/delta.

    Args:
        backbone: a name that `load_backbone` takes.
        task: a task's id, the path of a record, or of a data file with a text and a label column;
            several, in a list or as "one + another", are learned by one delta, each scored by its
            own metric, and their average decides.
        method: see `attach`. A head is added where the task needs one.
        at: see `attach`.
        budget: "300 steps", "2 epochs", "10 minutes", "1e6 tokens"; for `a >> b` that of
            each stage, or one for each, "200 steps >> 2 epochs".
        settings: how to train; its learning rate is the method's preset where it is None.
        stages: what the settings are in each stage where they are others, see `Cell`.
        seed: of leaves, order of rows and dropout.
        protocol: "clean" or "faithful".
        data: the folder that holds the tasks' rows, or "hub"; else the variable DELTATUNE_DATA.
        options: `train_rows`, `validation_rows`, `test_rows`, `shots`, `shots_seed`,
            `maximum_source`, `mode`, `dtype`, `quantise`, `error_rank`; of several tasks
            `temperature`, `cap`, `mixed`, see `Mixture`, and `sharing`, which gives each a slot,
            see `attach`. The tasks of an encoder, which need heads of their own, have slots that
            share all else.
        folder: of the run, which goes on from there if it was interrupted.
        progress: what shows the run.
        trunk_cache: keeps what the frozen blocks below the delta give, where that pays.

    Returns:
        Scores, counts, times and the place of the delta.
    """
    from deltatune.execution.cell import execute

    cell = Cell(
        backbone=backbone,
        method=str(Expression.of(method)),
        at=at,
        task=task if isinstance(task, str) else " + ".join(task),
        protocol=protocol,
        seed=seed,
        budget=budget,
        settings=settings or Settings(),
        stages=tuple(map(dict, stages)),
        options=dict(options or {}),
    )
    return execute(
        cell,
        data=data,
        folder=None if folder is None else Path(folder),
        progress=progress,
        trunk_cache=trunk_cache,
    )


def train_many(
    cells: Sequence[Cell],
    *,
    slots: int = 8,
    tokens: int = 2048,
    data: str | Path | None = None,
    folder: str | Path | None = None,
    progress: Progress | None = None,
    trunk_cache: TrunkCache | None = None,
) -> list[CellResult | DeltatuneError]:
    """Trains and scores many runs; those of one backbone and method share one frozen base.

    Each ends as `train` would end it, up to the order of sums, or with the error that stopped it
    alone. Its time is its share of what all took, and its memory is not measured. A control that
    trains the backbone itself is run alone.

    Args:
        cells: any tasks, seeds, learning rates, budgets and methods.
        slots: so many runs at once; one that ends gives its place to the next.
        tokens: how many input tokens, with padding, one pass of the base may have.
        data: see `train`.
        folder: holds a folder for each cell, named by its id; interrupted runs go on from there.
        progress, trunk_cache: see `train`.

    Returns:
        What became of each cell, in the order given.

    Raises:
        ConfigurationError: so many slots do not fit into memory.
    """
    from deltatune.execution import cell as execution

    def place(cell: Cell) -> Path | None:
        return None if folder is None else Path(folder) / cell.id

    found: dict[str, CellResult | DeltatuneError] = {}

    def told(cell: Cell, outcome: CellResult | DeltatuneError) -> None:
        found[cell.id] = outcome

    shared: dict[str, Any] = {"data": data, "progress": progress, "trunk_cache": trunk_cache}
    groups: dict[str, list[Cell]] = {}
    for cell in {cell.id: cell for cell in cells}.values():
        groups.setdefault(execution.shared_base(cell) or cell.id, []).append(cell)
    for group in groups.values():
        if len(group) > 1:
            execution.execute_together(
                group, told, slots=slots, tokens=tokens, folder=place, **shared
            )
            continue
        try:
            told(group[0], execution.execute(group[0], folder=place(group[0]), **shared))
        except DeltatuneError as error:
            told(group[0], error)
    return [found[cell.id] for cell in cells]


def evaluate(
    folder: str | Path,
    *,
    task: str | None = None,
    backbone: str | None = None,
    split: str = "test",
    protocol: str = "clean",
    data: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Scores a saved delta. Backbone and task are those that it was trained with, unless given.

    Raises:
        BackboneMismatchError: the backbone is another one.
        ConfigurationError: neither the call nor the delta names a backbone or a task.
    """
    from deltatune.execution import ground
    from deltatune.execution.cell import attached
    from deltatune.execution.goals import goals_of

    facts = artefact.read(folder).facts
    backbone, task = backbone or facts.get("backbone"), task or facts.get("task")
    if backbone is None or task is None:
        missing = "backbone" if backbone is None else "task"
        raise ConfigurationError(f"The delta in {folder} names no {missing}. Give {missing}=...")
    if split not in get_args(SplitName):
        raise UnknownNameError("split", split, get_args(SplitName))
    kept = {name: facts.get(name) for name in ("dtype", "quantise")}
    chosen = {**kept, **(options or {})}
    ground.check_options(chosen)
    goals = goals_of(task, protocol, data, chosen)
    loaded = ground.backbone_for(backbone, goals.tasks, None, chosen, facts.get("head_width"))
    with attached(artefact.load(loaded.model, folder, tokenizer=loaded.tokenizer)):
        found = goals.evaluate(loaded, cast(SplitName, split), chosen, lambda _: nullcontext())
    return {
        "task": goals.name,
        "split": split,
        "rows": goals.rows(cast(SplitName, split)),
        "scores": found.scores,
        "status": goals.status,
        "notes": [*goals.notes, *found.warnings],
    }


def compare(
    comparison: Comparison,
    folder: str | Path,
    *,
    data: str | Path | None = None,
    together: int = 1,
    trunk_cache: TrunkCache | None = None,
    on: str | None = None,
    retry: bool = False,
    watch: Watch | None = None,
) -> Summary:
    """Runs a comparison, or what is left of it, and returns what it shows.

    Args:
        comparison: what is compared.
        folder: of the study: `journal.jsonl`, and the deltas under `cells/`.
        data: see `train`.
        together: so many cells of one arm are trained at once over one base. Their scores are those
            that each would have alone, up to the order of sums; their times are shares of what all
            took, and their memory is not measured.
        trunk_cache: see `train`; in memory, it serves one cell after the other.
        on: where cells are trained: "ray" or "ray:ADDRESS", the workers of a Ray cluster; None: in
            this process. Results are recorded here; a delta stays on the machine that trained it,
            if that has no file system in common with this one, and `artefact` names the machine.
        retry: whether cells that failed before this call are tried again.
        watch: told of every cell.

    Raises:
        ConfigurationError: `together` is less than 1.
        UnknownNameError, UnsupportedError, StateError: of `on`, see `study.cluster.open_pool`.
    """
    place, store = _workplace(folder, data, together, trunk_cache, on)
    with open_pool(on, place.describe) as pool:
        run_comparison(
            comparison,
            place.execute,
            store,
            describe=place.describe,
            together=place.together,
            pool=pool,
            retry=retry,
            watch=watch,
        )
    return summarise(store)


def study(
    wanted: Study,
    folder: str | Path,
    *,
    data: str | Path | None = None,
    together: int = 1,
    trunk_cache: TrunkCache | None = None,
    on: str | None = None,
    retry: bool = False,
    watch: Watch | None = None,
) -> Findings:
    """Runs a study, or what is left of it, and returns what it shows.

    Args:
        wanted: `find_experiment("combination").study(backbones=["minilm"], ...)`.
        folder: see `compare`; one for each study.
        data: see `train`.
        together: see `compare`.
        trunk_cache: see `compare`.
        on: see `compare`.
        retry: see `compare`.
        watch: told of every cell.

    Raises:
        ConfigurationError: `together` is less than 1.
        StateError: the folder holds another study.
        UnknownNameError, UnsupportedError, StateError: of `on`, see `study.cluster.open_pool`.
    """
    from deltatune.study.experiment import run_study
    from deltatune.study.findings import findings

    place, store = _workplace(folder, data, together, trunk_cache, on)
    with open_pool(on, place.describe) as pool:
        run_study(
            wanted,
            place.execute,
            store,
            describe=place.describe,
            together=place.together,
            pool=pool,
            retry=retry,
            watch=watch,
        )
    return findings(store)


def _workplace(
    folder: str | Path,
    data: str | Path | None,
    together: int,
    trunk_cache: TrunkCache | None,
    on: str | None,
) -> tuple[Workplace, JournalStore]:
    """How cells are carried out, and the store of their results."""
    from deltatune.execution.studying import Workplace

    folder = Path(folder)
    if on is not None:  # a path must be the same one wherever a worker starts
        folder = folder.absolute()
        data = data if data in (None, "hub") else Path(data).absolute()
    place = Workplace(folder, data, together, trunk_cache)
    return place, place.store
