"""Compiled kernels on disk: kept for the next process, and never older than their source."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import dspark_backend
from dspark_backend.kernels.jit import cache_folder

GATE = """
import numpy as np
from dspark_backend.kernels.swiglu.cpu import silu_mul
out = np.empty((1, 1), np.float32)
silu_mul(np.ones((1, 2), np.float32), out)
print(float(out[0, 0]), sum(silu_mul.stats.cache_hits.values()))
"""


def test_a_kernel_is_compiled_anew_when_one_that_it_calls_has_changed(tmp_path: Path) -> None:
    package = tmp_path / "dspark_backend"
    ignored = shutil.ignore_patterns("__pycache__", "drafters", "traces")
    shutil.copytree(Path(dspark_backend.__file__).parent, package, ignore=ignored)

    def gate() -> tuple[float, int]:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        environment.pop("NUMBA_CACHE_DIR", None)
        done = subprocess.run(
            [sys.executable, "-c", GATE], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        value, hits = done.stdout.split()
        return float(value), int(hits)

    first, hits = gate()
    assert abs(first - 0.7310586) < 1e-6
    assert hits == 0
    assert gate() == (first, 1)
    called = package / "kernels" / "exponential.py"
    source = called.read_text()
    assert source.count("return p * np.int32") == 1
    called.write_text(source.replace("return p * np.int32", "return p + np.int32"))
    changed, hits = gate()
    assert changed != first
    assert hits == 0


def test_folders_of_other_states_go_after_a_day(tmp_path: Path) -> None:
    sources, base = tmp_path / "sources", tmp_path / "cache"
    sources.mkdir()
    (sources / "a.py").write_text("1")
    own = cache_folder(sources, base)
    assert cache_folder(sources, base) == own
    (sources / "a.py").write_text("2")
    later = cache_folder(sources, base)
    assert later != own
    for folder in (own, later, base / "kernels-yesterday"):
        folder.mkdir(parents=True)
    old = time.time() - 90_000
    for folder in (later, base / "kernels-yesterday"):
        os.utime(folder, (old, old))
    assert cache_folder(sources, base) == later
    assert sorted(path.name for path in base.iterdir()) == sorted([own.name, later.name])
