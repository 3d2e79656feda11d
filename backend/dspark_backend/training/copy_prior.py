"""Measure the prior of the copy proposer: ``python -m dspark_backend.training.copy_prior``.

Replays answers over their contexts with the proposer itself, as the engine would go through them:
propose, count what holds, go on behind the first miss. Prints tokens a cycle, how far off the
survival is on tasks that its prior was not made of, and the table for ``copy_acceptance.PRIOR``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dspark_backend.catalog import resolve
from dspark_backend.speculation.copy import FLOOR, CopyProposal, CopyProposer
from dspark_backend.speculation.copy_acceptance import LENGTHS, Agreement, CopyAcceptance
from dspark_backend.training.copy_tasks import CopyTask, copy_tasks
from dspark_backend.training.statistics import calibration_error

NEIGHBOUR_WEIGHT = 20.0  # observations that the next shorter match counts for
DEPTHS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Replay:
    """Every cycle of an answer of ``tokens``: what was proposed and how much of it held."""

    tokens: int
    cycles: list[tuple[CopyProposal, int]]


def replay(task: CopyTask, acceptance: CopyAcceptance, *, floor: float, learn: bool) -> Replay:
    """Go through the answer of ``task``; with ``learn`` the acceptance is told of every cycle."""
    proposer = CopyProposer(acceptance, floor=floor)
    proposer.append(task.context)
    cycles, done = [], 0
    while done < len(task.answer):
        rest = task.answer[done:]
        proposal = proposer.propose(len(rest))
        held = [a == b for a, b in zip(proposal.tokens, rest, strict=False)]
        accepted = (*held, False).index(False)
        if learn:
            proposer.observe(proposal, accepted)
        cycles.append((proposal, accepted))
        proposer.append(rest[: accepted + 1])
        done += accepted + 1
    return Replay(len(task.answer), cycles)


def prior(replays: Sequence[Replay]) -> NDArray[np.float64]:
    """How often a copied token held when all before it had, [lengths, agreements]; where little was
    seen, the figure of the next shorter match counts too."""
    hits = np.zeros((len(LENGTHS), len(Agreement)))
    seen = np.zeros_like(hits)
    for each in replays:
        for proposal, accepted in each.cycles:
            for k, (_, length, agreement) in enumerate(proposal.cells[: accepted + 1]):
                hits[length, agreement] += k < accepted
                seen[length, agreement] += 1
    table = np.empty_like(hits)
    shorter = (hits[0] + 1.0) / (seen[0] + 2.0)
    for length in range(len(LENGTHS)):
        weight = seen[length] + NEIGHBOUR_WEIGHT
        shorter = table[length] = (hits[length] + NEIGHBOUR_WEIGHT * shorter) / weight
    return table


def survival_error(replays: Sequence[Replay], depth: int) -> float:
    """Expected calibration error of the survival of the ``depth``-th token of all proposals that
    have one."""
    pairs = [
        (proposal.survival[depth - 1], accepted >= depth)
        for each in replays
        for proposal, accepted in each.cycles
        if len(proposal.tokens) >= depth
    ]
    survival, held = np.array([s for s, _ in pairs]), np.array([h for _, h in pairs], np.bool_)
    return calibration_error(survival, held)


def report(tasks: Sequence[CopyTask]) -> str:
    """The figures as Markdown, then the table as Python."""
    halves = (tasks[::2], tasks[1::2])
    whole = [[replay(t, CopyAcceptance(), floor=0.0, learn=False) for t in half] for half in halves]
    lines = ["| scenario | tokens | tokens a cycle |", "|---|---|---|"]
    for scenario in dict.fromkeys(task.scenario for task in tasks):
        mine = [
            each
            for half, replays in zip(halves, whole, strict=True)
            for task, each in zip(half, replays, strict=True)
            if task.scenario == scenario
        ]
        tokens, cycles = sum(r.tokens for r in mine), sum(len(r.cycles) for r in mine)
        lines.append(f"| {scenario} | {tokens} | {tokens / cycles:.2f} |")
    lines += ["", "| survival error at token | " + " | ".join(map(str, DEPTHS)) + " |"]
    lines.append("|---|" + "---|" * len(DEPTHS))
    for title, learn in (("prior of the other half", False), ("the same, adapting", True)):
        seen = []
        for half, other in zip(halves, reversed(whole), strict=True):
            acceptance = CopyAcceptance(prior(other).tolist())
            seen += [replay(task, acceptance, floor=FLOOR, learn=learn) for task in half]
        errors = [f"{100 * survival_error(seen, depth):.1f} %" for depth in DEPTHS]
        lines.append(f"| {title} | " + " | ".join(errors) + " |")
    rows = prior([*whole[0], *whole[1]])
    lines += ["", *("(" + ", ".join(f"{p:.3f}" for p in row) + ")," for row in rows)]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure how often copied tokens hold.")
    parser.add_argument("--repository", type=Path, default=Path(), help="a git repository")
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer cuts the text")
    parser.add_argument("--each", type=int, default=60, help="most tasks of a scenario")
    args = parser.parse_args(argv)
    encode = resolve(args.model).tokenizer().encode
    print(report(copy_tasks(args.repository, encode, args.each)))


if __name__ == "__main__":
    main()
