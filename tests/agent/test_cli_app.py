"""The command line's frame: help, exit codes, and errors without stack traces."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dspark_agent.cli import app, main
from dspark_agent.cli.boundary import BUG, INTERRUPTED, MISTAKE, OK, UsageError, guarded

COMMANDS = ["demo", "chat", "run", "models", "bench", "train", "eval", "trace"]
SUBCOMMANDS = [
    ["models", "list"],
    ["models", "pull"],
    ["models", "rm"],
    ["bench", "decode"],
    ["bench", "steps"],
    ["bench", "quality"],
]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == OK
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


@pytest.mark.parametrize("command", [[command] for command in COMMANDS] + SUBCOMMANDS, ids=" ".join)
def test_every_command_explains_itself(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--help"]) == OK
    shown = capsys.readouterr().out
    assert "Usage" in shown
    assert command[-1] in shown


def test_help_loads_neither_torch_nor_the_engine() -> None:
    code = (
        "import sys\n"
        "from dspark_agent.cli import main\n"
        "main(['bench', 'decode', '--help'])\n"
        "heavy = {'torch', 'transformers', 'numba', 'httpx', 'dspark_tools', 'dspark_backend'}\n"
        "print(*heavy & set(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == OK
    assert capsys.readouterr().out.strip() == "0.1.0"


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["models", "pull"],
        ["bench", "decode", "--model", "m"],
        ["bench", "decode", "--model", "m", "--json", "x", "--peer", "vllm"],
        ["bench", "decode", "--model", "m", "--json", "x", "--max-new-tokens", "0"],
        ["run"],
        ["run", "hi", "--schema", "/does/not/exist"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_a_mistake(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == MISTAKE
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err + shown.out
    assert "Usage" in shown.err


def boom(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (UsageError("give a prompt"), MISTAKE, "error: give a prompt"),
        (FileNotFoundError(2, "No such file or directory", "x.jsonl"), MISTAKE, "x.jsonl: No such"),
        (ExceptionGroup("tasks", [UsageError("inner [red]x[/]")]), MISTAKE, "error: inner [red]x"),
        (KeyError("a"), BUG, "internal error: KeyError: 'a'"),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted"),
    ],
    ids=["usage", "file", "group", "bug", "interrupt"],
)
def test_an_error_is_one_line(
    error: BaseException, code: int, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(lambda: boom(error), debug=lambda: False) == code
    printed = capsys.readouterr().err
    assert shown in " ".join(printed.split())
    assert "Traceback" not in printed


def test_the_errors_of_the_sdk_and_the_engine_are_expected(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from dspark_agent import UsageLimitExceeded
    from dspark_backend.errors import DownloadError

    for error in (UsageLimitExceeded("request_limit", limit=1, used=2), DownloadError("offline")):
        assert guarded(lambda error=error: boom(error), debug=lambda: False) == MISTAKE
    assert "offline" in capsys.readouterr().err


def test_debug_shows_the_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: object
) -> None:
    monkeypatch.setenv("DSPARK_AGENT_HOME", str(tmp_path))
    assert main(["models", "rm", "no-such-model"]) == MISTAKE
    plain = capsys.readouterr().err
    assert "no-such-model" in plain
    assert "Traceback" not in plain
    assert main(["--debug", "models", "rm", "no-such-model"]) == MISTAKE
    assert "Traceback" in capsys.readouterr().err
    # one call's option does not leak into the next
    assert main(["models", "rm", "no-such-model"]) == MISTAKE
    assert "Traceback" not in capsys.readouterr().err


def test_the_application_is_built_anew_for_every_call() -> None:
    first, second = app.GlobalOptions(), app.GlobalOptions()
    assert app.build_app(first) is not app.build_app(second)
