"""``dspark-agent demo``: a coding agent fixes a bug, step by step, on a model in this process."""


def demo() -> None:
    """Watch a coding agent find and fix a bug with a model that runs here."""
