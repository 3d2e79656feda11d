"""Tool that runs a piece of Python in a workspace."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dspark_agent import FunctionToolset
from dspark_tools.process import ProcessLimits, run_process
from dspark_tools.workspace import Workspace

_LIMITS = ProcessLimits(timeout_s=30.0)


@dataclass(frozen=True, slots=True)
class Python:
    """The Python tool of a workspace: a fresh interpreter for each call.

    The code has the rights of the user who runs the agent; see :class:`Workspace`.
    """

    workspace: Workspace
    limits: ProcessLimits = _LIMITS

    def toolset(self) -> FunctionToolset:
        """The Python tool as a toolset."""
        return FunctionToolset([self.run_python], id="python")

    async def run_python(self, code: str) -> str:
        """Run Python code in the workspace, where its modules can be imported.

        Args:
            code: The program. Only what it prints comes back.
        """
        # A file rather than "-c", so that tracebacks show the source; "-P" keeps the file's own
        # folder off the import path and leaves the workspace on it.
        with tempfile.TemporaryDirectory(prefix="dspark-program-") as folder:
            program = Path(folder, "program.py")
            program.write_text(code, encoding="utf-8", errors="surrogatepass")
            result = await run_process(
                [sys.executable, "-P", str(program)],
                folder=self.workspace.root,
                limits=self.limits,
                environment={"PYTHONPATH": str(self.workspace.root)},
            )
        return result.text().replace(str(program), "program.py")
