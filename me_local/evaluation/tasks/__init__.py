"""The tasks of `me-local eval`: one module each, which says what its data look like and where its prompts come from."""

from me_local.errors import InputError
from me_local.evaluation.tasks import arc, bbh, gsm8k, mmlu
from me_local.evaluation.tasks.task import Question, Scoring, Task, read_questions

__all__ = ["TASKS", "Question", "Scoring", "Task", "find_tasks", "read_questions"]

TASKS: dict[str, Task] = {task.name: task for task in (gsm8k.TASK, mmlu.TASK, bbh.TASK, arc.CHALLENGE, arc.EASY)}
"""All tasks by name, in the order of tables."""

_SETS = {"arc": ("arc_challenge", "arc_easy")}


def find_tasks(names: str) -> list[Task]:
    """The tasks of a list like "gsm8k,arc", each once; "arc" is both sets of ARC. Raises InputError."""
    wanted = [name.strip() for name in names.split(",")]
    expanded = [part for name in wanted for part in _SETS.get(name, (name,))]
    for name in expanded:
        if name not in TASKS:
            raise InputError(f'there is no task "{name}"; there are {", ".join([*TASKS, *_SETS])}')
    return [TASKS[name] for name in dict.fromkeys(expanded)]
