"""The training loop: AdamW on float32 masters, bfloat16 products, exact resume (DSPARK.md, 4)."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark_backend.drafter.model import DraftModel
from dspark_backend.training.blocks import sample_blocks, trainable
from dspark_backend.training.errors import TrainingError
from dspark_backend.training.features import Example, FeatureSource
from dspark_backend.training.objective import LossWeights, StepFigures, backward
from dspark_backend.training.order import generator, rollouts_of_step
from dspark_backend.training.rollout import Rollout
from dspark_backend.training.schedule import learning_rate
from dspark_backend.training.state import load_state, save_state


@dataclass(frozen=True, slots=True)
class TrainerConfig:
    """A run: ``steps`` steps of ``sequences`` rollouts with ``anchors`` blocks each.

    ``warmup`` is the share of the steps in which the rate rises to ``peak_rate``; ``clip`` bounds
    the gradient's norm; ``bf16`` runs products in bfloat16 (the masters stay float32);
    ``save_every`` steps the state is written.
    """

    steps: int = 1000
    sequences: int = 4
    anchors: int = 40
    peak_rate: float = 6e-4
    warmup: float = 0.04
    clip: float = 1.0
    bf16: bool = True
    seed: int = 0
    save_every: int = 100
    loss: LossWeights = field(default_factory=LossWeights)


@dataclass(frozen=True, slots=True)
class TrainProgress:
    """After a step: its figures, answer tokens seen per second of this process, time left."""

    step: int
    steps: int
    rate: float
    figures: StepFigures
    tok_per_s: float
    left_s: float


ProgressSink = Callable[[TrainProgress], None]


class Trainer:
    """Trains ``model`` on ``rollouts``; everything a step does follows from seed and step number.

    ``target_head`` [output_size, d]: the target's LM head over the draft vocabulary; ``draft_ids``
    int64 [V]. The model's device is where it is trained. ``origin`` names the weights that the run
    began with, where those are not the target's: a state of a run from elsewhere is refused.
    """

    def __init__(
        self,
        model: DraftModel,
        rollouts: Sequence[Rollout],
        source: FeatureSource,
        target_head: Tensor,
        draft_ids: Tensor,
        config: TrainerConfig,
        state_folder: Path | None = None,
        origin: str | None = None,
    ) -> None:
        """Raises TrainingError where no rollout has two answer tokens, or for a foreign state."""
        self.rollouts = [rollout for rollout in rollouts if len(rollout.answer) >= 2]
        if not self.rollouts:
            raise TrainingError("no rollout has two answer tokens: write rollouts first")
        device = model.lm_head.device
        self.model = model
        self.config = config
        self._source = source
        self._head = target_head.to(device)
        self._draft_ids = draft_ids.to(device)
        self._optimiser = torch.optim.AdamW(
            model.parameters(), lr=config.peak_rate, weight_decay=0.0, fused=True
        )
        self._folder = state_folder
        self._origin = origin
        self.step = 0
        if state_folder is not None:
            self.step = load_state(state_folder, self._settings(), model, self._optimiser)

    def run(self, on_progress: ProgressSink | None = None) -> None:
        """Train to the last step; an interrupted run goes on where its state was written."""
        began, started, tokens = time.perf_counter(), self.step, 0
        while self.step < self.config.steps:
            rate, figures, seen = self.advance()
            tokens += seen
            if self._folder is not None and (
                self.step % self.config.save_every == 0 or self.step == self.config.steps
            ):
                self.save()
            if on_progress is not None:
                spent = time.perf_counter() - began
                left = spent / (self.step - started) * (self.config.steps - self.step)
                on_progress(
                    TrainProgress(self.step, self.config.steps, rate, figures, tokens / spent, left)
                )

    def advance(self) -> tuple[float, StepFigures, int]:
        """One step: the learning rate, its figures, and the answer tokens it read."""
        config = self.config
        examples = self._examples()
        blocks = sample_blocks(
            examples,
            config.anchors,
            self.model.config.block_size,
            generator("anchors", config.seed, self.step),
        )
        rate = learning_rate(self.step, config.steps, config.peak_rate, config.warmup)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.zero_grad(set_to_none=True)
        device = self.model.lm_head.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.bf16):
            figures = backward(self.model, blocks, self._head, self._draft_ids, config.loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self._optimiser.step()
        self.step += 1
        return rate, figures, sum(len(example.rollout.answer) for example in examples)

    def save(self) -> None:
        """Write the state now. Raises ValueError without a folder to write to."""
        if self._folder is None:
            raise ValueError("this trainer has no state folder")
        save_state(self._folder, self.step, self._settings(), self.model, self._optimiser)

    def _examples(self) -> list[Example]:
        chosen = rollouts_of_step(
            self.step, len(self.rollouts), self.config.sequences, self.config.seed
        )
        examples = [self._source.example(self.rollouts[index]) for index in chosen]
        return [example for example in examples if trainable(example)]

    def _settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that wrote the state."""
        own = {name: value for name, value in asdict(self.config).items() if name != "save_every"}
        keys = hashlib.sha256(" ".join(rollout.key for rollout in self.rollouts).encode())
        drafter = self.model.config.to_dict()
        settings = {**own, "rollouts": keys.hexdigest(), "drafter": drafter, "origin": self._origin}
        as_read: dict[str, Any] = json.loads(json.dumps(settings))
        return as_read
