"""Measuring: the arithmetic on a made-up machine, the structure on a real tiny model."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark_backend import cost_measure
from dspark_backend.catalog.files import ModelFiles, folder_identity, open_checkpoint
from dspark_backend.catalog.home import HOME_VARIABLE
from dspark_backend.cost_measure import (
    ANCHORS,
    COMMITTED,
    ROWS,
    attention_slopes,
    kept_or_measured,
    measure,
    repeated,
)
from dspark_backend.drafter.checkpoint import write_drafter
from dspark_backend.drafter.config import DrafterConfig, HeadType
from dspark_backend.drafter.drafter import DSparkDrafter
from dspark_backend.drafter.layout import trained_shapes
from dspark_backend.engine import Engine
from dspark_backend.errors import RequestError
from dspark_backend.kv.contiguous import SequenceKV
from dspark_backend.request import StepRequest
from dspark_backend.speculation.cost import CostModel
from dspark_backend.speculation.cost_store import conditions_here, cost_file, read_kept
from dspark_backend.speculation.cost_table import CostTable
from dspark_backend.speculation.protocol import Anchor, Proposal
from dspark_backend.target.batch import Batch
from dspark_backend.target.decoder import Decoder
from dspark_backend.target.load import load_decoder
from dspark_backend.target.precision import Precision
from dspark_backend.target.protocol import Pass


class Machine:
    """A clock that passes and drafts move on by what ``cost`` says that they take."""

    def __init__(self, cost: Callable[[], float] = lambda: 0.0) -> None:
        self.now = 0.0
        self.noise = cost

    def clock(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds * (1.0 + self.noise())

    def timed(self, task: Callable[[], object]) -> float:
        started = self.now
        task()
        return self.now - started


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    return tmp_path / "home"


@dataclass(frozen=True)
class Drafted:
    """A tiny target and a random drafter for it, on disk."""

    target: Path
    folder: Path
    files: ModelFiles

    def decoder(self) -> Decoder:
        return load_decoder(self.files, Precision.INT8X16, 512)


@pytest.fixture
def drafted(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Drafted:
    target = tiny_checkpoint("qwen3")
    files = open_checkpoint("tiny", target)
    config = DrafterConfig.for_target(
        files.config,
        num_layers=1,
        block_size=3,
        mask_token_id=1,
        target_layer_ids=(-1, 0),
        head=HeadType("vanilla"),
        markov_rank=8,
        confidence=True,
        draft_vocab_size=None,
    )
    generator = torch.Generator().manual_seed(0)
    state = {
        name: 0.1 * torch.randn(shape, generator=generator)
        for name, shape in trained_shapes(config).items()
    }
    write_drafter(tmp_path / "drafter", config, state, None)
    return Drafted(target, tmp_path / "drafter", files)


# -- repetitions -------------------------------------------------------------------------------


def test_repetitions_stop_with_the_budget() -> None:
    machine = Machine()
    counts = {"a": 0, "b": 0}

    def task(name: str) -> None:
        counts[name] += 1
        machine.spend(0.1)

    tasks = {name: partial(task, name) for name in counts}
    taken = repeated(tasks, machine.timed, 1.0, machine.clock)
    assert counts == {"a": 5, "b": 5}
    assert machine.now <= 1.0 + 1e-9
    assert taken == {"a": pytest.approx(0.1), "b": pytest.approx(0.1)}


@pytest.mark.parametrize(
    ("a_round", "rounds"), [(0.9, 2), (0.6, 2), (0.5, 2), (0.3, 3), (1.1, 1), (9.0, 1)]
)
def test_no_load_waits_for_more_than_twice_the_budget_or_one_round(
    a_round: float, rounds: int
) -> None:
    machine = Machine()
    calls: list[float] = []
    tasks = {"slow": lambda: calls.append(machine.now) or machine.spend(a_round)}
    assert repeated(tasks, machine.timed, 1.0, machine.clock) == {"slow": pytest.approx(a_round)}
    assert len(calls) == rounds
    assert machine.now <= max(2.0, a_round)


def test_quick_tasks_do_not_go_on_for_ever() -> None:
    machine = Machine()
    calls: list[float] = []
    tasks = {"quick": lambda: calls.append(machine.now) or machine.spend(1e-6)}
    repeated(tasks, machine.timed, 10.0, machine.clock)
    assert len(calls) == 12


def test_a_spell_that_spoils_half_of_the_rounds_is_left_out() -> None:
    machine = Machine()
    machine.noise = lambda: 2.0 if machine.now < 6.0 else 0.0
    tasks = {"a": lambda: machine.spend(0.5), "b": lambda: machine.spend(0.25)}
    taken = repeated(tasks, machine.timed, 12.0, machine.clock)
    assert taken == {"a": pytest.approx(0.5), "b": pytest.approx(0.25)}


@pytest.mark.parametrize(
    ("one", "several", "expected"),
    [
        (3e-6, 17e-6, (1e-6, 2e-6)),  # 1 + 2 and 1 + 8 * 2
        (2e-6, 2e-6, (2e-6, 0.0)),
        (4e-6, 2e-6, (3e-6, 0.0)),
        (1e-6, 10e-6, (0.0, 81e-6 / 65)),
        (-1e-6, -2e-6, (0.0, 0.0)),
        (-1e-6, 8e-6, (0.0, 63e-6 / 65)),
    ],
)
def test_slopes_of_attention(one: float, several: float, expected: tuple[float, float]) -> None:
    assert attention_slopes(one, several, 8) == pytest.approx(expected)


# -- a model -----------------------------------------------------------------------------------


@pytest.fixture
def decoder(tiny_checkpoint: Callable[..., Path]) -> Decoder:
    folder = tiny_checkpoint("qwen3", max_position_embeddings=4096)
    return load_decoder(open_checkpoint("tiny", folder), Precision.INT8, 4096)


def a_pass(batch: Batch) -> float:
    """What a pass costs on the made-up machine: jagged in rows, plus requests, plus attention."""
    before = sum(rows.kv.length for rows in batch.sequences)
    pairs = sum(rows.kv.length * len(rows.tokens) for rows in batch.sequences)
    tiles = -(-batch.rows // 4)
    return 0.02 + 0.003 * tiles + 5e-4 * len(batch.sequences) + 2e-7 * before + 3e-8 * pairs


def on_a_made_up_machine(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, noise: float = 0.0
) -> CostTable:
    source = random.Random(5)
    machine = Machine(lambda: noise * abs(source.gauss(0.0, 1.0)))
    monkeypatch.setattr(decoder, "forward", lambda batch, taps=(): machine.spend(a_pass(batch)))
    return measure(decoder, None, 1, clock=machine.clock, budget_s=10.0)


def test_the_table_predicts_passes_that_were_not_measured(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CostModel(on_a_made_up_machine(decoder, monkeypatch))
    for tiles, requests, length in [
        (1, 1, 0),
        (1, 4, 700),
        (4, 1, 1500),
        (2, 4, 100),
        (16, 16, 900),
    ]:
        rows, context = 4 * tiles, requests * length
        wanted = 0.02 + 0.003 * tiles + 5e-4 * requests + 2e-7 * context + 3e-8 * rows * length
        assert model.verify_s(rows, requests, context) == pytest.approx(wanted, rel=1e-6)


def test_noise_of_the_machine_hardly_reaches_the_table(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = on_a_made_up_machine(decoder, monkeypatch)
    noisy = on_a_made_up_machine(decoder, monkeypatch, noise=0.1)
    assert noisy.verify_s == pytest.approx(quiet.verify_s, rel=0.15)


def test_drafting_costs_the_call_and_what_it_reads_before(
    drafted: Drafted, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, machine = drafted.decoder(), Machine()
    drafter = DSparkDrafter.load(drafted.folder, drafted.files, 512)
    read: list[int] = []

    def extend(context: SequenceKV, features: torch.Tensor) -> None:
        assert features.shape[1] == len(drafter.taps) * decoder.config.hidden_size
        read.append(len(features))
        context.length += len(features)
        machine.spend(1e-3 * len(features))

    def propose(anchors: Sequence[Anchor]) -> list[Proposal]:
        assert {anchor.context.length for anchor in anchors} == {256}
        machine.spend(3e-3 + 1e-4 * len(anchors))
        return []

    def forward(batch: Batch, taps: Sequence[int] = ()) -> Pass:
        machine.spend(a_pass(batch))
        width = len(taps) * decoder.config.hidden_size
        return Pass(torch.empty(0, 0), torch.zeros(batch.rows, width))

    monkeypatch.setattr(decoder, "forward", forward)
    monkeypatch.setattr(drafter, "extend", extend)
    monkeypatch.setattr(drafter, "propose", propose)
    table = measure(decoder, drafter, 1, clock=machine.clock, budget_s=10.0)
    assert set(read) == {COMMITTED}
    assert table.anchors == ANCHORS
    expected = [3e-3 + n * (1e-4 + 1e-3 * COMMITTED) for n in ANCHORS]
    assert table.draft_s == pytest.approx(expected)


def test_a_real_model_has_a_whole_table(drafted: Drafted) -> None:
    decoder = drafted.decoder()
    drafter = DSparkDrafter.load(drafted.folder, drafted.files, 512)
    threads = torch.get_num_threads()
    table = measure(decoder, drafter, 1, budget_s=0.2)
    assert torch.get_num_threads() == threads
    assert table.rows == ROWS
    assert table.anchors == ANCHORS
    assert table.context == 256
    assert table.conditions is None
    for value in (*table.verify_s, *table.draft_s):
        assert math.isfinite(value)
        assert value > 0.0
    assert min(table.request_s, table.position_s, table.pair_s) >= 0.0
    assert measure(decoder, None, 1, budget_s=0.1).anchors == ()


@pytest.mark.parametrize("room", [1, 2, 9, 64, 200])
def test_a_short_context_has_room_for_fewer_rows(
    room: int, tiny_checkpoint: Callable[..., Path]
) -> None:
    decoder = load_decoder(open_checkpoint("tiny", tiny_checkpoint("llama")), Precision.BF16, room)
    table = measure(decoder, None, 1, budget_s=0.1)
    assert table.rows[0] == 1
    assert table.rows[-1] + table.context <= room
    assert CostModel(table).verify_s(64, 4, 4) > 0.0


# -- kept --------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the threads of every measurement."""
    taken: list[int] = []

    def measuring(decoder: Decoder, drafter: Any, threads: int, **rest: Any) -> CostTable:
        taken.append(threads)
        return measure(decoder, drafter, threads, **(rest | {"budget_s": 0.0}))

    monkeypatch.setattr(cost_measure, "measure", measuring)
    # Passes of tiny models take so little that the machine's noise is most of it.
    monkeypatch.setattr(CostTable, "disturbed", property(lambda table: False))
    return taken


def test_a_machine_is_measured_once(drafted: Drafted, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = counted(monkeypatch)
    decoder = drafted.decoder()
    conditions = conditions_here(drafted.files.source_sha, "int8x16", 1)
    first = kept_or_measured(decoder, None, conditions)
    assert kept_or_measured(decoder, None, conditions).table == first.table
    assert first.table.conditions == conditions
    assert taken == [1]
    cost_file(conditions).write_text("{")
    assert kept_or_measured(decoder, None, conditions).table.conditions == conditions
    assert taken == [1, 1]
    assert read_kept(conditions) is not None


def test_an_engine_that_speculates_knows_its_cost(
    drafted: Drafted, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = counted(monkeypatch)
    target, folder = drafted.target, drafted.folder
    with Engine.load(target, threads=1, speculation=False) as plain:
        assert plain.cost is None
    assert taken == []
    with Engine.load(target, threads=1, drafter=folder) as engine:
        assert engine.cost is not None
        table = engine.cost.table
        with engine.open_session() as session:
            outcome = engine.step(session, StepRequest((5, 6, 7), 20, ignore_eos=True))
        assert len(outcome.token_ids) == 20
    assert table.conditions is not None
    assert table.conditions.drafter == folder_identity(folder)
    assert (table.conditions.threads, table.conditions.precision) == (1, "int8x16")
    assert table.draft_s
    with Engine.load(target, threads=1, drafter=folder) as again:
        assert again.cost is not None
        assert again.cost.table == table
    assert taken == [1]


def test_an_unwritable_cache_does_not_keep_an_engine_from_loading(
    drafted: Drafted,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    counted(monkeypatch)
    drafted.decoder()  # the int8 weights are there already
    (cache / "cost").write_text("a file where a folder should be")
    with (
        caplog.at_level(logging.WARNING),
        Engine.load(drafted.target, threads=1, drafter=drafted.folder) as engine,
    ):
        assert engine.cost is not None
    assert "cannot be kept" in caplog.text


def test_a_given_cost_is_used_unless_it_is_another_machines(
    drafted: Drafted, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = counted(monkeypatch)
    target, folder = drafted.target, drafted.folder
    curve = CostTable(rows=(1, 8), verify_s=(0.01, 0.02))
    with Engine.load(target, threads=1, drafter=folder, cost=CostModel(curve)) as engine:
        assert engine.cost is not None
        assert engine.cost.table is curve
    with Engine.load(target, threads=1, cost=CostModel(curve)) as plain:
        assert plain.cost is not None
    conditions = conditions_here(drafted.files.source_sha, "int8x16", 2)
    foreign = CostModel(curve.model_copy(update={"conditions": conditions}))
    with pytest.raises(RequestError, match="threads 2 instead of 1"):
        Engine.load(target, threads=1, cost=foreign)
    assert taken == []


def test_a_table_that_drifted_for_long_is_dropped_when_the_engine_closes(
    drafted: Drafted, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted(monkeypatch)
    with Engine.load(drafted.target, threads=1, drafter=drafted.folder) as engine:
        cost = engine.cost
        assert cost is not None
        first = cost.table
        wanted = 3 * cost.verify_s(1, 1, 256)
        for _ in range(200):
            cost.observe(1, 1, 256, 0, wanted, 0.0)
    assert first.conditions is not None
    assert read_kept(first.conditions) is None
