"""The edge of the program: what a user did wrong is one clear line, never a stack trace."""

from __future__ import annotations

from collections.abc import Callable

from rich.markup import escape
from rich.traceback import Traceback

from dspark_agent.cli.console import err

OK = 0
BUG = 1
MISTAKE = 2
INTERRUPTED = 130


class UsageError(Exception):
    """An argument that the command line itself can tell is wrong."""


def guarded(command: Callable[[], object], *, debug: Callable[[], bool]) -> int:
    """Runs ``command`` and returns the exit code; ``debug`` is asked only after a failure.

    Errors that the project raises on purpose, and files that cannot be read or written, give
    exit code 2; Ctrl-C gives 130; anything else is a fault of the program and gives 1.
    """
    try:
        command()
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as exit_:
        # typer has printed its own complaint about the command line by now.
        code = exit_.code if isinstance(exit_.code, int) else OK
        return _interrupted() if code == INTERRUPTED else code
    except Exception as error:
        if debug():
            err().print(Traceback.from_exception(type(error), error, error.__traceback__))
        return _report(error, debug())
    return OK


def _interrupted() -> int:
    err().print("[note]interrupted[/]")
    return INTERRUPTED


def _report(error: Exception, debug: bool) -> int:
    error = _only(error)
    if is_expected(error):
        err().print(f"[bad]error:[/] {escape(_message(error))}", soft_wrap=True)
        return MISTAKE
    hint = "" if debug else "; `dspark-agent --debug ...` shows the trace"
    said = escape(f"{type(error).__name__}: {error}{hint}")
    err().print(f"[bad]internal error:[/] {said}", soft_wrap=True)
    return BUG


def is_expected(error: Exception) -> bool:
    """Whether ``error`` was raised on purpose, with a message meant for a user."""
    from dspark_agent.errors import DSparkError
    from dspark_backend.errors import BackendError

    return isinstance(error, DSparkError | BackendError | UsageError | OSError)


def _only(error: Exception) -> Exception:
    """The error inside task groups that hold just one."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
