"""The tasks of `me-local eval`: one module each, which says what its data look like and where its prompts come from."""

import os
from pathlib import Path

from me_local.errors import InputError
from me_local.evaluation.tasks import arc, bbh, gsm8k, mmlu
from me_local.evaluation.tasks.own import read_task
from me_local.evaluation.tasks.task import Question, Scoring, Task, read_questions

__all__ = ["TASKS", "Question", "Scoring", "Task", "find_tasks", "read_questions"]

TASKS: dict[str, Task] = {task.name: task for task in (gsm8k.TASK, mmlu.TASK, bbh.TASK, arc.CHALLENGE, arc.EASY)}
"""All tasks by name, in the order of tables."""

_SETS = {"arc": ("arc_challenge", "arc_easy")}


def find_tasks(names: str) -> list[Task]:
    """The tasks of a list like "gsm8k,arc,mine.toml", each once; "arc" is both sets of ARC.

    Raises InputError, and ConfigError for the file of a task of one's own.
    """
    wanted = dict.fromkeys(part for name in names.split(",") for part in _SETS.get(name.strip(), (name.strip(),)))
    tasks: dict[str, Task] = {}
    for name in wanted:
        task = _find_task(name)
        if task.name in tasks or (task.own and task.name in TASKS):
            raise InputError(f'{name}: there is a task "{task.name}" already: give the file another name')
        tasks[task.name] = task
    return list(tasks.values())


def _find_task(name: str) -> Task:
    if name.endswith(".toml"):
        return read_task(Path(os.path.expanduser(name)))
    if name not in TASKS:
        raise InputError(f'there is no task "{name}"; there are {", ".join([*TASKS, *_SETS])}, and files FILE.toml')
    return TASKS[name]
