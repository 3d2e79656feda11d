"""Tools and toolsets: what can be declared, and what is shared."""

from __future__ import annotations

import inspect
import threading

import pytest

from dspark_agent import Agent, FunctionToolset, RunContext, TestModel, Tool, UserError, tool
from dspark_agent.context import RunContext as Context
from dspark_agent.limits import RunUsage


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def double(n: int) -> int:
    """Double it."""
    return 2 * n


@tool(name="halve", timeout=5, retries=3, sequential=True)
def half(n: int) -> int:
    """Halve it."""
    return n // 2


def test_the_free_decorator_makes_tools_that_are_still_functions() -> None:
    assert double(4) == 8
    assert inspect.signature(double) == inspect.signature(double.function)
    assert (half.name, half.timeout, half.retries, half.sequential) == ("halve", 5, 3, True)
    assert half.definition.description == "Halve it."


@pytest.mark.parametrize("name", ["auto", "required", "none"])
def test_names_that_mean_a_choice_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=name):
        Tool(add, name=name)


def test_a_toolset_gives_its_defaults_to_tools_that_have_none_without_touching_them() -> None:
    own = Tool(add, timeout=1)
    toolset: FunctionToolset[object] = FunctionToolset([own, double], timeout=9, retries=7)
    assert toolset.tools["add"].timeout == 1
    assert toolset.tools["double"].timeout == 9
    assert toolset.tools["double"].retries == 7
    assert own.retries is None
    assert double.timeout is None


def test_toolset_decorators_give_the_function_back() -> None:
    toolset: FunctionToolset[int] = FunctionToolset()

    @toolset.tool
    def who(ctx: RunContext[int], name: str) -> str:
        """Who."""
        return f"{ctx.deps} {name}"

    @toolset.tool_plain(name="sum", timeout=2)
    def plus(a: int, b: int) -> int:
        """Plus."""
        return a + b

    assert list(toolset.tools) == ["who", "sum"]
    assert plus(1, 2) == 3
    assert toolset.tools["sum"].timeout == 2


def test_two_tools_of_one_name_are_an_error_at_declaration() -> None:
    with pytest.raises(UserError, match="'add'"):
        FunctionToolset([add, add])
    with pytest.raises(UserError, match=r"'add'.*'files'"):
        Agent(TestModel(), tools=[add], toolsets=[FunctionToolset([add], id="files")])


@pytest.mark.anyio
async def test_sync_functions_run_in_a_worker_thread_and_async_ones_do_not() -> None:
    threads: dict[str, int] = {}

    def sync() -> None:
        """Sync."""
        threads["sync"] = threading.get_ident()

    async def asynchronous() -> None:
        """Async."""
        threads["async"] = threading.get_ident()

    ctx: Context[object] = RunContext(deps=None, messages=(), usage=RunUsage())
    await Tool(sync).run(ctx, {})
    await Tool(asynchronous).run(ctx, {})
    assert threads["sync"] != threading.get_ident()
    assert threads["async"] == threading.get_ident()


@pytest.mark.anyio
async def test_an_object_with_an_async_call_is_an_async_tool() -> None:
    class Greeter:
        async def __call__(self, name: str) -> str:
            """Greet."""
            return f"hello {name}"

    ctx: Context[object] = RunContext(deps=None, messages=(), usage=RunUsage())
    greet = Tool(Greeter(), name="greet")
    assert await greet.run(ctx, {"name": "Ada"}) == "hello Ada"
    assert greet.definition.description == ""
