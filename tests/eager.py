"""The step without compilation, for tests that are about something else."""

from typing import Any

from topkast_func import make_train_step


def eager_step(*arguments: Any, **options: Any) -> Any:
    """Make the step that `make_train_step` makes, but for its compilation."""
    return make_train_step(*arguments, **{**options, "compile": False})
