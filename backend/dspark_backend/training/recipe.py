"""A drafter for a model, from prompts to a calibrated checkpoint: one function, one folder.

The defaults are the recipe that DSPARK.md section 4 reports for a small target on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from dspark_backend.catalog import ModelFiles, resolve
from dspark_backend.drafter.checkpoint import DrafterFiles, Storage, open_drafter, write_drafter
from dspark_backend.drafter.config import DrafterConfig, HeadType
from dspark_backend.drafter.model import DraftModel
from dspark_backend.engine import Engine
from dspark_backend.kernels.jit import default_threads
from dspark_backend.scheduler import Limits
from dspark_backend.target.precision import Precision, default_precision
from dspark_backend.training.calibrate import calibrate
from dspark_backend.training.errors import TrainingError
from dspark_backend.training.evaluate import Evaluation, evaluate, replay_all
from dspark_backend.training.features import DecoderFeatures, FeatureMemory, FeatureSource
from dspark_backend.training.features_torch import TransformersFeatures
from dspark_backend.training.prompts import Prompt, in_share, ordered, read_prompts, split
from dspark_backend.training.rollout import ReportSink as RolloutSink
from dspark_backend.training.rollout import Rollout, RolloutConfig, read_rollouts, roll_out
from dspark_backend.training.trainer import ProgressSink, Trainer, TrainerConfig
from dspark_backend.training.vocabulary import draft_ids, draft_vocabulary, with_vocabulary
from dspark_backend.training.warm_start import warm_start


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """A run that makes ``out``: ``rollouts.jsonl``, ``held-out.jsonl``, ``state/``, ``drafter/``
    (the checkpoint with its calibration) and ``evaluation.json``.

    ``prompts`` is a JSON-lines file, of which the share ``held_out`` is only calibrated and
    reported on; prompts of ``first_sources`` are answered first; rollouts end after
    ``answer_tokens`` (``held_out_tokens``). ``recorded`` are files of rollouts from elsewhere,
    such as steps of agents (``training/recording.py``); the same share of them is held out.
    ``taps`` None spreads three over the target's depth, ``mask_token_id`` None takes an unused
    row, ``draft_vocab`` None keeps the whole vocabulary.
    ``start`` is the folder of a drafter to go on from, such as a shipped one that is to learn an
    agent's own steps: its shape, taps and vocabulary stay, and the fields for them are not read.
    ``widen`` adds tokens of the rollouts to that vocabulary until it has so many.
    ``device`` is where the drafter is trained; ``threads`` and ``precision`` are the engine's.
    """

    model: str
    prompts: Path
    out: Path
    layers: int = 2
    block_size: int = 5
    head: HeadType = HeadType.VANILLA
    rank: int = 64
    taps: tuple[int, ...] | None = None
    mask_token_id: int | None = None
    draft_vocab: int | None = 12_288
    held_out: float = 0.05
    first_sources: tuple[str, ...] = ()
    recorded: tuple[Path, ...] = ()
    start: Path | None = None
    widen: int | None = None
    answer_tokens: int = 200_000
    held_out_tokens: int = 20_000
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    trainer: TrainerConfig = field(
        default_factory=lambda: TrainerConfig(steps=1500, peak_rate=1e-3)
    )
    storage: Storage = Storage.BF16
    device: str = "cpu"
    precision: str | None = None
    threads: int | None = None
    feature_bytes: int = 4 * 2**30


@dataclass(frozen=True, slots=True)
class Watchers:
    """Who is told about what: rollouts, steps, and the names of the stages as they begin."""

    on_stage: Callable[[str], None] | None = None
    on_rollout: RolloutSink | None = None
    on_step: ProgressSink | None = None


def train(config: TrainConfig, watchers: Watchers | None = None) -> Evaluation:
    """Make a drafter; a run that was interrupted goes on where it stopped.

    Half of the held-out rollouts calibrate, the other half is what the returned figures are of.

    Raises:
        TrainingError: prompts, rollouts or settings that cannot be used.
        ModelFormatError: ``start`` is no drafter, or one for another target.
        BackendError: the model cannot be loaded, or a step died.
    """
    watch = watchers or Watchers()
    files = resolve(config.model)
    # Before hours of rollouts: a start that does not fit is known now.
    start = None if config.start is None else open_drafter(config.start, files.config)
    training, held = _rollouts(config, files, watch)
    if start is None:
        d2t = _vocabulary(config, files, training)
        drafter = drafter_config(config, files, training)
    else:
        d2t = _widened(config, files, training, start)
        drafter = replace(start.config, draft_vocab_size=None if d2t is None else len(d2t))
    device = torch.device(config.device)
    model = _model(config, files, drafter, d2t, start).to(device)
    source = FeatureMemory(_features(config, files, drafter, d2t, device), config.feature_bytes)
    ids = draft_ids(d2t, files.config.vocab_size)

    _stage(watch, "train")
    torch.set_num_threads(_threads(config))
    trainer = Trainer(
        model,
        training,
        source,
        model.lm_head,
        ids,
        config.trainer,
        config.out / "state",
        origin=None if start is None else start.digest(),
    )
    trainer.run(watch.on_step)

    _stage(watch, "calibrate")
    model.eval()
    sides = [[r for r in held if (int(r.key, 16) % 2 == 0) is even] for even in (True, False)]
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.trainer.bf16):
        calibrating, reporting = (replay_all(model, source, side, d2t) for side in sides)
    calibration = calibrate(calibrating, drafter.block_size, config.prompts.name)
    evaluation = evaluate(reporting, calibration)
    state = dict(model.state_dict())
    write_drafter(config.out / "drafter", drafter, state, d2t, calibration, storage=config.storage)
    (config.out / "evaluation.json").write_text(evaluation.model_dump_json(indent=1) + "\n")
    return evaluation


def drafter_config(
    config: TrainConfig, files: ModelFiles, rollouts: list[Rollout]
) -> DrafterConfig:
    """The drafter's shape. Raises ModelFormatError for settings that do not go together."""
    target = files.config
    return DrafterConfig.for_target(
        target,
        num_layers=config.layers,
        block_size=config.block_size,
        mask_token_id=_mask_token(config, files, rollouts),
        target_layer_ids=config.taps or spread_taps(target.num_layers),
        head=config.head,
        markov_rank=config.rank,
        draft_vocab_size=_draft_size(config, target.vocab_size),
    )


def spread_taps(layers: int) -> tuple[int, ...]:
    """Three layers: an early one, the middle, and the input of the last two (30: 2, 14, 27)."""
    return tuple(
        sorted({min(2, max(layers - 3, 0)), max((layers - 2) // 2, 0), max(layers - 3, 0)})
    )


def _rollouts(
    config: TrainConfig, files: ModelFiles, watch: Watchers
) -> tuple[list[Rollout], list[Rollout]]:
    """Training and held-out rollouts, written first as far as they are not there."""
    sides = split(read_prompts(config.prompts), config.held_out)
    wanted = (config.answer_tokens, config.held_out_tokens)
    paths = (config.out / "rollouts.jsonl", config.out / "held-out.jsonl")
    temperatures = (config.rollout, _greedy(config.rollout))
    if any(_answer_tokens(p) < tokens for p, tokens in zip(paths, wanted, strict=True)):
        _stage(watch, "roll out")
        context = config.rollout.max_prompt_tokens + config.rollout.max_answer_tokens
        with Engine.load(
            config.model,
            precision=config.precision,
            threads=config.threads,
            max_context=min(context, files.config.max_position_embeddings),
            limits=Limits(running=config.rollout.sessions),
        ) as engine:
            for side, path, sampling, tokens in zip(
                sides, paths, temperatures, wanted, strict=True
            ):
                prompts: list[Prompt] = ordered(side, config.first_sources)
                roll_out(engine, prompts, path, sampling, watch.on_rollout, tokens)
    training, held = (list(read_rollouts(path)) for path in paths)
    longest = config.rollout.max_prompt_tokens + config.rollout.max_answer_tokens
    for path in config.recorded:
        for rollout in read_rollouts(path):
            if len(rollout.tokens) <= longest:
                (held if in_share(rollout.key, config.held_out) else training).append(rollout)
    if not held:
        raise TrainingError("no held-out rollouts: raise held_out, or give more prompts")
    return training, held


def _greedy(config: RolloutConfig) -> RolloutConfig:
    """Held-out answers are greedy ones: accepted length is reported at temperature 0."""
    return RolloutConfig(
        temperature=0.0,
        max_prompt_tokens=config.max_prompt_tokens,
        max_answer_tokens=config.max_answer_tokens,
        sessions=config.sessions,
        constrained=config.constrained,
    )


def _answer_tokens(path: Path) -> int:
    return sum(len(r.answer) for r in read_rollouts(path)) if path.exists() else 0


def _vocabulary(config: TrainConfig, files: ModelFiles, rollouts: list[Rollout]) -> Tensor | None:
    size = _draft_size(config, files.config.vocab_size)
    if size is None:
        return None
    return draft_vocabulary(
        rollouts, files.config.vocab_size, size, always=files.config.eos_token_ids
    )


def _widened(
    config: TrainConfig, files: ModelFiles, rollouts: list[Rollout], start: DrafterFiles
) -> Tensor | None:
    """The vocabulary of ``start``, and what ``config.widen`` adds."""
    if config.widen is None or start.d2t is None:
        return start.d2t
    if config.widen < len(start.d2t):
        raise TrainingError(
            f"{config.start} has a draft vocabulary of {len(start.d2t)} tokens: it can be widened "
            f"but not cut down to {config.widen}"
        )
    size = min(config.widen, files.config.vocab_size)
    return draft_vocabulary(rollouts, files.config.vocab_size, size, always=start.d2t.tolist())


def _draft_size(config: TrainConfig, vocab_size: int) -> int | None:
    size = config.draft_vocab
    return None if size is None or size >= vocab_size else size


def _mask_token(config: TrainConfig, files: ModelFiles, rollouts: list[Rollout]) -> int:
    """A row that stands for nothing: past the tokenizer's table, else an unseen special token."""
    if config.mask_token_id is not None:
        return config.mask_token_id
    tokenizer = files.tokenizer()
    if tokenizer.vocab_size < files.config.vocab_size:
        return tokenizer.vocab_size
    seen = {token for rollout in rollouts for token in rollout.tokens}
    unused = sorted(set(tokenizer.special_ids) - seen - set(tokenizer.eos_token_ids))
    if not unused:
        raise TrainingError("no special token is unused: name a mask_token_id")
    return unused[-1]


def _model(
    config: TrainConfig,
    files: ModelFiles,
    drafter: DrafterConfig,
    d2t: Tensor | None,
    start: DrafterFiles | None,
) -> DraftModel:
    store = files.tensors()
    embedding = store.get("model.embed_tokens.weight")
    tied = files.config.tie_word_embeddings
    head = embedding if tied else store.get("lm_head.weight")
    rows = head if d2t is None else head[d2t]
    dtype = torch.bfloat16 if config.trainer.bf16 else torch.float32
    longest = config.rollout.max_prompt_tokens + config.rollout.max_answer_tokens
    model = DraftModel(drafter, embedding.clone(), rows.to(dtype), longest + drafter.block_size)
    if start is None:
        warm_start(model, store, config.trainer.seed)
    else:
        model.load_state_dict(with_vocabulary(start.state(), start.d2t, d2t))
    return model


def _features(
    config: TrainConfig,
    files: ModelFiles,
    drafter: DrafterConfig,
    d2t: Tensor | None,
    device: torch.device,
) -> FeatureSource:
    taps = drafter.target_layer_ids
    if device.type != "cpu":
        return TransformersFeatures(files, taps, d2t, device)
    precision = (
        default_precision(files.name)
        if config.precision is None
        else Precision.parse(config.precision)
    )
    longest = config.rollout.max_prompt_tokens + config.rollout.max_answer_tokens
    return DecoderFeatures(files, precision, taps, d2t, longest, _threads(config))


def _threads(config: TrainConfig) -> int:
    return default_threads() if config.threads is None else config.threads


def _stage(watch: Watchers, name: str) -> None:
    if watch.on_stage is not None:
        watch.on_stage(name)
