"""A run ends when it should, keeps to its limits, and leaves no process behind."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import anyio
import pytest

from dspark_tools.process import ProcessLimits, ProcessResult, run_process
from dspark_tools.workspace import WorkspaceError

pytestmark = pytest.mark.anyio

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="uses /proc or Linux limits")


async def python(code: str, folder: Path, limits: ProcessLimits | None = None) -> ProcessResult:
    return await run_process(
        [sys.executable, "-c", code], folder=folder, limits=limits or ProcessLimits(timeout_s=30)
    )


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A process that is dead but not yet reaped by its parent is as good as gone.
    return b") Z " not in Path(f"/proc/{pid}/stat").read_bytes()


async def wait_for(path: Path) -> str:
    with anyio.fail_after(20):
        while not (path.exists() and path.read_text().endswith("\n")):
            await anyio.sleep(0.02)
    return path.read_text()


async def test_output_and_status_come_back(tmp_path: Path) -> None:
    result = await python("import sys; print('out'); print('err', file=sys.stderr)", tmp_path)

    assert (result.output, result.status, result.stopped) == ("out\nerr\n", 0, None)
    assert result.text() == "out\nerr\n[exit status 0]"


async def test_works_in_the_folder_without_input(tmp_path: Path) -> None:
    code = "import os, sys; print(os.getcwd()); print(repr(sys.stdin.read()))"

    assert (await python(code, tmp_path)).output == f"{tmp_path.resolve()}\n''\n"


@pytest.mark.parametrize(
    ("code", "status"),
    [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 11)", 139)],
    ids=["exit", "signal"],
)
async def test_status_tells_how_it_ended(tmp_path: Path, code: str, status: int) -> None:
    assert (await python(code, tmp_path)).status == status


async def test_missing_program_is_a_result(tmp_path: Path) -> None:
    result = await run_process(["no-such-program"], folder=tmp_path)

    assert result.status == 127
    assert "cannot run 'no-such-program'" in result.output


@pytest.mark.parametrize(
    "argument", ["a\0b", "\ud800", "x" * (1 << 22)], ids=["nul", "utf", "long"]
)
async def test_impossible_arguments_are_explained(tmp_path: Path, argument: str) -> None:
    with pytest.raises(WorkspaceError, match="cannot be started"):
        await run_process(["echo", argument], folder=tmp_path)


async def test_environment_is_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET_TOKEN", "abc")

    result = await python("import os; print(os.environ)", tmp_path)

    assert "MY_SECRET_TOKEN" not in result.output
    assert str(Path.home()) + "'" not in result.output


async def test_home_is_fresh_and_goes_away(tmp_path: Path) -> None:
    code = "import os; h = os.environ['HOME']; print(h, os.listdir(h)); open(h + '/x', 'w')"

    home, _, listing = (await python(code, tmp_path)).output.partition(" ")

    assert listing == "[]\n"
    assert not Path(home).exists()


async def test_time_limit_stops_the_program(tmp_path: Path) -> None:
    started = time.perf_counter()

    result = await python(
        "print('begun'); import time; time.sleep(60)", tmp_path, ProcessLimits(timeout_s=1)
    )

    assert time.perf_counter() - started < 30
    assert result.status is None
    assert result.text() == "begun\n[stopped: it ran longer than 1 seconds]"


@LINUX
async def test_memory_limit_holds(tmp_path: Path) -> None:
    limits = ProcessLimits(timeout_s=30, memory_bytes=512 << 20)

    result = await python("x = bytearray(1 << 30)", tmp_path, limits)

    assert result.status == 1
    assert "MemoryError" in result.output


async def test_file_size_limit_holds(tmp_path: Path) -> None:
    limits = ProcessLimits(timeout_s=30, file_bytes=1000)

    result = await run_process(
        ["sh", "-c", "head -c 5000 /dev/zero > big"], folder=tmp_path, limits=limits
    )

    assert result.status != 0
    assert (tmp_path / "big").stat().st_size == 1000


async def test_middle_of_long_output_is_left_out(tmp_path: Path) -> None:
    limits = ProcessLimits(timeout_s=30, output_bytes=200)

    result = await python("for i in range(1000): print(f'{i:04}')", tmp_path, limits)

    assert result.output.startswith("0000\n0001\n")
    assert result.output.endswith("\n0998\n0999\n")
    assert "4,800 bytes left out" in result.output


async def test_flood_of_output_stops_the_program(tmp_path: Path) -> None:
    limits = ProcessLimits(timeout_s=60, output_bytes=200, flood_bytes=1 << 20)

    result = await run_process(["yes"], folder=tmp_path, limits=limits)

    assert result.stopped == "it printed more than 1,048,576 bytes"
    assert result.seconds < 60
    assert len(result.output) < 300


DETACHED = """
import os, sys, time
if os.fork() == 0:
    os.setsid()                       # a session of its own: out of the group
    if os.fork() == 0:                # and no child of ours any more
        with open("pid", "w") as file:
            print(os.getpid(), file=file)
        time.sleep(600)
    os._exit(0)
"""


@LINUX
async def test_detached_grandchild_dies_when_the_program_ends(tmp_path: Path) -> None:
    code = DETACHED + "\nwhile not os.path.exists('pid'): time.sleep(0.01)"

    result = await python(code, tmp_path)

    assert result.status == 0
    assert not alive(int((tmp_path / "pid").read_text()))


@LINUX
async def test_detached_grandchild_dies_at_the_time_limit(tmp_path: Path) -> None:
    result = await python(DETACHED + "\ntime.sleep(600)", tmp_path, ProcessLimits(timeout_s=2))

    assert result.status is None
    assert not alive(int((tmp_path / "pid").read_text()))


@LINUX
async def test_cancellation_ends_everything(tmp_path: Path) -> None:
    code = DETACHED + "\nopen('own', 'w').write(f'{os.getpid()}\\n'); time.sleep(600)"
    async with anyio.create_task_group() as group:
        group.start_soon(python, code, tmp_path)
        pids = [int(await wait_for(tmp_path / name)) for name in ("pid", "own")]
        assert all(alive(pid) for pid in pids)
        group.cancel_scope.cancel()

    assert not any(alive(pid) for pid in pids)


@LINUX
async def test_program_that_ignores_signals_ends_too(tmp_path: Path) -> None:
    code = (
        "import os, signal, time\n"
        "for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):\n"
        "    signal.signal(number, signal.SIG_IGN)\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(600)"
    )

    result = await python(code, tmp_path, ProcessLimits(timeout_s=1))

    assert not alive(int(result.output))


@LINUX
async def test_program_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    """The runner itself is killed outright, so that none of its clean-up code runs."""
    runner = (
        "import anyio, pathlib, sys\n"
        "from dspark_tools.process import run_process\n"
        'code = \'import os, time; print(os.getpid(), file=open("pid", "w")); time.sleep(600)\'\n'
        "anyio.run(lambda: run_process([sys.executable, '-c', code], folder=pathlib.Path()))\n"
    )
    process = await anyio.open_process(
        [sys.executable, "-c", runner], cwd=tmp_path, stdout=None, stderr=None
    )
    async with process:
        pid = int(await wait_for(tmp_path / "pid"))
        process.kill()
        await process.wait()

    with anyio.fail_after(20):
        while alive(pid):
            await anyio.sleep(0.02)


async def test_runs_do_not_disturb_each_other(tmp_path: Path) -> None:
    results: dict[int, str] = {}

    async def one(number: int) -> None:
        results[number] = (await python(f"print({number})", tmp_path)).output

    async with anyio.create_task_group() as group:
        for number in range(6):
            group.start_soon(one, number)

    assert results == {number: f"{number}\n" for number in range(6)}
