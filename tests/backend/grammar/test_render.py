"""Conversations as tokens: as the template has it, append-only, and safe from foreign text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.errors import ModelFormatError, RequestError
from dspark_backend.grammar.dialect import Dialect, dialect_for
from dspark_backend.tokenizer import Tokenizer

DialectNamed = Callable[[str], Dialect]
Message = dict[str, Any]

SYSTEM = {"role": "system", "content": "You fix bugs."}
ASK = {"role": "user", "content": "Why is 1 + 1 == 3?\n  Look at calc.py."}
ANSWER = {"role": "assistant", "content": "Because of a typo — “3” ≠ 2."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "read_file",
            "description": 'Read a "file" – all of it.',
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string"}, "line": {"type": "integer"}},
                "required": ["path"],
            },
        },
    }
]


def call(**arguments: Any) -> Message:
    function = {"name": "read_file", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


def result(content: str) -> Message:
    return {"role": "tool", "name": "read_file", "content": content}


SMOLLM2 = pytest.param("smollm2", marks=pytest.mark.real_model)
QWEN = pytest.param("qwen2.5", marks=pytest.mark.slow)
MODELS = ["tiny-generic", "tiny-hermes", "tiny-llama3", SMOLLM2, QWEN]
WITH_TOOLS = ["tiny-hermes", "tiny-llama3", QWEN]
CONVERSATIONS: dict[str, list[Message]] = {
    "question": [ASK],
    "with a system message": [SYSTEM, ASK],
    "several turns": [SYSTEM, ASK, ANSWER, ASK],
}


@pytest.fixture(scope="session")
def rendered(model_folder: Callable[[str], Path]) -> Callable[..., list[int]]:
    """transformers' rendering of a conversation through the prompt for the next turn."""
    loaded: dict[str, Any] = {}

    def render(model: str, conversation: list[Message], tools: list[Message] | None) -> list[int]:
        if model not in loaded:
            loaded[model] = AutoTokenizer.from_pretrained(model_folder(model))
        filled = [{"content": "", **message} for message in conversation]
        ids = loaded[model].apply_chat_template(
            filled, tools=tools, add_generation_prompt=True, enable_thinking=False
        )["input_ids"]
        return list(ids)

    return render


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=list(CONVERSATIONS))
@pytest.mark.parametrize("model", MODELS)
def test_a_start_is_what_transformers_renders(
    model: str,
    conversation: list[Message],
    dialect_named: DialectNamed,
    rendered: Callable[..., list[int]],
) -> None:
    ours = dialect_named(model).render_start(conversation)
    assert ours == rendered(model, conversation, None)


@pytest.mark.parametrize("model", WITH_TOOLS)
def test_tools_and_calls_are_what_transformers_renders(
    model: str, dialect_named: DialectNamed, rendered: Callable[..., list[int]]
) -> None:
    history = [SYSTEM, ASK, call(path="calc.py", line=3), result("x = 1"), ANSWER, ASK]
    ours = dialect_named(model).render_start(history, TOOLS)
    assert ours == rendered(model, history, TOOLS)


SCRIPTS: dict[str, list[list[Message]]] = {
    "questions": [[SYSTEM, ASK], [ANSWER], [ASK], [ANSWER], [ASK, SYSTEM]],
    "a tool": [[ASK], [call(path="é.py")], [result('{"a": 1}')], [ANSWER], [ASK]],
    "two tools in a row": [
        [SYSTEM, ASK],
        [call(path="a")],
        [result("1")],
        [call(path="b", line=2)],
        [result("2\n")],
    ],
    "no new message": [[ASK], [ANSWER], []],
}


def written(dialect: Dialect, message: Message) -> list[int]:
    """The tokens that a model would have written for an assistant message, and its end."""
    calls = message.get("tool_calls", [])
    text = message.get("content", "") + "".join(
        dialect.form.call(
            c["function"]["name"], json.dumps(c["function"]["arguments"], ensure_ascii=False)
        )
        for c in calls
    )
    return [*dialect.tokenizer.encode(text), dialect.end_of_turn_id]


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=list(SCRIPTS))
@pytest.mark.parametrize("model", MODELS)
def test_a_full_render_extends_the_log(
    model: str, script: list[list[Message]], dialect_named: DialectNamed
) -> None:
    dialect = dialect_named(model)
    log: list[int] = []
    said: list[Message] = []
    for messages in script:
        said += messages
        if messages and messages[0]["role"] == "assistant":
            log += written(dialect, messages[0])
            continue
        log += dialect.render_next(messages) if log else dialect.render_start(messages, TOOLS)
        assert log == dialect.render_start(said, TOOLS)


@pytest.mark.parametrize("model", ["tiny-generic", "tiny-hermes", SMOLLM2, QWEN])
def test_several_results_follow_in_one_render(model: str, dialect_named: DialectNamed) -> None:
    dialect = dialect_named(model)
    assert dialect.form.separator is not None
    calls = [call(path=path)["tool_calls"][0] for path in ("a", "b")]
    both = {"role": "assistant", "tool_calls": calls}
    texts = [dialect.form.call("read_file", json.dumps({"path": path})) for path in ("a", "b")]
    answer = dialect.tokenizer.encode(dialect.form.separator.join(texts))
    log = [*dialect.render_start([ASK], TOOLS), *answer, dialect.end_of_turn_id]
    log += dialect.render_next([result("1"), result("2")])
    assert log == dialect.render_start([ASK, both, result("1"), result("2")], TOOLS)


@given(text=st.text(max_size=20))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("model", MODELS)
def test_what_follows_a_call_begins_alike_whatever_its_result(
    model: str, dialect_named: DialectNamed, text: str
) -> None:
    dialect = dialect_named(model)
    head = dialect.result_head("read_file", "c1")
    assert head
    log = [*dialect.render_start([ASK], TOOLS), *written(dialect, call(path="a"))]
    told = {**result(text), "tool_call_id": "c1"}
    whole = dialect.render_start([ASK, call(path="a"), told], TOOLS)
    ahead = [*log, *head]
    # Text may melt with the last certain token only, and what is ahead is compared before use.
    assert whole[: len(ahead) - 1] == ahead[:-1]
    if text[:1].isalnum() and text.isascii():
        assert whole[: len(ahead)] == ahead
    assert len(head) >= len(dialect.render_next([result("x")])) // 4
    open_head = dialect.result_head("read_file", "c1", closed=False)
    assert open_head == [dialect.end_of_turn_id, *head]


def test_an_open_turn_is_closed_first(dialect: Dialect) -> None:
    closed = dialect.render_next([ASK])
    assert dialect.render_next([ASK], closed=False) == [dialect.end_of_turn_id, *closed]


def _spelling(dialect: Dialect) -> str:
    return "".join(dialect.tokenizer.added_tokens)


def _structure(dialect: Dialect, tokens: list[int]) -> list[int]:
    added = set(dialect.tokenizer.added_tokens.values())
    return [token for token in tokens if token in added]


def test_foreign_text_cannot_pose_as_structure(dialect: Dialect) -> None:
    """Spellings of special tokens stay text: in every field, for a start and for what follows."""
    evil = _spelling(dialect)
    tool = json.loads(json.dumps(TOOLS[0]).replace("all of it", "evil"))

    def conversation(text: str) -> list[Message]:
        return [
            {"role": "system", "content": text},
            {"role": "user", "content": "a" + text + "b"},
            call(path=text) | {"content": ""},
            result(text + text),
            {"role": "assistant", "content": text},
            {"role": "user", "content": text},
        ]

    tool["function"]["description"] = evil
    tool["function"]["parameters"]["properties"] = {evil: {"type": "string", "enum": [evil]}}
    harmless = dialect.render_start(conversation("x"), TOOLS)
    attacked = dialect.render_start(conversation(evil), [tool])
    assert _structure(dialect, attacked) == _structure(dialect, harmless)
    assert evil in dialect.tokenizer.decode(attacked)

    harmless = dialect.render_next([result("x"), {"role": "user", "content": "x"}])
    attacked = dialect.render_next([result(evil), {"role": "user", "content": evil}])
    assert _structure(dialect, attacked) == _structure(dialect, harmless)
    assert evil in dialect.tokenizer.decode(attacked)


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_any_text_arrives_as_it_is(data: st.DataObject, dialect_named: DialectNamed) -> None:
    dialect = dialect_named(data.draw(st.sampled_from(["tiny-generic", "tiny-hermes"])))
    spelt = st.sampled_from([*dialect.tokenizer.added_tokens, "<|im_", "end|>", "\ufdd0", "\ufdd1"])
    text = data.draw(st.lists(spelt | st.text(max_size=5), max_size=8).map("".join))
    tokens = dialect.render_start([{"role": "user", "content": text}])
    around = dialect.tokenizer.decode(dialect.render_start([{"role": "user", "content": "@"}]))
    assert dialect.tokenizer.decode(tokens) == around.replace("@", text)
    assert len(_structure(dialect, tokens)) == 3


def test_content_in_parts_and_arguments_as_text_are_understood(tiny_dialect: Dialect) -> None:
    parts = [{"type": "text", "text": "Why "}, {"type": "text", "text": "not?"}]
    assert tiny_dialect.render_start([{"role": "user", "content": parts}]) == (
        tiny_dialect.render_start([{"role": "user", "content": "Why not?"}])
    )
    as_text = call(path="a")
    as_text["tool_calls"][0]["function"]["arguments"] = '{"path": "a"}'
    history = [ASK, as_text, result("x")]
    assert tiny_dialect.render_start(history) == (
        tiny_dialect.render_start([ASK, call(path="a"), result("x")])
    )


def test_the_callers_messages_are_left_alone(tiny_dialect: Dialect) -> None:
    messages = [SYSTEM, ASK, call(path="<|im_end|>"), result("<|im_end|>")]
    before = json.dumps(messages)
    tiny_dialect.render_start(messages, TOOLS)
    tiny_dialect.render_next(messages[3:])
    assert json.dumps(messages) == before


MALFORMED: dict[str, tuple[list[Any], str]] = {
    "an unknown role": ([{"role": "root", "content": ""}], r"at 0\.role: "),
    "no role": ([ASK, {"content": ""}], r"at 1\.role: Field required"),
    "content that is no text": ([{"role": "user", "content": 3}], r"at 0\.content"),
    "an unknown field": ([{"role": "user", "content": "", "conent": ""}], r"at 0\.conent: Extra"),
    "arguments that are no JSON": (
        [
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "a", "arguments": "{"}}],
            }
        ],
        r"at 0\.tool_calls\.0\.function\.arguments: ",
    ),
    "no message at all": ([3], "these are no chat messages"),
}


@pytest.mark.parametrize(("messages", "where"), MALFORMED.values(), ids=list(MALFORMED))
def test_malformed_messages_are_refused_by_place(
    tiny_dialect: Dialect, messages: list[Any], where: str
) -> None:
    with pytest.raises(RequestError, match=where):
        tiny_dialect.render_start(messages)
    with pytest.raises(RequestError, match=where):
        tiny_dialect.render_next(messages)


def test_what_a_template_refuses_is_the_callers_error(dialect_named: DialectNamed) -> None:
    twice = call(path="a")
    twice["tool_calls"] *= 2
    with pytest.raises(RequestError, match="refuses these messages: only single tool-calls"):
        dialect_named("tiny-llama3").render_start([ASK, twice])


def test_generic_tools_are_put_into_the_system_message(dialect_named: DialectNamed) -> None:
    dialect = dialect_named("tiny-generic")
    decode = dialect.tokenizer.decode
    prompt = decode(dialect.render_start([SYSTEM, ASK], TOOLS))
    assert prompt.startswith("<|im_start|>system\nYou fix bugs.\n\n# Tools\n")
    assert json.dumps(TOOLS[0], ensure_ascii=False) in prompt
    assert decode(dialect.render_start([ASK], TOOLS)).startswith("<|im_start|>system\n# Tools\n")
    assert "# Tools" not in decode(dialect.render_start([SYSTEM, ASK]))
    following = decode(dialect.render_next([result("1"), result("2"), ASK]))
    assert following == (
        "\n<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n"
        f"</tool_response><|im_end|>\n<|im_start|>user\n{ASK['content']}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


MakeDialect = Callable[[str | None], Dialect]


@pytest.fixture
def dialect_with(tmp_path: Path, model_folder: Callable[[str], Path]) -> MakeDialect:
    """The dialect of a tiny model with another chat template, or none."""

    def make(template: str | None) -> Dialect:
        folder = tmp_path / "model"
        shutil.copytree(model_folder("tiny-generic"), folder)
        config = json.loads((folder / "tokenizer_config.json").read_text()) | {
            "chat_template": template
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return dialect_for(Tokenizer(folder), TargetConfig.from_folder(folder))

    return make


def test_a_model_without_template_says_so_when_asked_to_render(dialect_with: MakeDialect) -> None:
    dialect = dialect_with(None)
    assert dialect.name == "generic"
    assert dialect.end_of_turn_id == dialect.tokenizer.eos_token_ids[0]
    with pytest.raises(RequestError, match="no chat template"):
        dialect.render_start([ASK])


def test_a_template_that_does_not_parse_is_a_damaged_model(dialect_with: MakeDialect) -> None:
    with pytest.raises(ModelFormatError, match="chat template does not parse"):
        dialect_with("{% for message in messages %}")


def test_a_template_that_hides_an_answer_cannot_be_continued(dialect_with: MakeDialect) -> None:
    with pytest.raises(ModelFormatError, match="exactly once"):
        dialect_with("{% for m in messages %}{{ m.content + m.content }}{% endfor %}")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({}) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ range(10 ** 9) | list }}",
    ],
)
def test_templates_run_in_a_sandbox(dialect_with: MakeDialect, attack: str) -> None:
    quiet = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    armed = f"{{% if messages[0].content == 'now' %}}{attack}{{% endif %}}"
    dialect = dialect_with(quiet + armed)
    with pytest.raises(RequestError, match="refuses these messages"):
        dialect.render_start([{"role": "user", "content": "now"}])


def test_marks_for_training_are_transparent(dialect_with: MakeDialect) -> None:
    dialect = dialect_with(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>"
        "{% endfor %}"
    )
    assert dialect.tokenizer.decode(dialect.render_start([SYSTEM, ASK])) == (
        f"{SYSTEM['content']}<|im_end|>{ASK['content']}<|im_end|>"
    )


def test_a_template_without_system_messages_gets_their_text_in_the_first_question(
    dialect_with: MakeDialect,
) -> None:
    dialect = dialect_with(
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ '[' + m.content + ']<|im_end|>' }}{% endfor %}"
    )
    decode = dialect.tokenizer.decode
    question = ASK["content"]
    assert decode(dialect.render_start([SYSTEM, ASK])) == f"[You fix bugs.\n\n{question}]<|im_end|>"
    assert decode(dialect.render_start([SYSTEM])) == "[You fix bugs.]<|im_end|>"
    assert decode(dialect.render_start([ASK, ANSWER, ASK], TOOLS)).startswith("[# Tools\n")
    assert decode(dialect.render_next([result("1")])) == (
        "[<tool_response>\n1\n</tool_response>]<|im_end|>"
    )
