"""``dspark-agent train``: a drafter for a model, from a file of prompts."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dspark_agent.cli.console import err, out
from dspark_agent.cli.drafter_view import print_figures, run_bars


class HeadName(StrEnum):
    NONE = "none"
    VANILLA = "vanilla"
    GATED = "gated"
    RNN = "rnn"


class StorageName(StrEnum):
    BF16 = "bf16"
    INT8 = "int8"


# What a drafter to go on from has settled already.
_SHAPE = ("layers", "block_size", "head", "rank", "taps")


def train(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", "-m", help="Known name, path or hub id.")],
    prompts: Annotated[
        Path, typer.Option(help="JSON lines with `messages` (and `tools`, `source`).")
    ],
    out_folder: Annotated[
        Path, typer.Option("--out", help="Run folder; an interrupted run there goes on.")
    ],
    layers: Annotated[int, typer.Option(min=1, help="Draft layers.")] = 2,
    block_size: Annotated[int, typer.Option(min=1, help="Drafts a block; 1 is MTP-1.")] = 5,
    head: Annotated[HeadName, typer.Option(help="Sequential head.")] = HeadName.VANILLA,
    rank: Annotated[int, typer.Option(min=1, help="Of the Markov head.")] = 64,
    draft_vocab: Annotated[
        int, typer.Option(min=0, help="Tokens the drafter can say; 0 for all.")
    ] = 12_288,
    taps: Annotated[
        str | None, typer.Option(help="Target layers read, such as 2,14,27; spread when left out.")
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="A drafter to go on from; --draft-vocab can widen its vocabulary.",
        ),
    ] = None,
    answer_tokens: Annotated[int, typer.Option(min=1, help="To roll out for training.")] = 200_000,
    held_out_tokens: Annotated[int, typer.Option(min=1, help="To roll out and hold out.")] = 20_000,
    held_out: Annotated[float, typer.Option(min=0.0, help="Share of the prompts.")] = 0.05,
    first: Annotated[
        list[str] | None, typer.Option(help="A source to answer first; may be repeated.")
    ] = None,
    recorded: Annotated[
        list[Path] | None,
        typer.Option(exists=True, help="Rollouts from elsewhere, as well; may be repeated."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the rollouts.")] = 0.7,
    constrained: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Share of the prompts with tools that must be a call."),
    ] = 0.5,
    max_prompt: Annotated[int, typer.Option(min=1, help="Longer prompts are left out.")] = 512,
    max_answer: Annotated[int, typer.Option(min=2, help="Tokens an answer has at most.")] = 256,
    sessions: Annotated[int, typer.Option(min=1, help="Answers written at once.")] = 32,
    steps: Annotated[int, typer.Option(min=1)] = 1500,
    sequences: Annotated[int, typer.Option(min=1, help="Rollouts a step.")] = 4,
    anchors: Annotated[int, typer.Option(min=1, help="Blocks a rollout and step.")] = 40,
    rate: Annotated[float, typer.Option(min=0.0, help="Peak learning rate.")] = 1e-3,
    cross_entropy: Annotated[
        float,
        typer.Option(min=0.0, help="Its weight in the loss; 1 helps where --temperature is 0."),
    ] = 0.1,
    seed: Annotated[int, typer.Option()] = 0,
    bf16: Annotated[bool, typer.Option(help="Products in bfloat16; masters stay float32.")] = True,
    storage: Annotated[
        StorageName, typer.Option(help="How the drafter's matrices are kept.")
    ] = StorageName.BF16,
    device: Annotated[str, typer.Option(help="Where to train: cpu or cuda.")] = "cpu",
    precision: Annotated[str | None, typer.Option(help="The target's.")] = None,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Train a drafter: the model answers the prompts itself, the drafter learns to foresee it."""
    from dspark_backend.drafter.checkpoint import Storage
    from dspark_backend.drafter.config import HeadType
    from dspark_backend.training.objective import LossWeights
    from dspark_backend.training.recipe import TrainConfig, Watchers
    from dspark_backend.training.recipe import train as run
    from dspark_backend.training.rollout import RolloutConfig
    from dspark_backend.training.trainer import TrainerConfig

    if start is not None:
        _refuse_shape(context)
    config = TrainConfig(
        model=model,
        prompts=prompts,
        out=out_folder,
        start=start,
        widen=draft_vocab if start is not None and _given(context, "draft_vocab") else None,
        layers=layers,
        block_size=block_size,
        head=HeadType(head.value),
        rank=rank,
        taps=_numbers(taps),
        draft_vocab=draft_vocab or None,
        held_out=held_out,
        first_sources=tuple(first or ()),
        recorded=tuple(recorded or ()),
        answer_tokens=answer_tokens,
        held_out_tokens=held_out_tokens,
        rollout=RolloutConfig(
            temperature=temperature,
            max_prompt_tokens=max_prompt,
            max_answer_tokens=max_answer,
            sessions=sessions,
            constrained=constrained,
        ),
        trainer=TrainerConfig(
            steps=steps,
            sequences=sequences,
            anchors=anchors,
            peak_rate=rate,
            seed=seed,
            bf16=bf16,
            loss=LossWeights(cross_entropy=cross_entropy),
        ),
        storage=Storage(storage.value),
        device=device,
        precision=precision,
        threads=threads,
    )
    with run_bars() as bars:
        watchers = Watchers(on_stage=bars.stage, on_rollout=bars.rollout, on_step=bars.step)
        evaluation = run(config, watchers)
    print_figures(out(), "held-out prompts, temperature 0", evaluation)
    err().print(f"[note]{out_folder / 'drafter'}[/]")


def _refuse_shape(context: typer.Context) -> None:
    for name in _SHAPE:
        if _given(context, name):
            raise typer.BadParameter(
                "the drafter of --start has its own; leave this option out",
                param_hint="--" + name.replace("_", "-"),
            )


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}: give layer numbers with commas between them", param_hint="--taps"
        ) from None
