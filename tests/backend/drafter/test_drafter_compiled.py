"""After a load no kernel is left to compile."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dspark_backend.drafter.checkpoint import Storage, write_drafter

# A process of its own: what other tests ran is compiled here already. A kernel that is read from
# the disk counts like one that is compiled.
PROGRAM = """
import gc, json, sys
from numba.core.registry import CPUDispatcher
from dspark_backend.engine import Engine
from dspark_backend.request import StepRequest
from dspark_backend.speculation.cost import CostModel
from dspark_backend.speculation.cost_table import CostTable
from dspark_backend.speculation.policies import Fixed

def compiled():
    return {
        f"{each.py_func.__module__}.{each.py_func.__name__} {signature}"
        for each in gc.get_objects() if isinstance(each, CPUDispatcher)
        for signature in each.signatures
    }

# Cost that is known: measuring it would run everything, too.
cost = CostModel(CostTable(
    context=64, rows=(1, 8, 64), verify_s=(1e-2, 1.01e-2, 1.1e-2),
    request_s=0.0, position_s=0.0, pair_s=0.0, anchors=(1, 8), draft_s=(1e-5, 1e-5),
))
target, drafter = sys.argv[1:]
with Engine.load(target, drafter=drafter, threads=1, cost=cost, policy=Fixed(5)) as engine:
    before = compiled()
    step = StepRequest(tuple(range(5, 90)) * 2, 20, ignore_eos=True)
    with engine.open_session("agent") as first, engine.open_session("agent") as second:
        outcomes = [engine.step(first, step), engine.step(second, step)]
    proposed = outcomes[0].metrics.proposed
    json.dump({"before": len(before), "late": sorted(compiled() - before), **proposed}, sys.stdout)
"""


def test_a_step_compiles_nothing(make_drafter: Callable[..., Any], tmp_path: Path) -> None:
    random = make_drafter("qwen3")
    folder = tmp_path / "drafter"
    write_drafter(folder, random.config, random.state, random.d2t, storage=Storage.INT8)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(random.target_folder), str(folder)],
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["before"] > 0
    assert found["copy"] > 0
    assert found["dspark"] > 0
    assert found["late"] == []
