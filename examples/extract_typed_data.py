"""Read orders out of e-mails into a typed value, and watch it grow while the model writes.

The type is the contract: what the model writes is valid for it at every token.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Annotated

import anyio
from pydantic import BaseModel, Field

from dspark_agent import Agent, DSparkModel, Model, PartialOutput, RunResult

MAILS = (
    """Hello, this is Ada Berg. Please send 2 boxes of green tea and 1 teapot to my house in
Oslo. There is no hurry, the usual mail is fine. Thanks!""",
    """Hi! I need 12 candles and 3 lanterns in Bergen before the party on Friday. Please send them
by express, whatever it costs. Jon Lie""",
)


class Item(BaseModel):
    """One line of an order."""

    quantity: int = Field(ge=1, le=999)
    article: str = Field(min_length=1, max_length=30, description="what is ordered, in the plural")


class Order(BaseModel):
    """What a customer wants."""

    customer: str = Field(max_length=30, description="the writer's first and last name")
    city: str = Field(max_length=20)
    items: Annotated[list[Item], Field(min_length=1, max_length=3)]
    express: bool = Field(description="whether it is urgent")


def order_agent(model: Model) -> Agent[None, Order]:
    """An agent whose answers are orders."""
    return Agent(model, output_type=Order, instructions="You read orders out of e-mails.")


async def extract(agent: Agent[None, Order], mail: str) -> tuple[RunResult[Order], int]:
    """The order in ``mail``, and how many times a listener saw it grow on the way."""
    growths = 0
    async with agent.run_stream(f"The e-mail:\n\n{mail}") as stream:
        async for event in stream:
            if isinstance(event, PartialOutput):
                growths += 1
        return await stream.result(), growths


async def extract_all(model: Model, mails: Sequence[str] = MAILS) -> list[RunResult[Order]]:
    """The orders in ``mails``, printed as they come."""
    agent = order_agent(model)
    results = []
    for mail in mails:
        result, growths = await extract(agent, mail)
        order, metrics = result.output, result.steps[-1].metrics
        print(f"{order.customer}, {order.city}{', express' if order.express else ''}:")
        for item in order.items:
            print(f"  {item.quantity} x {item.article}")
        print(
            f"  [{metrics.total_s:.2f} s, {metrics.new_tokens} tokens, "
            f"{metrics.accepted.get('forced', 0)} of them forced; grew {growths} times; "
            f"{metrics.prefill_cached_tokens} tokens of the prompt were there already]"
        )
        results.append(result)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Read orders out of e-mails.")
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--threads", type=int, help="of the engine; all cores by default")
    parser.add_argument("--max-tokens", type=int, default=300, help="of one step")
    args = parser.parse_args(argv)
    model = DSparkModel(args.model, threads=args.threads, settings={"max_tokens": args.max_tokens})

    async def run() -> None:
        async with model:
            await extract_all(model)

    anyio.run(run)


if __name__ == "__main__":
    main()
