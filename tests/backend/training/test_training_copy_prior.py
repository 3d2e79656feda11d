"""The copy proposer's prior, measured on a history made for the purpose."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from dspark_backend.speculation.copy_acceptance import PRIOR, Agreement, CopyAcceptance
from dspark_backend.training.copy_prior import prior, replay, report, survival_error
from dspark_backend.training.copy_tasks import CopyTask, copy_tasks
from dspark_backend.training.errors import TrainingError

CODE = "".join(f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(12))


def encode(text: str) -> list[int]:
    return list(text.encode())


def task(context: list[int], answer: list[int]) -> CopyTask:
    return CopyTask("rewrite", tuple(context), tuple(answer))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")

    def git(*arguments: str) -> None:
        author = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *author, *arguments], cwd=folder, check=True, capture_output=True)

    git("init", "-q")
    (folder / "numbers.py").write_text(CODE)
    (folder / "test_numbers.py").write_text("from numbers import f0\n\nassert f0(1) == 1\n")
    git("add", ".")
    git("commit", "-qm", "code and its tests")
    (folder / "numbers.py").write_text(CODE.replace("x + 5", "x * 5"))
    git("commit", "-qam", "a change")
    return folder


def test_tasks_are_what_the_history_holds(repository: Path) -> None:
    tasks = {each.scenario: each for each in copy_tasks(repository, encode, 5)}
    assert list(tasks) == ["rewrite", "edit", "test", "new"]
    assert CODE in bytes(tasks["rewrite"].context).decode()
    assert bytes(tasks["rewrite"].answer).decode() == CODE.replace("x + 5", "x * 5")
    assert '"new_text": "def f5(x):\\n    return x * 5\\n"' in bytes(tasks["edit"].answer).decode()
    assert bytes(tasks["test"].answer).decode().startswith("from numbers import")


def test_a_replay_goes_on_behind_each_miss() -> None:
    text = list(range(100))
    done = replay(
        task([*text, 200], [0, 1, 2, 300, 4, 5, 6, 7]),
        CopyAcceptance(),
        floor=0.0,
        learn=False,
    )
    # Nothing matches 200; behind 0 hold 1, 2 and not 3; nothing matches 300; behind 4 all holds.
    assert [accepted for _, accepted in done.cycles] == [0, 2, 0, 3]
    assert done.tokens == 8


def test_the_prior_is_how_often_each_cell_held() -> None:
    text = list(range(100))
    right = replay(task([*text, 200, 0], text[1:40]), CopyAcceptance(), floor=0.0, learn=False)
    wrong = replay(task([*text, 200, 0], [300]), CopyAcceptance(), floor=0.0, learn=False)
    table = prior([right] * 300 + [wrong] * 100)
    assert table.shape == np.array(PRIOR).shape
    # One token matched: right in 300 of 400. Longer ones: always right.
    assert table[0, Agreement.ONE] == pytest.approx(0.75, abs=0.01)
    assert table[3, Agreement.ONE] > 0.97
    # Cells without samples take over what the shorter match has.
    assert (table[:, Agreement.LESS] == 0.5).all()


def test_survival_error_is_zero_for_what_happens_as_often_as_it_was_said() -> None:
    certain = [[1.0] * len(Agreement)] * len(PRIOR)
    text = list(range(100))
    right = task([*text, 200, 0], text[1:34])
    seen = [replay(right, CopyAcceptance(certain), floor=0.0, learn=False)]
    assert survival_error(seen, 1) == survival_error(seen, 8) == 0.0
    wrong = replay(task([*text, 200, 0], [300]), CopyAcceptance(certain), floor=0.0, learn=False)
    assert survival_error([*seen, wrong], 1) > 0.3


def test_the_report_has_the_figures_and_a_table_that_can_be_pasted(repository: Path) -> None:
    text = report(copy_tasks(repository, encode, 5))
    assert "| rewrite |" in text
    rows = [line for line in text.splitlines() if line.startswith("(")]
    assert np.array([eval(row.rstrip(",")) for row in rows]).shape == np.array(PRIOR).shape


def test_a_folder_without_history_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="git rev-list failed"):
        copy_tasks(tmp_path, encode, 5)
