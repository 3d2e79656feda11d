"""Contenders in processes of their own."""

from __future__ import annotations

import signal
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspark_backend.bench.contender import ContenderSpec, Turn
from dspark_backend.bench.errors import BenchError
from dspark_backend.bench.worker import Worker

FAKES = """
import os
import time
from dspark_backend.bench.contender import Loaded, Sample
from dspark_backend.errors import ModelFormatError
from dspark_backend.metrics import EngineMetrics


class Echo:
    def __init__(self, spec):
        self.loaded = Loaded(precision="fake", load_s=0.0)
        self.log = []

    def start(self):
        self.log = []

    def turn(self, turn):
        if turn.seed == 1:
            raise ModelFormatError("a planned error")
        if turn.seed == 2:
            raise ZeroDivisionError("a bug")
        if turn.seed == 3:
            os._exit(9)
        if turn.seed == 4:
            time.sleep(3600)
        self.log += turn.tokens
        return Sample(tuple(self.log), "text", 0.25, 1.0, EngineMetrics(cycles=1))

    def close(self):
        pass


def missing(spec):
    raise ModelFormatError("the weights are not there")
"""
SPEC = ContenderSpec(
    model="fake",
    folder=Path("nowhere"),
    gguf=None,
    dialect="hermes",
    end_token_ids=(0,),
    precision=None,
    threads=1,
    max_context=256,
)


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bench_fakes.py").write_text(textwrap.dedent(FAKES), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def worker(fakes: None) -> Iterator[Worker]:
    with Worker("echo", "bench_fakes:Echo", SPEC) as worker:
        yield worker


def test_turns_go_over_and_samples_come_back(worker: Worker) -> None:
    assert worker.loaded.precision == "fake"
    assert worker.turn(Turn((1, 2), 4)).token_ids == (1, 2)
    assert worker.turn(Turn((3,), 4)).token_ids == (1, 2, 3)
    worker.start()
    sample = worker.turn(Turn((4, 5, 6), 4))
    assert sample.token_ids == (4, 5, 6)
    assert sample.decode_s == 0.75
    assert sample.tok_per_s == pytest.approx(2 / 0.75)
    assert worker.peak_rss_bytes() > 1 << 20


def test_a_failed_turn_is_an_error_and_the_worker_goes_on(worker: Worker) -> None:
    with pytest.raises(BenchError, match=r"echo: a planned error$"):
        worker.turn(Turn((1,), 4, seed=1))
    with pytest.raises(BenchError, match="ZeroDivisionError: a bug"):
        worker.turn(Turn((1,), 4, seed=2))
    assert worker.turn(Turn((1,), 4)).token_ids == (1,)


def test_a_process_that_dies_is_an_error(worker: Worker) -> None:
    with pytest.raises(BenchError, match="ended with code 9"):
        worker.turn(Turn((1,), 4, seed=3))
    with pytest.raises(BenchError, match="ended with code 9"):
        worker.start()


def test_a_contender_that_cannot_load_says_why(fakes: None) -> None:
    with pytest.raises(BenchError, match=r"gone: the weights are not there$"):
        Worker("gone", "bench_fakes:missing", SPEC)


def test_nobody_waits_for_a_turn_after_an_interrupt(fakes: None) -> None:
    worker = Worker("slow", "bench_fakes:Echo", SPEC).__enter__()
    worker._conn.send(("turn", (Turn((1,), 4, seed=4),)))
    worker.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert worker._process.exitcode == -signal.SIGKILL
