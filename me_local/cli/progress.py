"""The bar of a long run, with the time that is left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from me_local.cli.display import make_console


@contextmanager
def progress(what: str, total: int, completed: int = 0, *, hidden: bool = False) -> Iterator[Callable[[], None]]:
    """A bar on stderr for `total` of `what`; calling what it gives counts one."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=make_console(stderr=True), disable=hidden) as bar:
        task = bar.add_task(what, total=total, completed=completed)
        yield lambda: bar.advance(task)
