"""Models: the seam, the embedded engine, remote servers, and test doubles."""

from __future__ import annotations

from dspark_agent.errors import UserError
from dspark_agent.models.base import Model

REMOTE_PREFIX = "openai:"


def infer_model(
    model: Model | str, *, base_url: str | None = None, api_key: str | None = None
) -> Model:
    """A model from its name: ``"openai:<model>"`` at ``base_url``, any other on the embedded
    engine (a known name, a local folder or GGUF file, or a hub id). Loads nothing yet.

    Raises:
        UserError: the name is empty, or a remote model has no ``base_url``.
    """
    if isinstance(model, Model):
        return model
    if not model or model == REMOTE_PREFIX:
        raise UserError("a model needs a name, such as 'qwen2.5-coder-0.5b'")
    if model.startswith(REMOTE_PREFIX):
        if base_url is None:
            raise UserError(
                f"{model!r} is a remote model: give its server, as in "
                f"OpenAIModel({model.removeprefix(REMOTE_PREFIX)!r}, base_url='https://...')"
            )
        from dspark_agent.models.openai import OpenAIModel

        return OpenAIModel(model.removeprefix(REMOTE_PREFIX), base_url=base_url, api_key=api_key)
    from dspark_agent.models.dspark import DSparkModel

    return DSparkModel(model)
