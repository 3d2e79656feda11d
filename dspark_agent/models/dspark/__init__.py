"""The embedded model: an engine in this process, driven from asyncio or trio.

With the command line the only part of the SDK that touches the engine; importing it loads torch.
"""

from dspark_agent.models.dspark.model import DSparkModel

__all__ = ["DSparkModel"]
