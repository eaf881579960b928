"""The command as a user calls it: `main` with arguments, what it prints, how it ends."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporters.otel_spans import OtelExporter
from tests.exporters.synthetic import DECODE, NOTHING, SPAN, TRACE, Synthetic, write
from tracer.cli import main
from tracer.config import Settings
from tracer.records import AttentionSummary, CaptureSpec, GenerationStart, LogitsSpec, RequestSpan, StepRecord

SERVER_SPAN = "00f067aa0ba902b7"
OTHER_TRACE, OTHER_SPAN = "f" * 32, "a" * 16


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with one capture, in the current directory's default place."""
    for name in [name for name in os.environ if name.startswith(("TENSORSPAN_", "OTEL_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "captures"
    write(root, Synthetic(steps=6, prompt=7, spec=DECODE))
    return root


def export_spans(store: Path, generation: Synthetic, **settings: Any) -> None:
    """The same generation as spans in the store's file, below a request span."""
    out = OtelExporter(Settings(store=str(store), **settings))
    look = AttentionSummary(1.5, 0.4, 0.9, 0.1, 3, 0.7, 2, 1)
    for record, _ in generation.records():
        changed = record
        if isinstance(record, StepRecord):
            changed = replace(record, attention=look, tokens=1 if record.step else generation.prompt)
        elif record == generation.start():
            changed = generation.start(parent_span_id=SERVER_SPAN)
        out.export(changed, NOTHING)
    route = "/v1/chat/completions"
    out.export(RequestSpan(generation.trace_id, SERVER_SPAN, None, 900, 9_500, "POST", route, 200), NOTHING)
    assert out.force_flush(5)
    assert out.shutdown(5)


@pytest.fixture
def spans(store: Path) -> Path:
    export_spans(store, Synthetic(steps=6, prompt=7, spec=DECODE))
    return store


Run = Any


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("list", "--json")` → (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def parsed(result: tuple[int, str, str]) -> Any:
    code, out, err = result
    assert (code, err) == (0, "")
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


# -- list ----------------------------------------------------------------------------------------------------------


def test_list(store: Path, run: Run) -> None:
    code, out, err = run("list")
    assert (code, err) == (0, "")
    head, line = out.splitlines()
    assert head.split() == ["started", "trace/span", "model", "tokens", "on", "disk", "state"]
    assert f"{TRACE}/{SPAN}" in line
    assert "7+6" in line
    assert line.endswith("complete")
    assert run("list", store)[1] == out


def test_list_json_names_size_and_state(store: Path, run: Run) -> None:
    write(store, replace(Synthetic(span_id=OTHER_SPAN, trace_id=OTHER_TRACE)))
    entries = parsed(run("list", "--json"))
    assert {(e["trace_id"], e["span_id"]) for e in entries} == {(TRACE, SPAN), (OTHER_TRACE, OTHER_SPAN)}
    for entry in entries:
        files = [path for path in Path(entry["path"]).rglob("*") if path.is_file()]
        assert entry["bytes_on_disk"] == sum(path.stat().st_size for path in files)


def test_list_of_an_empty_store_says_how_to_fill_it(tmp_path: Path, run: Run) -> None:
    code, out, err = run("list", tmp_path)
    assert (code, out) == (1, "")
    assert "no captures in" in err
    assert "Trace-Capture" in err
    assert parsed(run("list", tmp_path, "--json")) == []


# -- tree ----------------------------------------------------------------------------------------------------------


def test_tree_from_the_spans_file(spans: Path, run: Run) -> None:
    code, out, err = run("tree")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == f"trace {TRACE} (./captures/spans)"
    assert lines[2].startswith("POST /v1/chat/completions 200")
    assert lines[3].startswith("└─ chat tiny 7 → 6 tokens, stop")
    assert lines[4].startswith("├─ prefill (7 tokens) 'o0' 0.61 0.50")
    assert lines[9].startswith("└─ decode 'o5'")
    # p, entropy, margin, sink mass, prompt mass, the strongest look with the text of its position.
    assert lines[5] == "├─ decode 'o1' 0.22 1.50 0.12 0.40 0.90 0.70 'p3 ' (L2 H1) 0.0"


def test_tree_is_rebuilt_from_captures(store: Path, run: Run) -> None:
    code, out, err = run("tree")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "rebuilt from the captures" in lines[0]
    assert lines[2].startswith("chat tiny 7 → 6 tokens, stop")
    assert lines[3].startswith("├─ prefill 'o0' 0.61 0.50")
    assert lines[8].startswith("└─ decode")


def test_tree_json_is_the_same_tree_from_either_source(store: Path, run: Run) -> None:
    rebuilt = parsed(run("tree", "--json"))
    export_spans(store, Synthetic(steps=6, prompt=7, spec=DECODE))
    told = parsed(run("tree", "--json"))
    assert (rebuilt["source"], told["source"]) == ("captures", "spans")
    [request], [generation] = told["roots"], rebuilt["roots"]
    assert request["span_id"] == SERVER_SPAN
    [told_generation] = request["children"]
    assert told_generation["span_id"] == generation["span_id"] == SPAN
    for one, other in zip(generation["children"], told_generation["children"], strict=True):
        for name in ("name", "span_id", "parent_id", "token"):
            assert one[name] == other[name]
        for name in ("tensorspan.step.index", "tensorspan.token.logprob", "tensorspan.logits.entropy"):
            assert one["attributes"][name] == other["attributes"][name]


@pytest.mark.parametrize("what", [TRACE, SPAN, f"{TRACE}/{SPAN}", "f000000000000003", f"{TRACE}/{SPAN}/3"])
def test_tree_takes_any_id(spans: Path, run: Run, what: str) -> None:
    assert parsed(run("tree", what, "--json"))["trace_id"] == TRACE


@pytest.mark.parametrize("below", ["", TRACE, f"{TRACE}/{SPAN}", f"{TRACE}/{SPAN}/"])
def test_tree_takes_any_path(spans: Path, run: Run, below: str) -> None:
    assert parsed(run("tree", f"{spans}/{below}", "--json"))["source"] == "spans"


def test_a_trace_without_a_capture_has_ids_for_texts(tmp_path: Path, run: Run) -> None:
    export_spans(tmp_path, Synthetic(steps=3, spec=CaptureSpec()), content=True)
    code, out, _ = run("tree", "f000000000000001", "--store", tmp_path)
    assert code == 0
    assert "#1 " in out
    assert "position 3 (L2 H1)" in out


def test_tree_shortens_long_generations(spans: Path, run: Run) -> None:
    _, out, _ = run("tree", "--steps", 2)
    lines = out.splitlines()
    assert len(lines) == 7
    assert lines[-1] == "   └─ … 4 more steps (--steps)"


def test_a_torn_last_line_is_skipped(spans: Path, run: Run) -> None:
    [file] = (spans / "spans").glob("*.jsonl")
    with file.open("a") as out:
        out.write('{"resourceSpans":[{"scopeSpans":[{"spans":[{"traceId":"' + TRACE)
    assert parsed(run("tree", TRACE, "--json"))["source"] == "spans"


def test_two_choices_are_two_generations(store: Path, run: Run) -> None:
    write(store, Synthetic(steps=2, span_id=OTHER_SPAN, spec=DECODE))
    roots = parsed(run("tree", TRACE, "--json"))["roots"]
    assert sorted(root["span_id"] for root in roots) == sorted([SPAN, OTHER_SPAN])


# -- show ----------------------------------------------------------------------------------------------------------


def test_show(store: Path, run: Run) -> None:
    code, out, err = run("show", SPAN)
    assert (code, err) == (0, "")
    for part in (
        f"{TRACE}/{SPAN}  tiny  7 prompt + 6 output tokens  complete",
        "p0 p1 p2",
        "o0o1o2o3o4o5",
        "step 6  vocab 50",
        "least certain tokens",
        "where the answer looked (all steps, all layers, all heads)",
        "position 0, where heads rest, took",
        "from tracer import open_capture",
    ):
        assert part in out
    assert "missing" not in out


def test_show_json_numbers_are_those_of_the_arrays(store: Path, run: Run) -> None:
    generation = Synthetic(steps=6, prompt=7, spec=DECODE)
    facts = parsed(run("show", SPAN, "--json"))
    assert facts["complete"] is True
    assert facts["answer"] == "o0o1o2o3o4o5"
    assert {a["name"]: a["shape"] for a in facts["arrays"]}["logits"] == {"step": 6, "vocab": 50}
    assert [item["step"] for item in facts["least_certain"]] == [5, 4, 3, 2, 1]
    row = generation.logits[5].astype(float)
    expected = math.exp(row.max()) / sum(math.exp(z) for z in row)
    assert facts["least_certain"][0]["alternatives"][0][1] == pytest.approx(expected)
    means = sum(rows.astype(float).mean(axis=(0, 1))[:7] for rows in generation.rows) / 6
    assert [look["weight"] for look in facts["looked_at"]] == pytest.approx(list(means), rel=1e-5)
    assert [look["region"] for look in facts["looked_at"]] == ["system"] * 2 + ["user"] * 5


@pytest.mark.parametrize("what", ["f000000000000003", f"{TRACE}/{SPAN}/3"])
def test_show_opens_the_row_of_a_step(store: Path, run: Run, what: str) -> None:
    generation = Synthetic(steps=6, prompt=7, spec=DECODE)
    facts = parsed(run("show", what, "--json", "--layer", 2, "--head", 1))
    assert (facts["step"]["index"], facts["step"]["token_id"]) == (3, 3)
    weights = [look["weight"] for look in facts["looked_at"]]
    assert weights == pytest.approx(generation.rows[3][2, 1].tolist())
    assert len(facts["alternatives"]) == 10
    assert run("show", what)[1].count("step 3") == 2


def test_show_names_what_exists(store: Path, run: Run) -> None:
    for arguments, text in (
        (("show", "00000000000000ff"), f"it holds 1: {TRACE}/{SPAN}"),
        (("show", "xyz"), "neither a span ID"),
        (("show", SPAN, "--step", 6), "step 6 is not in this capture; it has 0 to 5"),
        (("show", SPAN, "--layer", 3), "layer 3 is not in this capture; it has 0 to 2"),
        (("show", SPAN, "--head", 2), "head 2 is not in this capture; it has 0 to 1"),
        (("tree", "00000000000000ff"), f"it holds 1: {TRACE}/{SPAN}"),
        (("tree", OTHER_TRACE), f"knows no trace {OTHER_TRACE}"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (1, "")
        assert text in err
        assert err.count("\n") == 1


def test_show_without_attention_or_texts(tmp_path: Path, run: Run) -> None:
    generation = Synthetic(steps=3, spec=CaptureSpec(LogitsSpec(top=3)))
    path = write(tmp_path, generation, capture_text=False)
    code, out, _ = run("show", path)
    assert code == 0
    assert "where the answer looked" not in out
    facts = parsed(run("show", path, "--json"))
    assert facts["looked_at"] == []
    assert len(facts["least_certain"][0]["alternatives"]) == 3


def test_the_lines_that_load_a_capture_do(store: Path, run: Run) -> None:
    lines = parsed(run("show", SPAN, "--json"))["load"]
    assert len(lines) == 3
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout == "o0o1o2o3o4o5 (6, 50) (6, 2, 12)\n"


def test_token_text_is_never_markup(tmp_path: Path, run: Run) -> None:
    from tracer.show import emit, plain_table

    table = plain_table("token")
    table.add_row("plain")
    emit(table)

    class Marked(Synthetic):
        def start(self, **changes: Any) -> GenerationStart:
            return super().start(prompt_token_bytes=(b"[b]",) * self.prompt)

    assert "'[b]'" in run("show", write(tmp_path, Marked(steps=2, spec=DECODE)))[1]


# -- recover -------------------------------------------------------------------------------------------------------


@pytest.fixture
def killed(store: Path) -> Path:
    """A second capture in the store, of a writer that died after 4 steps."""
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tests.exporters.synthetic import DECODE, Synthetic, exporter\n"
        "work, out = Synthetic(steps=4, spec=DECODE, span_id=sys.argv[2]), exporter(Path(sys.argv[1]))\n"
        "for record, payload in list(work.records())[:-1]:\n"
        "    out.export(record, payload)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, str(store), OTHER_SPAN], cwd=root, check=False)
    assert done.returncode == -9
    return store / TRACE / OTHER_SPAN


def test_recover(store: Path, killed: Path, run: Run) -> None:
    assert {entry["status"] for entry in parsed(run("list", "--json"))} == {"ok", "open"}
    code, out, err = run("recover")
    assert (code, err) == (0, "")
    assert out.splitlines() == [f"captures/{TRACE}/{OTHER_SPAN}", "1 closed in ./captures"]
    [entry] = [entry for entry in parsed(run("list", "--json")) if entry["span_id"] == OTHER_SPAN]
    assert (entry["status"], entry["output_tokens"], entry["complete"]) == ("interrupted", 4, False)
    assert "the exporter process was killed" in run("show", OTHER_SPAN)[1]
    assert parsed(run("recover", store, "--json")) == []


def test_recover_says_what_is_wrong(store: Path, killed: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, parts: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.writev", full)
        code, out, err = run("recover")
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert "No space left on device" in err
    assert "free space" in err
    assert parsed(run("recover", "--json")) == [str(Path("captures") / TRACE / OTHER_SPAN)]


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "required: COMMAND"),
        (("lost",), "invalid choice: 'lost'"),
        (("list", "--frob"), "unknown argument '--frob' of list"),
        (("show",), "required: ID"),
        (("tree", "--steps", "some"), "'some' is not a whole number"),
        (("serve",), "which model?"),
        (("serve", "--max-model-len", "10"), "which model?"),
        (("serve", "m", "--queue-mb", "much"), "TENSORSPAN_QUEUE_MB='much'"),
        (("serve", "m", "--capture", "nobody"), "must be one of off, loopback, key, all"),
        (("serve", "m", "--capture", "key"), "set TENSORSPAN_CAPTURE_KEY"),
    ],
)
def test_wrong_use_is_one_line_and_code_2(store: Path, run: Run, arguments: tuple[str, ...], text: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("tensorspan: ")
    assert text in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", [("list",), ("tree",), ("show", SPAN)])
def test_a_store_that_is_not_there(tmp_path: Path, run: Run, command: tuple[str, ...]) -> None:
    where = tmp_path / "nowhere"
    store = ("--store", where) if command[0] != "list" else (where,)
    code, out, err = run(*command, *store)
    assert (code, out) == (1, "")
    assert f"no store at {where}" in err
    assert err.count("\n") == 1


def test_a_closed_pipe_is_not_an_error(store: Path) -> None:
    command = f"{sys.executable} -m tracer.cli show {SPAN} --json | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_import_is_light() -> None:
    code = "import sys, tracer.cli; print(*(n for n in ('numpy', 'zarr', 'rich', 'torch', 'vllm') if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
