"""Is a request one that an engine can take?"""

from __future__ import annotations

import math

from dspark_backend.errors import ContextLengthError, RequestError
from dspark_backend.request import StepRequest
from dspark_backend.session import Session


def positions_of(session: Session, request: StepRequest, vocab_size: int, max_context: int) -> int:
    """Positions that ``session`` has once ``request`` has written all that it may.

    Raises RequestError for nothing to go on from, an id outside the vocabulary, a number out of
    range or a grammar of another engine; ContextLengthError for more positions than
    ``max_context``.
    """
    log, new = len(session.log), len(request.tokens)
    if log + new == 0:
        raise RequestError("the step has no tokens and its session is empty: give a prompt")
    if new == 0 and session.kv.length == log:
        raise RequestError(
            "the step has no tokens and all of its session's log is computed: "
            "give at least one token, or roll one back"
        )
    if request.max_new_tokens < 0:
        raise RequestError(f"max_new_tokens must not be negative: {request.max_new_tokens}")
    if request.max_new_tokens == 0 and request.grammar is not None:
        raise RequestError("a step of max_new_tokens 0 writes nothing: give it no grammar")
    if request.deadline_s is not None and math.isnan(request.deadline_s):
        raise RequestError("deadline_s is not a number of seconds")
    highest = max(request.tokens, default=0)
    if highest >= vocab_size or min(request.tokens, default=0) < 0:
        raise RequestError(f"a prompt token is outside the vocabulary of {vocab_size}")
    needed = log + new + request.max_new_tokens
    if needed > max_context:
        raise ContextLengthError(
            f"the step needs {needed} tokens ({log} in the session, {new} new, "
            f"{request.max_new_tokens} to write), the context holds {max_context}: "
            "ask for fewer, shorten the prompt, or load the engine with a larger max_context"
        )
    if request.grammar is not None and request.grammar.words != (vocab_size + 31) // 32:
        raise RequestError(
            f"the grammar was compiled for {request.grammar.words * 32} tokens, the model "
            f"has {vocab_size}: compile it with this engine"
        )
    return needed
