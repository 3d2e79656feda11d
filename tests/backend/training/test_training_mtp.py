"""A drafter of a single token, trained by the recipe and held against others by the benchmark."""

from __future__ import annotations

import json
from pathlib import Path

from dspark_backend.bench.lineup import Terms
from dspark_backend.bench.pareto import ParetoSettings, run_pareto
from dspark_backend.catalog import ModelFiles
from dspark_backend.training.recipe import TrainConfig, train
from dspark_backend.training.rollout import RolloutConfig
from dspark_backend.training.trainer import TrainerConfig


def message(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Count to {number}"}]


def test_a_trained_mtp_1_takes_part_in_pareto(tiny_files: ModelFiles, tmp_path: Path) -> None:
    prompts, trace = tmp_path / "prompts.jsonl", tmp_path / "count.jsonl"
    prompts.write_text("\n".join(json.dumps({"messages": message(i)}) for i in range(40)))
    runs = [
        {
            "name": str(i),
            "steps": [{"messages": message(i), "tool_choice": "none", "max_new_tokens": 30}],
        }
        for i in range(4)
    ]
    trace.write_text("\n".join(map(json.dumps, runs)))
    train(
        TrainConfig(
            model=str(tiny_files.folder),
            prompts=prompts,
            out=tmp_path / "run",
            block_size=1,
            rank=8,
            draft_vocab=400,
            held_out=0.2,
            answer_tokens=800,
            held_out_tokens=150,
            rollout=RolloutConfig(temperature=0.0, max_answer_tokens=40, sessions=8),
            trainer=TrainerConfig(steps=60, sequences=4, anchors=20, peak_rate=1e-2, bf16=False),
            precision="int8x16",
            threads=1,
        )
    )
    drafter = tmp_path / "run" / "drafter"
    report = run_pareto(
        ParetoSettings(
            model=str(tiny_files.folder),
            traces=(trace,),
            contenders=("step_aware:drafts",),
            concurrency=(1, 2),
            rounds=1,
            mtp=drafter,
            terms=Terms(speculation=True, drafter=drafter, precision="int8x16", threads=1),
        )
    )
    for contender in report.contenders.values():
        assert all(point.same_tokens for point in contender.points)
    for point in report.contenders["mtp"].points:
        assert point.accepted_length is not None
        assert 1.1 < point.accepted_length <= 2.0
    assert {lead.over for lead in report.leads} == {"plain", "mtp"}
