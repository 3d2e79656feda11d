"""The engine's errors: one small tree under :class:`BackendError`.

Every message says what was wrong, where, and what to do about it. The SDK translates these into
its own tree, so a user of the engine alone never needs the SDK's names.
"""

from __future__ import annotations


class BackendError(Exception):
    """Root of everything the engine raises on purpose."""


class ModelNotFoundError(BackendError):
    """No known model, folder or repository goes by that name, or no source could be reached."""


class DownloadError(BackendError):
    """A model file could not be fetched, or did not match its checksum."""


class DeviceError(BackendError):
    """The device that was asked for is not there, or the engine's kernels do not run on it."""


class ModelFormatError(BackendError):
    """A weight file, config or tokenizer is damaged, hostile, or of an unsupported family."""


class GrammarError(BackendError):
    """A schema or grammar cannot be honoured, or died while constraining a step."""


class RequestError(BackendError):
    """A step request is invalid: found before anything reached the engine's loop."""


class ContextLengthError(RequestError):
    """The step does not fit in the context window; nothing was truncated, nothing was run."""


class SessionClosedError(BackendError):
    """The session was closed, or already has a step in flight."""


class CapacityError(BackendError):
    """The KV memory that was granted to the engine is used up."""


class EngineClosedError(BackendError):
    """The engine was shut down."""
