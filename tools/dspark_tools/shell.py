"""Tool that runs a shell command in a workspace."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_agent import FunctionToolset
from dspark_tools.process import ProcessLimits, run_process
from dspark_tools.workspace import Workspace

_LIMITS = ProcessLimits(timeout_s=30.0)


@dataclass(frozen=True, slots=True)
class Shell:
    """The shell tool of a workspace: each call is a new ``sh`` in its root.

    A command has the rights of the user who runs the agent; see :class:`Workspace`.
    """

    workspace: Workspace
    limits: ProcessLimits = _LIMITS

    def toolset(self) -> FunctionToolset:
        """The shell as a toolset."""
        return FunctionToolset([self.run_shell], id="shell")

    async def run_shell(self, command: str) -> str:
        """Run a shell command in the workspace. It gets no input and ends within a time limit;
        nothing it starts goes on afterwards.

        Args:
            command: The command line.
        """
        result = await run_process(
            ["/bin/sh", "-c", command], folder=self.workspace.root, limits=self.limits
        )
        return result.text()
