"""``dspark-agent eval`` without the terminal: a drafter's figures on a file of prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from dspark_backend.catalog import ModelFiles, resolve
from dspark_backend.drafter.checkpoint import DrafterFiles, open_drafter
from dspark_backend.drafter.layout import EMBEDDING, LM_HEAD
from dspark_backend.drafter.model import DraftModel
from dspark_backend.engine import Engine
from dspark_backend.kernels.jit import default_threads
from dspark_backend.scheduler import Limits
from dspark_backend.target.precision import Precision, default_precision
from dspark_backend.training.drafter_check import placement
from dspark_backend.training.evaluate import Evaluation, evaluate, replay_all
from dspark_backend.training.features import DecoderFeatures, FeatureMemory
from dspark_backend.training.prompts import ordered, read_prompts, split
from dspark_backend.training.rollout import ReportSink as RolloutSink
from dspark_backend.training.rollout import RolloutConfig, read_rollouts, roll_out

_MEMORY_BYTES = 2**30
_CHECKED_ROLLOUTS = 4


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """``held_out`` is the share of the prompts that training holds out: only those are looked at;
    1.0 looks at all. ``answer_tokens`` are rolled out at each temperature, into ``work``, where a
    later run finds them."""

    model: str
    drafter: Path
    prompts: Path
    work: Path
    held_out: float = 0.05
    first_sources: tuple[str, ...] = ()
    answer_tokens: int = 20_000
    temperatures: tuple[float, ...] = (0.0, 1.0)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    precision: str | None = None
    threads: int | None = None


class EvalReport(BaseModel):
    """``by_temperature``: greedy at 0, coupled sampling above. ``complaint`` is what the
    acceptance self-check found wrong, None for nothing."""

    model_config = ConfigDict(frozen=True)

    model: str
    drafter: str
    prompts: str
    precision: str
    by_temperature: dict[str, Evaluation]
    complaint: str | None


def run_eval(
    config: EvalConfig,
    on_stage: Callable[[str], None] | None = None,
    on_rollout: RolloutSink | None = None,
) -> EvalReport:
    """Roll the prompts out, replay decoding with the drafter, and count.

    Raises:
        ModelFormatError: a damaged drafter, or one for another target.
        TrainingError: prompts that cannot be used.
    """
    files = resolve(config.model)
    drafter = open_drafter(config.drafter, files.config)
    precision = (
        default_precision(files.name)
        if config.precision is None
        else Precision.parse(config.precision)
    )
    paths = _roll_out(config, files, precision, on_stage, on_rollout)
    model = load_model(drafter, files, _longest(config))
    threads = default_threads() if config.threads is None else config.threads
    torch.set_num_threads(threads)
    decoder = DecoderFeatures(
        files, precision, drafter.config.target_layer_ids, drafter.d2t, _longest(config), threads
    )
    source = FeatureMemory(decoder, _MEMORY_BYTES)
    figures, complaint = {}, None
    for temperature, path in zip(config.temperatures, paths, strict=True):
        if on_stage is not None:
            on_stage(f"replay at temperature {temperature:g}")
        rollouts = list(read_rollouts(path))
        if complaint is None:
            checked = [source.example(rollout) for rollout in rollouts[:_CHECKED_ROLLOUTS]]
            complaint = placement(model, checked, drafter.d2t).complaint
        cycles = replay_all(model, source, rollouts, drafter.d2t)
        figures[f"{temperature:g}"] = evaluate(cycles, drafter.calibration)
    return EvalReport(
        model=files.name,
        drafter=str(config.drafter),
        prompts=str(config.prompts),
        precision=precision.value,
        by_temperature=figures,
        complaint=complaint,
    )


def load_model(drafter: DrafterFiles, target: ModelFiles, max_positions: int) -> DraftModel:
    """The drafter as a float32 torch module, with the target's frozen tensors."""
    store = target.tensors()
    embedding = store.get("model.embed_tokens.weight")
    head = embedding if target.config.tie_word_embeddings else store.get("lm_head.weight")
    rows = head if drafter.d2t is None else head[drafter.d2t]
    if drafter.has_target_copies:
        embedding, rows = drafter.get(EMBEDDING), drafter.get(LM_HEAD)
    size = drafter.config.block_size
    model = DraftModel(drafter.config, embedding.clone(), rows.float(), max_positions + size)
    model.load_state_dict(drafter.state())
    return model.eval()


def _roll_out(
    config: EvalConfig,
    files: ModelFiles,
    precision: Precision,
    on_stage: Callable[[str], None] | None,
    on_rollout: RolloutSink | None,
) -> list[Path]:
    prompts = read_prompts(config.prompts)
    held = prompts if config.held_out >= 1.0 else split(prompts, config.held_out)[1]
    paths = []
    with Engine.load(
        config.model,
        precision=precision.value,
        threads=config.threads,
        max_context=min(_longest(config), files.config.max_position_embeddings),
        limits=Limits(running=config.rollout.sessions),
    ) as engine:
        for temperature in config.temperatures:
            if on_stage is not None:
                on_stage(f"roll out at temperature {temperature:g}")
            path = config.work / f"{files.name.replace('/', '-')}-{temperature:g}.jsonl"
            sampling = RolloutConfig(
                temperature=temperature,
                max_prompt_tokens=config.rollout.max_prompt_tokens,
                max_answer_tokens=config.rollout.max_answer_tokens,
                sessions=config.rollout.sessions,
                constrained=config.rollout.constrained,
            )
            chosen = ordered(held, config.first_sources)
            roll_out(engine, chosen, path, sampling, on_rollout, config.answer_tokens)
            paths.append(path)
    return paths


def _longest(config: EvalConfig) -> int:
    return config.rollout.max_prompt_tokens + config.rollout.max_answer_tokens
