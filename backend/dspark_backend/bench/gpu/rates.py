"""How fast a GPU decodes: our engine beside its peers, and a model with random weights."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from dspark_backend.bench.decode import DecodeSettings, run_decode
from dspark_backend.bench.gpu.stages import Facts
from dspark_backend.bench.jsonl import shipped
from dspark_backend.bench.kernels import KernelsSettings, run_kernels
from dspark_backend.bench.lineup import Terms
from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.request import SamplingParams
from dspark_backend.sampling.device import DeviceVerifier
from dspark_backend.sampling.sampler import Sampler
from dspark_backend.sampling.verifier import Question
from dspark_backend.target.batch import Batch, Rows
from dspark_backend.target.device import DeviceDecoder, DeviceLayer, DeviceWeights
from dspark_backend.target.device_linear import DeviceLinear
from dspark_backend.target.protocol import Target

QWEN3_4B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
}
"""A 4B Qwen3-shaped model."""


def kernels(device: str, size: str) -> Facts:
    """``bench kernels``."""
    report = run_kernels(KernelsSettings(size=size, device=device))
    rows = [row.model_dump() for row in report.rows]
    return {"copy_bytes_per_s": report.copy_bytes_per_s, "dtype": report.dtype, "rows": rows}


def decoding(
    model: str, device: str, *, speculation: bool, limit: int, drafter: Path | None = None
) -> Facts:
    """``bench decode`` with transformers, and with our plain mode where speculation is on."""
    peers = ("transformers", "transformers-static", *(("plain",) if speculation else ()))
    settings = DecodeSettings(
        model=model,
        prompts=shipped("prompts", "code"),
        max_new_tokens=64,
        limit=limit,
        terms=Terms(
            precision="bf16", peers=peers, speculation=speculation, drafter=drafter, device=device
        ),
    )
    report = run_decode(settings)
    ours = report.totals
    rows = [
        {
            "who": "ours",
            "tok/s": ours.tok_per_s,
            "ttft_s": ours.ttft_s,
            "tokens a pass": ours.accepted_length,
            "ours/theirs": None,
        }
    ]
    for name, peer in report.peers.items():
        rows.append(
            {
                "who": name,
                "tok/s": peer.totals.tok_per_s,
                "ttft_s": peer.totals.ttft_s,
                "tokens a pass": peer.totals.accepted_length,
                "ours/theirs": peer.ratio_tok_per_s,
            }
        )
    return {"model": model, "speculation": report.speculation, "prompts": limit, "rows": rows}


def random_decoder(
    config: TargetConfig, dtype: torch.dtype, max_positions: int, device: torch.device
) -> DeviceDecoder:
    """A decoder of that shape whose weights are noise: as fast as a trained one."""
    noise = torch.Generator(device).manual_seed(0)

    def matrix(out: int, width: int) -> Tensor:
        values = torch.empty(out, width, dtype=dtype, device=device)
        return values.normal_(0.0, width**-0.5, generator=noise)

    def norm(width: int) -> Tensor:
        return torch.ones(width, device=device)

    hidden, inner, width = config.hidden_size, config.intermediate_size, config.head_dim
    queries, normed = config.num_heads * width, config.family == "qwen3"
    layers = [
        DeviceLayer(
            input_norm=norm(hidden),
            qkv=DeviceLinear(matrix(queries + 2 * config.num_kv_heads * width, hidden), None),
            q_norm=norm(width) if normed else None,
            k_norm=norm(width) if normed else None,
            output=DeviceLinear(matrix(hidden, queries), None),
            post_norm=norm(hidden),
            gate_up=DeviceLinear(matrix(2 * inner, hidden), None),
            down=DeviceLinear(matrix(hidden, inner), None),
        )
        for _ in range(config.num_layers)
    ]
    embedding = matrix(config.vocab_size, hidden)
    tied = config.tie_word_embeddings
    head = DeviceLinear(embedding if tied else matrix(config.vocab_size, hidden), None)
    return DeviceDecoder(
        config, DeviceWeights(embedding, layers, norm(hidden), head), max_positions
    )


def plain_rate(target: Target, tokens: int, read_bytes: int, copy_bytes_per_s: float) -> Facts:
    """Greedy decoding at batch 1, a pass and a verdict a token; ``share_of_bandwidth`` is how much
    of a copy's bandwidth reading ``read_bytes`` of weights once a token comes to."""
    room = (tokens + 64) * target.kv_shape.bytes_per_token
    kv = target.storage(None, room).new()
    kv.reserve(tokens + 1)
    verifier, token = DeviceVerifier(), 1
    sampler = Sampler(SamplingParams(), [token], target.config.vocab_size)
    seconds = []
    for _ in range(tokens):
        began = time.perf_counter()
        logits = target.forward(Batch([Rows(kv, (token,), 1)])).logits
        (answer,) = verifier.ask(logits, [Question(sampler)])
        token = answer().next_token
        kv.length += 1
        seconds.append(time.perf_counter() - began)
    after_warming = sorted(seconds[len(seconds) // 4 :])
    usual = after_warming[len(after_warming) // 2]
    return {"tok_per_s": 1 / usual, "share_of_bandwidth": read_bytes / usual / copy_bytes_per_s}


def weight_bytes(decoder: DeviceDecoder) -> int:
    """Bytes of the matrices that a pass reads; of the embedding it reads a row."""
    linears = [decoder.weights.head]
    for layer in decoder.weights.layers:
        linears += [layer.qkv, layer.output, layer.gate_up, layer.down]
    return sum(linear.weight.nbytes for linear in linears)


def host_gaps(target: Target, device: torch.device, passes: int) -> Facts:
    """The share of steady passes in which the device runs no kernel, by torch's profiler."""
    room = (passes + 80) * target.kv_shape.bytes_per_token
    kv = target.storage(None, room).new()
    kv.reserve(passes + 9)
    batch = Batch([Rows(kv, (1,), 1)])
    for _ in range(8):
        target.forward(batch)
        kv.length += 1
    target.wait()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
    began = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(passes):
            target.forward(batch)
            kv.length += 1
        target.wait()
        wall_s = time.perf_counter() - began
    busy_s = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6
    return {"passes": passes, "wall_s": wall_s, "busy_s": busy_s, "gap_share": 1 - busy_s / wall_s}
