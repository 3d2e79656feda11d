"""Fixtures of a device: a model of one layer, served synchronously and ahead of the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dspark_backend.catalog import ModelFiles, resolve
from dspark_backend.engine import Engine
from dspark_backend.parts import device_parts
from dspark_backend.scheduler import Limits
from running_ahead import DEVICE, Watched, ahead_engine


@pytest.fixture(scope="module")
def files(tiny_checkpoint: Callable[..., Path]) -> ModelFiles:
    return resolve(str(tiny_checkpoint("qwen3", num_hidden_layers=1)))


@pytest.fixture(scope="module")
def synchronous(files: ModelFiles) -> Iterator[Engine]:
    parts = device_parts(files, "fp32", 256, None, DEVICE)
    with Engine(files, parts, 1, 2**21, Limits()) as engine:
        yield engine


@pytest.fixture(scope="module")
def shared(files: ModelFiles) -> Iterator[tuple[Engine, Watched]]:
    engine, watched = ahead_engine(files)
    with engine:
        yield engine, watched
    assert engine.kv_used_bytes == 0


@pytest.fixture
def ahead(shared: tuple[Engine, Watched]) -> tuple[Engine, Watched]:
    engine, watched = shared
    watched.asked.clear()
    watched.at_launch = lambda number: None
    return engine, watched
