"""Finding tasks: the records of the package, the user's own records, and plain data files.

A record file is YAML: either one record, or `shared:` (parts that every record of the file has) and
`tasks:` (a list of records). Files are looked for in the package's `catalog/`, in the folders of
the environment variable DELTATUNE_TASKS (separated like PATH) and in those given by argument. A
file that cannot be read is an error, never left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from deltatune.core.errors import ConfigurationError, UnknownNameError
from deltatune.core.registry import Registry
from deltatune.tasks.sources.files import task_from_files
from deltatune.tasks.sources.reading import file_format
from deltatune.tasks.specification import (
    EmbeddedSpecification,
    FilesSpecification,
    HubSpecification,
    Lengths,
    PairPreparation,
    Provenance,
    Record,
    SplitRule,
)
from deltatune.tasks.task import Task

__all__ = ["FOLDERS_VARIABLE", "TASKS", "find_task", "known_tasks", "load_records", "names_of"]

FOLDERS_VARIABLE = "DELTATUNE_TASKS"

# libyaml's parser reads the catalog ten times faster; not every build of PyYAML has it.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_CATALOG = Path(__file__).parent / "catalog"
_YAML = (".yaml", ".yml")
_PARTS: Mapping[str, type[Record]] = {
    "provenance": Provenance,
    "prepare": PairPreparation,
    "splits": SplitRule,
    "lengths": Lengths,
    "hub": HubSpecification,
    "files": FilesSpecification,
    "embedded": EmbeddedSpecification,
}


def load_records(path: str | Path) -> tuple[Task, ...]:
    """Returns the tasks of a record file.

    Raises:
        ConfigurationError: the file is missing or not YAML, a key, name or value in it is unknown,
            or a part is missing; the message names the file, the task and the nearest known name.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text("utf-8"), Loader=_LOADER)
    except OSError as error:
        raise ConfigurationError(
            f"{path}: the record file cannot be read ({error.strerror})."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(
            f"{path}: expected a record with `name:` or a list under `tasks:`."
        )
    if "tasks" not in content:
        return (_record(content, path),)
    for key in content:
        if key not in ("shared", "tasks"):
            raise ConfigurationError(
                f"{path}: {UnknownNameError('key', str(key), ('shared', 'tasks'))}"
            )
    shared = content.get("shared") or {}
    return tuple(_record(_merged(shared, record), path) for record in content["tasks"])


def _merged(shared: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(shared)
    for key, value in record.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            value = {**below, **value}
        merged[key] = value
    return merged


def _record(content: Mapping[str, Any], path: Path) -> Task:
    try:
        task = Task.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(_problem(problem) for problem in error.errors())
        raise ConfigurationError(f"{path}, task {content.get('name')!r}: {problems}") from error
    source = task.source
    if not isinstance(source, FilesSpecification):
        return task
    # A record file and its data travel together: its paths are meant from where it lies.
    paths = {
        key: str((path.parent / value).absolute())
        for key in ("path", "train", "validation", "test")
        if (value := getattr(source, key)) is not None
    }
    return task.model_copy(update={"source": source.model_copy(update=paths)})


def _problem(problem: Any) -> str:
    *parents, last = (str(part) for part in problem["loc"] or ("record",))
    if problem["type"] == "extra_forbidden":
        model = next((_PARTS[part] for part in reversed(parents) if part in _PARTS), Task)
        return str(UnknownNameError("key", last, model.model_fields))
    cause = problem.get("ctx", {}).get("error")
    text = str(cause) if isinstance(cause, Exception) else problem["msg"]
    return f"{'.'.join((*parents, last))}: {text}" if problem["loc"] else text


def _in_folder(folder: Path) -> list[Task]:
    if not folder.is_dir():
        raise ConfigurationError(f"{folder}: there is no such folder of task records.")
    files = sorted(path for path in folder.iterdir() if path.suffix in _YAML)
    return [task for path in files for task in load_records(path)]


def _package_tasks() -> Registry[Task]:
    registry: Registry[Task] = Registry("task")
    for task in _in_folder(_CATALOG):
        registry.add(task.name, task)
    return registry


TASKS: Registry[Task] = _package_tasks()
"""The records of the package, by name."""


def known_tasks(folders: Iterable[str | Path] = ()) -> dict[str, Task]:
    """Returns every task by name: the package's, then those of DELTATUNE_TASKS and of `folders`.

    Raises:
        ConfigurationError: a folder or file cannot be read, or two records have one name.
    """
    named = [part for part in os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep) if part]
    known = dict(TASKS)
    for folder in dict.fromkeys(Path(folder).absolute() for folder in (*named, *folders)):
        for task in _in_folder(folder):
            if task.name in known:
                raise ConfigurationError(
                    f"{folder}: a task {task.name!r} exists already. Choose another name."
                )
            known[task.name] = task
    return known


def find_task(name: str | Path, folders: Iterable[str | Path] = ()) -> Task:
    """Returns a task by name, by record file, or by data file or folder.

    Args:
        name: a task's name; or the path of a YAML file with one record; or of a data file, or a
            folder of them, with a text and a label column.
        folders: further folders of records.

    Raises:
        UnknownNameError: there is no such task.
        ConfigurationError: a record cannot be read.
        DataError: a data file cannot be read.
    """
    known = known_tasks(folders)
    if str(name) in known:
        return known[str(name)]
    path = Path(name)
    if path.suffix in _YAML:
        tasks = load_records(path)
        if len(tasks) != 1:
            raise ConfigurationError(
                f"{path}: expected one record, found {len(tasks)}. Add its folder to "
                f"{FOLDERS_VARIABLE} "
                "and ask for a task by name."
            )
        return tasks[0]
    if file_format(path) or path.is_dir():
        return task_from_files(path)
    raise UnknownNameError("task", str(name), known)


def names_of(text: str) -> tuple[str, ...]:
    """The names in "one + another", as `find_task` takes them.

    Raises ConfigurationError if a name is missing or stands twice.
    """
    names = tuple(name.strip() for name in text.split(" + "))
    if not all(names) or len(set(names)) < len(names):
        raise ConfigurationError(
            f"Several tasks are written 'one + another', each once. Found {text!r}."
        )
    return names
