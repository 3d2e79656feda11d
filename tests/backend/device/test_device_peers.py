"""Who may stand beside us on a GPU, and that a static cache writes what a growing one does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dspark_backend.bench.contender import ContenderSpec, Turn
from dspark_backend.bench.errors import BenchError
from dspark_backend.bench.host import gpu_facts, host_facts
from dspark_backend.bench.lineup import Terms
from dspark_backend.bench.peers.transformers import StaticTransformersPeer, TransformersPeer
from dspark_backend.errors import DeviceError


def test_a_static_cache_writes_what_a_growing_one_writes(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    folder = tiny_checkpoint("qwen3")
    spec = ContenderSpec(
        model=str(folder),
        folder=folder,
        gguf=None,
        dialect="hermes",
        end_token_ids=(2, 0),
        precision=None,
        threads=1,
        max_context=64,
    )
    turns = [Turn(tokens=tuple(range(5, 5 + n)), max_new_tokens=6) for n in (9, 20, 4)]
    written = []
    for kind in (TransformersPeer, StaticTransformersPeer):
        peer = kind(spec)
        texts = []
        for turn in turns:
            peer.start()
            texts.append(peer.turn(turn).token_ids)
        peer.close()
        written.append(texts)
    assert written[0] == written[1]


def test_peers_are_named_where_they_run() -> None:
    with pytest.raises(BenchError, match="transformers-static' runs on a GPU: name it"):
        Terms(peers=("transformers-static",))
    if torch.cuda.is_available():
        with pytest.raises(BenchError, match="llama-cpp' runs on the CPU only"):
            Terms(peers=("llama-cpp",), device="cuda")
        assert host_facts("cuda").gpu == gpu_facts("cuda") is not None
    else:
        with pytest.raises(DeviceError, match="device 'cuda'"):
            Terms(device="cuda")
        with pytest.raises(DeviceError, match="device 'cuda'"):
            host_facts("cuda")
    assert host_facts().gpu is None
