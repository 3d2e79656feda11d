"""The Pareto benchmark with drafters from disk, a second one of a single token among them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dspark_backend.bench.lineup import Terms
from dspark_backend.bench.pareto import ParetoSettings, run_pareto
from dspark_backend.drafter.checkpoint import Storage, write_drafter

MakeDrafter = Callable[..., Any]
TRACE = {
    "name": "talk",
    "steps": [
        {
            "messages": [{"role": "user", "content": "Hello"}],
            "tool_choice": "none",
            "max_new_tokens": 16,
        }
    ],
}


def test_drafters_of_two_sizes_compete_and_change_no_token(
    make_drafter: MakeDrafter, tmp_path: Path
) -> None:
    folders = {}
    for size in (3, 1):
        random = make_drafter("qwen2", block_size=size)
        folders[size] = tmp_path / str(size)
        write_drafter(folders[size], random.config, random.state, random.d2t, storage=Storage.INT8)
    trace = tmp_path / "talk.jsonl"
    trace.write_text(json.dumps(TRACE) + "\n")
    report = run_pareto(
        ParetoSettings(
            model=str(random.target_folder),
            traces=(trace,),
            contenders=("fixed", "step_aware"),
            concurrency=(1, 2),
            rounds=1,
            mtp=folders[1],
            terms=Terms(speculation=True, drafter=folders[3], threads=1),
        )
    )
    assert list(report.contenders) == ["plain", "fixed", "step_aware", "mtp"]
    for name, contender in report.contenders.items():
        assert all(point.same_tokens for point in contender.points)
        foreseen = [point.prediction_error for point in contender.points]
        assert (foreseen == [None, None]) is (name == "plain")
    # noise is accepted by chance only: a pass verifies what its drafter drafts, and keeps little
    for name, most in (("plain", 1.0), ("mtp", 2.0), ("fixed", 4.0)):
        for point in report.contenders[name].points:
            assert point.accepted_length is not None
            assert 1.0 <= point.accepted_length <= most
    assert {lead.over for lead in report.leads} == {"plain", "fixed", "mtp", "best fixed"}
