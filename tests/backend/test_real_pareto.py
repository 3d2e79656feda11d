"""The Pareto benchmark on the real small model with the drafter that ships."""

from __future__ import annotations

import pytest

from dspark_backend.bench.jsonl import shipped
from dspark_backend.bench.lineup import Terms
from dspark_backend.bench.pareto import ParetoSettings, run_pareto

pytestmark = pytest.mark.real_model


def test_agents_at_once_write_what_plain_decoding_writes_in_fewer_passes() -> None:
    settings = ParetoSettings(
        model="smollm2-135m",
        traces=(shipped("traces", "tool-use"),),
        contenders=("fixed", "step_aware"),
        concurrency=(2,),
        rounds=1,
        limit=1,
        terms=Terms(speculation=True, threads=1),
    )
    report = run_pareto(settings)
    points = {name: each.points[0] for name, each in report.contenders.items()}
    assert all(point.same_tokens for point in points.values())
    plain = points["plain"].accepted_length
    assert plain is not None
    for name in ("fixed", "step_aware"):
        length = points[name].accepted_length
        assert length is not None
        assert length > plain
        assert points[name].prediction_error is not None
