"""``dspark-agent bench``: figures as JSON for scripts and as tables for people."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dspark_agent.cli.bench_ablation import ablation
from dspark_agent.cli.bench_options import Device, Drafter, Json, Limit, Model, Precision, Threads
from dspark_agent.cli.bench_pareto import pareto
from dspark_agent.cli.bench_report import counter, write_report
from dspark_agent.cli.console import check_writable, err, out
from dspark_agent.cli.progress import model_bars

app = typer.Typer(
    help="Measure, as ratios within one run. Leave the machine alone meanwhile.",
    no_args_is_help=True,
)


class Switch(StrEnum):
    ON = "on"
    OFF = "off"


class DecodePeerName(StrEnum):
    TRANSFORMERS = "transformers"
    TRANSFORMERS_STATIC = "transformers-static"
    LLAMA_CPP = "llama-cpp"
    PLAIN = "plain"
    FIXED = "fixed"
    THRESHOLD = "threshold"
    PREFIX_THROUGHPUT = "prefix_throughput"


class StepsPeerName(StrEnum):
    LLAMA_CPP = "llama-cpp"
    TOKEN_BY_TOKEN = "token-by-token"
    PLAIN = "plain"
    FIXED = "fixed"
    THRESHOLD = "threshold"
    PREFIX_THROUGHPUT = "prefix_throughput"


Speculation = Annotated[Switch, typer.Option(help="Speculative decoding, of our engine alone.")]
Policy = Annotated[
    str | None, typer.Option(help="Budget policy, such as step_aware (the default) or fixed-4.")
]


@app.command()
def decode(
    model: Model,
    json_file: Json,
    prompts: Annotated[
        str, typer.Option(help="JSON-lines file of prompts, or the name of a set that ships.")
    ] = "code",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write a prompt.")] = 64,
    limit: Limit = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Keys the noise of sampling.")] = 0,
    speculation: Speculation = Switch.OFF,
    drafter: Drafter = None,
    policy: Policy = None,
    device: Device = None,
    precision: Precision = None,
    threads: Threads = None,
    peer: Annotated[
        list[DecodePeerName] | None, typer.Option(help="Run beside ours; may be repeated.")
    ] = None,
) -> None:
    """Tokens a second and time to the first token, prompt by prompt."""
    from dspark_backend.bench.decode import DecodeSettings, run_decode
    from dspark_backend.bench.jsonl import shipped
    from dspark_backend.bench.lineup import Terms
    from dspark_backend.bench.table import decode_table

    settings = DecodeSettings(
        model=model,
        prompts=shipped("prompts", prompts),
        max_new_tokens=max_new_tokens,
        limit=limit,
        temperature=temperature,
        seed=seed,
        terms=Terms(
            precision=precision,
            threads=threads,
            peers=tuple(name.value for name in peer or ()),
            speculation=speculation is Switch.ON,
            drafter=drafter,
            policy=policy,
            device=device,
        ),
    )
    check_writable(json_file)
    with model_bars() as downloads, counter("samples") as counted:
        report = run_decode(settings, progress=downloads, on_sample=counted)
    out().print(decode_table(report))
    write_report(report, json_file)


@app.command()
def steps(
    model: Model,
    json_file: Json,
    trace: Annotated[
        str, typer.Option(help="JSON-lines file of recorded runs, or the name of one that ships.")
    ] = "coding",
    limit: Limit = None,
    speculation: Speculation = Switch.OFF,
    drafter: Drafter = None,
    policy: Policy = None,
    precision: Precision = None,
    threads: Threads = None,
    peer: Annotated[
        list[StepsPeerName] | None, typer.Option(help="Run beside ours; may be repeated.")
    ] = None,
    explain: Annotated[
        bool, typer.Option(help="Account for every cycle; prints the step with the most.")
    ] = False,
) -> None:
    """Seconds of every step of recorded agent runs."""
    from dspark_backend.bench.jsonl import shipped
    from dspark_backend.bench.lineup import Terms
    from dspark_backend.bench.steps import StepsSettings, run_steps
    from dspark_backend.bench.table import steps_table

    settings = StepsSettings(
        model=model,
        trace=shipped("traces", trace),
        limit=limit,
        explain=explain,
        terms=Terms(
            precision=precision,
            threads=threads,
            peers=tuple(name.value for name in peer or ()),
            speculation=speculation is Switch.ON,
            drafter=drafter,
            policy=policy,
        ),
    )
    check_writable(json_file)
    with model_bars() as downloads, counter("steps") as counted:
        report = run_steps(settings, progress=downloads, on_step=counted)
    out().print(steps_table(report))
    if explain:
        from dspark_backend.bench.explain import explain_table
        from dspark_backend.catalog import resolve

        out().print(explain_table(report, resolve(model).tokenizer()))
    write_report(report, json_file)


@app.command()
def quality(
    model: Model,
    json_file: Json,
    precision: Precision = None,
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text; the project's own sample when left out.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Most tokens of the text to score.")] = 4096,
    threads: Threads = None,
) -> None:
    """Perplexity of a precision beside bf16 on a fixed text."""
    from dspark_backend.bench.quality import QualitySettings, run_quality
    from dspark_backend.bench.table import quality_table

    settings = QualitySettings(
        model=model, precision=precision, text=text, max_tokens=tokens, threads=threads
    )
    check_writable(json_file)
    with model_bars() as downloads, counter("tokens") as counted:
        report = run_quality(settings, progress=downloads, on_tokens=counted)
    out().print(quality_table(report))
    write_report(report, json_file)


@app.command()
def cost(
    model: Model,
    json_file: Json,
    drafter: Drafter = None,
    policy: Policy = None,
    precision: Precision = None,
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="For the table's repetitions.")] = 10.0,
) -> None:
    """Seconds of a pass and of a draft by their size; kept for this machine. A plot beside it."""
    from dspark_backend.bench.cost import CostSettings, plot_cost, run_cost
    from dspark_backend.bench.table import cost_table

    settings = CostSettings(
        model=model, precision=precision, threads=threads, drafter=drafter, seconds=seconds
    )
    check_writable(json_file)
    with model_bars() as downloads:
        report = run_cost(settings, progress=downloads)
    out().print(cost_table(report))
    write_report(report, json_file)
    plot = json_file.with_suffix(".png")
    plot_cost(report, plot)
    err().print(f"[note]wrote {plot}[/]")


@app.command()
def kernels(
    json_file: Json,
    size: Annotated[
        str, typer.Option(help="Whose shapes: qwen2.5-coder-0.5b or qwen3-4b.")
    ] = "qwen2.5-coder-0.5b",
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each; the median counts.")] = 50,
) -> None:
    """Each device kernel's time beside torch's, and its share of a copy's bandwidth; on a GPU."""
    from dspark_backend.devices import gpu

    gpu(device)  # says what is missing before Triton is looked for
    from dspark_backend.bench.kernels import KernelsSettings, run_kernels
    from dspark_backend.bench.table import kernels_table

    settings = KernelsSettings(size=size, device=device, repeats=repeats)
    check_writable(json_file)
    with counter("kernels") as counted:
        report = run_kernels(settings, on_case=counted)
    out().print(kernels_table(report))
    write_report(report, json_file)


@app.command()
def simulate(
    json_file: Json,
    curve: Annotated[
        str, typer.Option(help="JSON file of a cost curve, or the name of one that ships.")
    ] = "h200-like",
    records: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="JSON-lines file of recorded cycles; else made up."
        ),
    ] = None,
    agents: Annotated[
        list[int] | None,
        typer.Option(min=1, max=512, help="Agents at once; may be repeated. 1, 16, 128, 512."),
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="Budget policy; may be repeated. All when left out.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write an agent, at least.")] = 64,
    seed: Annotated[int, typer.Option(help="Of made-up records.")] = 0,
) -> None:
    """Budget policies on paper: recorded cycles against the cost curve of another machine."""
    from dspark_backend.bench.simulate import AGENTS, POLICIES, SimulateSettings, run_simulate
    from dspark_backend.bench.table import simulate_table

    settings = SimulateSettings(
        curve=curve,
        records=records,
        agents=tuple(agents or AGENTS),
        policies=tuple(policy or POLICIES),
        tokens_per_agent=tokens,
        seed=seed,
    )
    check_writable(json_file)
    with counter("replays") as counted:
        report = run_simulate(settings, on_replay=counted)
    out().print(simulate_table(report))
    write_report(report, json_file)


@app.command()
def overhead(
    json_file: Json,
    steps: Annotated[int, typer.Option(min=10, help="Steps of a conversation.")] = 200,
    rounds: Annotated[int, typer.Option(min=1, help="Conversations of each kind of step.")] = 5,
) -> None:
    """What the SDK itself adds to a step, with a model that answers at once."""
    from dspark_agent.cli.overhead import OverheadSettings, overhead_table, run_overhead

    check_writable(json_file)
    with counter("conversations") as counted:
        report = run_overhead(OverheadSettings(steps=steps, rounds=rounds), on_step=counted)
    out().print(overhead_table(report))
    write_report(report, json_file)


app.command()(pareto)
app.command()(ablation)
