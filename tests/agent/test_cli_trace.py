"""``run --trace`` and ``trace``: the file, the page, and what the page does in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest

from dspark_agent import Agent, FunctionModel, Model, TestModel, Timeline, ToolCallPart
from dspark_agent.cli import main
from dspark_agent.cli import run as run_command
from dspark_agent.messages import ModelResponse, TextPart
from dspark_agent.metrics import StepMetrics

UseModel = Callable[[Model], None]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EVIL = "</script><script>document.title='owned'</script><b>bold</b>"


@pytest.fixture
def use_model(monkeypatch: pytest.MonkeyPatch) -> UseModel:
    def use(model: Model) -> None:
        monkeypatch.setattr(run_command, "open_model", lambda *_names, **_options: model)

    return use


def test_a_run_is_recorded_and_drawn(
    use_model: UseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    use_model(TestModel(custom_output_text="a secret"))
    assert main(["run", "say", "--trace", str(file), "-q"]) == 0
    assert "secret" not in file.read_text()
    assert main(["run", "say", "--trace", str(file), "--trace-content", "-q"]) == 0
    assert Timeline.read(file).steps[0].text == "a secret"
    capsys.readouterr()

    assert main(["trace", str(file)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run.html")
    assert "a secret" in (tmp_path / "run.html").read_text()


def test_a_run_that_fails_is_recorded_as_far_as_it_got(use_model: UseModel, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    use_model(FunctionModel(lambda *_: ToolCallPart(tool_name="list_files", args={})))
    arguments = ["run", "x", "-w", str(tmp_path), "--max-steps", "2", "--trace", str(file)]
    assert main(arguments) == 2
    steps = Timeline.read(file).steps
    assert [step.error for step in steps] == [None, None, "UsageLimitExceeded"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["run", "x", "--trace-content"], "--trace-content needs --trace"),
        (["run", "x", "--trace", "no/such/folder/run.json"], "no/such/folder/run.json"),
        (["trace", "no-such-file.json"], "no-such-file.json"),
    ],
)
def test_mistakes_are_named(
    use_model: UseModel,
    arguments: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_model(TestModel())
    assert main(arguments) == 2
    assert complaint in capsys.readouterr().err


def test_a_file_that_is_no_recording_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "page.html"
    file.write_text("{}")
    assert main(["trace", str(file)]) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert main(["trace", str(file), "--out", str(tmp_path / "out.html")]) == 2
    assert "is not a recorded run: started_at" in capsys.readouterr().err
    assert not (tmp_path / "out.html").exists()


def test_the_page_needs_nothing_from_outside() -> None:
    html = sample().html()
    assert "http://" not in html.replace("http://www.w3.org/", "")
    assert "https://" not in html
    assert "default-src 'none'" in html


def sample() -> Timeline:
    """Two turns with an account, sources and a hostile text."""

    def say(text: str) -> str:
        """Say.

        Args:
            text: what.
        """
        return EVIL

    metrics = StepMetrics(
        queue_s=0.0, prefill_s=1e-6, decode_s=1e-6, new_tokens=30,
        proposed={"model": 10, "forced": 12, "dspark": 20},
        accepted={"model": 10, "forced": 12, "dspark": 8},
    )  # fmt: skip
    call = ToolCallPart(tool_name="say", args={"text": EVIL})
    answers = iter(
        [
            ModelResponse(parts=(call,), metrics=metrics),
            ModelResponse(parts=(TextPart(content=EVIL),)),
        ]
    )
    model = FunctionModel(lambda *_: next(answers), model_name=EVIL)
    result = Agent(model, tools=[say], name=EVIL).run_sync(EVIL)
    assert result.steps[0].trace is not None
    for source, tokens in [("forced", 12), ("model", 10), ("dspark", 8)]:
        result.steps[0].trace.wrote(source, tokens, EVIL)
    return result.timeline(content=True)


PROBE = """
<script>
{
const seen = { state: document.documentElement.dataset.state, title: document.title };
const width = () => Math.max(...[...document.querySelectorAll("#chart .step")]
  .map((step) => step.querySelector("rect").width.baseVal.value));
seen.steps = document.querySelectorAll("#chart .step").length;
seen.rows = document.querySelectorAll("#steps tbody tr").length;
seen.fills = [...document.querySelectorAll("#chart rect[data-hit]")]
  .map((r) => r.getAttribute("fill"));
seen.sources = $("source-legend").textContent;
const before = width();
$("zoom-in").click();
seen.grew = width() / before;
$("chart").dispatchEvent(new KeyboardEvent("keydown", { key: "0" }));
seen.back = width() / before;
const bar = document.querySelector('#chart rect[fill="var(--dspark)"]');
bar.dispatchEvent(new PointerEvent("pointermove", { bubbles: true, clientX: 300, clientY: 200 }));
seen.tip = $("tip").hidden ? null : $("tip").textContent;
const step = document.querySelectorAll("#chart .step")[0];
step.dispatchEvent(new MouseEvent("dblclick", { bubbles: true }));
seen.filled = Number(document.querySelector("#chart .step rect").getAttribute("width")) > 900;
document.querySelectorAll("#steps tbody tr")[1].click();
seen.detail = $("detail").querySelector("h2").textContent;
document.querySelectorAll("#steps tbody tr")[0].click();
seen.marks = document.querySelectorAll("#detail mark").length;
const theme = () => getComputedStyle(document.body).backgroundColor;
const light = theme();
$("theme").click();
seen.themes = light !== theme();
const probe = document.createElement("pre");
probe.id = "probe";
probe.textContent = JSON.stringify(seen);
document.body.append(probe);
}
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium to look at the page")
def test_the_page_works_in_a_browser(tmp_path: Path) -> None:
    assert CHROMIUM is not None
    page = tmp_path / "run.html"
    page.write_text(sample().html().replace("</body>", PROBE + "</body>"), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,900",
         "--virtual-time-budget=2000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-2000:]
    seen = json.loads(unescape(found[1]))

    assert seen["state"] == "ready"
    assert seen["title"].endswith("dspark-agent trace"), "what the agent is called is no script"
    assert (seen["steps"], seen["rows"]) == (2, 2)
    assert {"var(--prefill)", "var(--tool)", "var(--forced)", "var(--dspark)"} <= set(seen["fills"])
    assert "dspark 8/20" in seen["sources"]
    assert seen["grew"] == pytest.approx(1 / 0.6, rel=0.01)
    assert seen["back"] == pytest.approx(1.0)
    assert seen["tip"].startswith("8 tokens by dspark")
    assert seen["filled"]
    assert seen["detail"].startswith("Step 2")
    assert seen["marks"] == 3
    assert seen["themes"]
