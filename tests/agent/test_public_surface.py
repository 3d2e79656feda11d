"""The public names are few and known, and importing them loads nothing heavy."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import dspark_agent

SURFACE = (
    "Agent AgentEvent AgentRun ApprovalRequired Compaction ContextCompacted "
    "ContextLengthError DSparkError DSparkModel DeadlineExceeded DeferredToolRequests "
    "DeferredToolResults EventStream FinishReason FunctionModel FunctionToolset "
    "GuardrailTripped Handoff History Hooks Journal JournalError JournalLockedError "
    "JsonSchema Model ModelError ModelHTTPError ModelMessage ModelMessagesTypeAdapter "
    "ModelNotFoundError ModelRequest ModelResponse ModelRetry ModelSession ModelSettings "
    "ModelTurn NativeOutput OpenAIModel OutputError PartialOutput PromptedOutput Recording "
    "RequestUsage RetryPromptPart RunCancelled RunContext RunResult RunUsage SchemaError "
    "Session SessionClosedError SqliteJournal StepEnd StepKind StepMetrics StepResult "
    "StepStart SystemPromptPart TestModel TextDelta TextOutput TextPart Timeline Tool "
    "ToolApproved ToolCallDelta ToolCallEnd ToolCallPart ToolCallStart ToolDefinition "
    "ToolDenied ToolFailed ToolInterruptedError ToolOutput ToolResult ToolRetriesExceeded "
    "ToolReturnPart UnexpectedModelBehavior UsageLimitExceeded UsageLimits UserError "
    "UserPromptPart fan_out infer_model tool"
)
NAMES = SURFACE.split(" ")


def test_the_surface_is_these_names() -> None:
    assert dspark_agent.__all__ == NAMES
    for name in NAMES:
        assert getattr(dspark_agent, name) is not None


MCP_SURFACE = (
    "Elicitation MCPConnectionError MCPError MCPOutputTooLarge MCPProtocolError MCPResource "
    "MCPServer MCPServerHTTP MCPServerStdio MCPToolChangedError Sampling ToolApprovals ToolChange"
)


def test_the_surface_of_mcp_is_these_names() -> None:
    mcp = importlib.import_module("dspark_agent.mcp")
    assert mcp.__all__ == MCP_SURFACE.split(" ")
    for name in mcp.__all__:
        assert inspect.getdoc(getattr(mcp, name))
        assert issubclass(getattr(mcp, name), dspark_agent.DSparkError) is name.startswith(
            ("MCPC", "MCPE", "MCPO", "MCPP", "MCPT")
        )


def test_without_the_mcp_package_its_extra_is_named() -> None:
    code = """
import sys
sys.modules["mcp"] = None
try:
    import dspark_agent.mcp
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "install it with the extra: pip install -c constraints.txt -e '.[mcp]'" in done.stdout


def test_every_public_name_has_its_place_in_the_reference() -> None:
    pages = Path(__file__).parents[2] / "docs" / "api"
    found = [
        line.removeprefix("::: ")
        for page in sorted(pages.glob("*.md"))
        for line in page.read_text().splitlines()
        if line.startswith("::: ")
    ]
    aliases = {"AgentEvent", "ModelMessage"}  # unions of what is shown
    own = {f"dspark_agent.{name}" for name in NAMES if name not in aliases}
    assert sorted(found) == sorted(own | {f"dspark_agent.mcp.{n}" for n in MCP_SURFACE.split(" ")})


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Agnet"):
        _ = dspark_agent.Agnet


@pytest.mark.parametrize("name", NAMES)
def test_everything_public_has_a_docstring(name: str) -> None:
    thing = getattr(dspark_agent, name)
    if not inspect.isclass(thing):
        return
    assert inspect.getdoc(thing)
    for attribute, member in vars(thing).items():
        if not attribute.startswith("_") and inspect.isfunction(member):
            assert inspect.getdoc(getattr(thing, attribute)), f"{name}.{attribute}"


def test_every_error_of_the_sdk_has_one_root() -> None:
    apart = {"ApprovalRequired", "ModelRetry", "ToolFailed"}  # said to the model, not to the caller
    for name in NAMES:
        thing = getattr(dspark_agent, name)
        if inspect.isclass(thing) and issubclass(thing, Exception) and name not in apart:
            assert issubclass(thing, dspark_agent.DSparkError)


def test_importing_and_running_on_a_remote_or_fake_model_never_loads_torch() -> None:
    code = """
import sys
import dspark_agent
assert "httpx" not in sys.modules
dspark_agent.Agent(dspark_agent.TestModel()).run_sync("Hi")
dspark_agent.OpenAIModel("m", base_url="http://localhost")
heavy = {"torch", "transformers", "dspark_backend", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
