"""IDs, W3C trace context, what travels to the engine, and the grammar of `Trace-Capture`."""

from __future__ import annotations

import contextlib
import random
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tracer import context
from tracer.context import (
    EXTRA_ARGS_KEY,
    Inbound,
    SpanContext,
    check_capture,
    format_capture,
    format_traceparent,
    from_extra_args,
    parse_capture,
    parse_traceparent,
    step_span_id,
    to_extra_args,
)
from tracer.errors import CaptureRequestError, CaptureUnavailableError, MissingExtraError
from tracer.records import AttentionSpec, CaptureSpec, EngineInfo, LayerInfo, LogitsSpec, QKSpec, TraceRequest

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

indices = st.lists(st.integers(0, 1023), min_size=1, max_size=40, unique=True).map(lambda found: tuple(sorted(found)))
dtypes = st.sampled_from(["f16", "f32"])
specs = st.builds(
    CaptureSpec,
    logits=st.none() | st.builds(LogitsSpec, top=st.none() | st.integers(1, 10**15 - 1), dtype=dtypes),
    attention=st.none()
    | st.builds(
        AttentionSpec,
        layers=st.none() | indices,
        heads=st.none() | indices,
        rows=st.sampled_from(["decode", "all"]),
        dtype=dtypes,
    ),
    summary=st.booleans(),
)


# The grammar


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("logits", CaptureSpec(LogitsSpec())),
        ("logits, attention", CaptureSpec(LogitsSpec(), AttentionSpec())),
        (
            'logits;top=256, attention=(10 20);heads="0-3"',
            CaptureSpec(LogitsSpec(256), AttentionSpec((10, 20), (0, 1, 2, 3))),
        ),
        (
            "attention=(29 0 14 14);rows=all;dtype=f32",
            CaptureSpec(None, AttentionSpec((0, 14, 29), None, "all", "f32")),
        ),
        ('attention;heads=" 7 , 0-2"', CaptureSpec(None, AttentionSpec(None, (0, 1, 2, 7)))),
        ("  summary\t,  logits=?0;top=3 ", CaptureSpec(summary=True)),
        ("logits;dtype=f32, logits;top=2", CaptureSpec(LogitsSpec(2))),  # RFC 9651: the last of equal keys wins.
        ("logits=?1, qk=?0", CaptureSpec(LogitsSpec())),
        ("qk", CaptureSpec(qk=QKSpec())),
        ("qk=(2 1);rows=all;dtype=f32", CaptureSpec(qk=QKSpec((1, 2), "all", "f32"))),
        ("logits=?0, attention=?0, summary=?0", None),
        ("", None),
        (" \t", None),
    ],
)
def test_grammar_accepts(text: str, spec: CaptureSpec | None) -> None:
    assert parse_capture(text) == spec


@pytest.mark.parametrize(
    ("text", "member", "allowed"),
    [
        ("logit", "logit", "logits, attention, qk, summary"),
        ("qk=1", "qk", "inner list"),
        ("qk;heads=1", "qk", "rows, dtype"),
        ("qk=()", "qk", "at least one layer"),
        ("logits=5", "logits", "?0 (off)"),
        ("logits=(1 2)", "logits", "?0 (off)"),
        ("summary;top=1", "summary", "no parameters"),
        ("logits;k=1", "logits", "top, dtype"),
        ("logits;top", "logits", "at least 1"),
        ("logits;top=0", "logits", "at least 1"),
        ("logits;top=1.5", "logits", "at least 1"),
        ("logits;dtype=bf16", "logits", "dtype=f16|f32"),
        ("attention;rows=prompt", "attention", "rows=decode|all"),
        ("attention=()", "attention", "at least one layer"),
        ("attention=(0 -1)", "attention", "from 0"),
        ("attention=(0;x 1)", "attention", "from 0"),
        ("attention;heads=3", "attention", 'heads="0-3,7"'),
        ('attention;heads="3-1"', "attention", 'heads="0-3,7"'),
        ('attention;heads="0-1024"', "attention", 'heads="0-3,7"'),
        ('attention;heads=""', "attention", 'heads="0-3,7"'),
        ("attention;layers=(0 5)", "", "logits, attention, qk, summary"),
        ("logits,", "", "logits, attention, qk, summary"),
        ("logits;top=2é", "", "logits, attention, qk, summary"),
        ("logits=@99999999999999", "", "logits, attention, qk, summary"),
        ("logits, " * 600, "", "at most 4096"),
    ],
)
def test_grammar_refuses_and_says_what_works(text: str, member: str, allowed: str) -> None:
    with pytest.raises(CaptureRequestError) as caught:
        parse_capture(text)
    error = caught.value
    assert error.member == member
    assert allowed in error.allowed
    assert error.allowed in str(error)
    assert error.example in str(error)
    assert parse_capture(error.example) is not None


@given(specs)
def test_text_and_spec_agree(spec: CaptureSpec) -> None:
    assert parse_capture(format_capture(spec)) == (None if spec == CaptureSpec() else spec)


def test_canonical_text() -> None:
    text = 'logits;top=5;dtype=f32, attention=(0 1);heads="0-3,7";rows=all, summary'
    spec = parse_capture(text)
    assert spec is not None
    assert format_capture(spec) == text


PIECES = ["logits", "attention", "summary", "qk", ";top=", ";heads=", ";rows=", ";dtype=", '"0-1023,', '"', "(", ")"]
PIECES += ["=", "?0", "?1", ", ", "f16", "all", "0", "9999999999999999", "-", " ", "@", ":", "%", "\\", "é", "\0", "*"]


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=200) | st.lists(st.sampled_from(PIECES), max_size=60).map("".join))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        spec = parse_capture(text)
    except CaptureRequestError:
        return
    assert spec is None or parse_capture(format_capture(spec)) == spec


@pytest.mark.parametrize(
    "text", ['attention;heads="' + "0-1023," * 580 + '0"', "a;" * 2048, "(" * 4096, "logits;top=1, " * 292 + "summary"]
)
def test_the_longest_texts_take_little_time(text: str) -> None:
    start = time.process_time()
    with contextlib.suppress(CaptureRequestError):
        parse_capture(text)
    assert time.process_time() - start < 0.5


def test_missing_parser_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "http_sf", None)
    assert parse_capture("") is None
    with pytest.raises(MissingExtraError, match=r"tensorspan\[serve\]"):
        parse_capture("logits")


# Against the engine


def layer(index: int, unsupported: str | None = None, heads: int = 9) -> LayerInfo:
    return LayerInfo(index, f"layers.{index}", heads, 3, 64, 0.125, unsupported=unsupported)


ENGINE = EngineInfo("m", "0.32.0", "V1", "cpu", "bfloat16", 1000, 2048, (layer(0), layer(1), layer(2, "Mamba layer")))


def check(text: str, *engines: EngineInfo) -> None:
    spec = parse_capture(text)
    assert spec is not None
    check_capture(spec, engines)


@pytest.mark.parametrize("text", ["logits;top=1000, attention, summary", 'attention=(0 1);heads="0-8"', "summary"])
def test_possible_captures_pass(text: str) -> None:
    check(text, ENGINE, replace(ENGINE, rank=1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attention=(0 3)", r"layer 3 is out of range; allowed: this model has layers 0-2"),
        ("attention=(2)", r"layer 2: Mamba layer"),
        ('attention=(1);heads="9"', r"head 9 is out of range; allowed: this model has heads 0-8"),
        ("logits;top=1001", r"allowed: top=1 to top=1000"),
    ],
)
def test_impossible_captures_say_the_range_and_an_example_that_works(text: str, message: str) -> None:
    with pytest.raises(CaptureRequestError, match=message) as caught:
        check(text, ENGINE)
    check(caught.value.example, ENGINE)


def test_what_the_model_lacks_is_the_requests_fault_and_what_we_lack_is_not() -> None:
    model = replace(ENGINE, attention_unsupported="MLA has no attention rows")
    with pytest.raises(CaptureRequestError, match="MLA") as caught:
        check("summary", model)
    assert caught.value.member == "summary"
    check(caught.value.example, model)
    with pytest.raises(CaptureUnavailableError, match="self-test failed; see tensorspan doctor"):
        check("attention", replace(ENGINE, attention_unsupported="unavailable: self-test failed"))
    with pytest.raises(CaptureUnavailableError, match="runner V2"):
        check("logits", ENGINE, replace(ENGINE, replica=1, logits_unsupported="unavailable: runner V2"))
    with pytest.raises(CaptureUnavailableError, match="layer 0: read-back differs"):
        check("attention=(0)", replace(ENGINE, layers=(layer(0, "unavailable: read-back differs"),)))


def test_no_layer_and_no_worker() -> None:
    with pytest.raises(CaptureRequestError, match="Mamba layer"):
        check("attention", replace(ENGINE, layers=(layer(2, "Mamba layer"),)))
    with pytest.raises(CaptureRequestError, match="no attention layers"):
        check("attention", replace(ENGINE, layers=()))
    with pytest.raises(CaptureUnavailableError, match=r"no worker has reported.*tensorspan doctor"):
        check("logits")


def test_a_layer_that_one_rank_cannot_capture_is_refused() -> None:
    ranks = (replace(ENGINE, world_size=2), replace(ENGINE, rank=1, world_size=2, layers=(layer(1, "odd rank"),)))
    with pytest.raises(CaptureRequestError, match="odd rank"):
        check("attention=(1)", *ranks)


# IDs


def test_ids_do_not_depend_on_the_random_module() -> None:
    drawn = set()
    for _ in range(2):
        random.seed(0)
        drawn |= {context.new_trace_id(), context.new_span_id()}
    assert len(drawn) == 4
    assert {len(found) for found in drawn} == {16, 32}


def test_all_zero_ids_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = [bytes(8), bytes(7) + b"\x01"]
    monkeypatch.setattr("os.urandom", lambda _: draws.pop(0))
    assert context.new_span_id() == "0000000000000001"


def test_step_ids_are_stable_distinct_and_keyed() -> None:
    steps = {step_span_id(SPAN, position, attempt) for position in range(500) for attempt in (1, 2)}
    assert len(steps) == 1000
    assert step_span_id(SPAN, 7, 1) == step_span_id(SPAN, 7, 1) != step_span_id("b7ad6b7169203332", 7, 1)
    written_out = blake2b(struct.pack("<qq", 7, 1), digest_size=8, key=SPAN.encode(), person=b"step")
    assert step_span_id(SPAN, 7, 1) == written_out.hexdigest(), "stores hold these IDs: they must not change"


def test_a_derived_id_is_never_all_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracer.context.blake2b", lambda *_, **__: SimpleNamespace(hexdigest=lambda: "0" * 16))
    assert step_span_id(SPAN, 7, 1) == "0000000000000001"


@given(st.integers(-1, 2**40), st.integers(0, 2**20))
def test_step_ids_are_span_ids(position: int, attempt: int) -> None:
    assert parse_traceparent(f"00-{TRACE}-{step_span_id(SPAN, position, attempt)}-01") is not None


def test_context_needs_no_engine_and_no_telemetry_sdk() -> None:
    code = (
        "import sys, tracer.context;"
        "sys.exit(any(m.split('.')[0] in ('vllm','torch','opentelemetry','http_sf','numpy') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_clock_is_wall_clock_and_never_runs_backwards() -> None:
    readings = [context.wall_clock_ns() for _ in range(1000)]
    assert readings == sorted(readings)
    assert abs(readings[-1] - time.time_ns()) < 5_000_000_000


# W3C Trace Context


@pytest.mark.parametrize(
    ("value", "sampled", "flags"),
    [
        (f"00-{TRACE}-{SPAN}-01", True, "01"),
        (f"00-{TRACE}-{SPAN}-00", False, "00"),
        (f"00-{TRACE}-{SPAN}-03", True, "03"),  # Level 2: the random flag is passed on.
        (f"00-{TRACE}-{SPAN}-ff", True, "03"),  # Unknown flags are not.
        (f"\t 00-{TRACE}-{SPAN}-01 ", True, "01"),
        (f"cc-{TRACE}-{SPAN}-01", True, "01"),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-brings", True, "01"),
    ],
)
def test_traceparent_accepts(value: str, sampled: bool, flags: str) -> None:
    parsed = parse_traceparent(value)
    assert parsed == SpanContext(TRACE, SPAN, sampled)
    assert format_traceparent(parsed) == f"00-{TRACE}-{SPAN}-{flags}"


@pytest.mark.parametrize(
    "value",
    [
        "",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-01\n",
        f"cc-{TRACE}-{SPAN}-01.more",
        f"ff-{TRACE}-{SPAN}-01",
        f"0-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-0x",
        f"00-{TRACE}-{SPAN}-01, 00-{TRACE}-{SPAN}-01",
    ],
)
def test_traceparent_refuses(value: str) -> None:
    assert parse_traceparent(value) is None


@given(st.text(max_size=80))
def test_traceparent_never_raises(value: str) -> None:
    parse_traceparent(value)


# To the engine and back


def plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(item) for key, item in value.items())
    return all(map(plain, value)) if isinstance(value, list) else value is None or type(value) in (str, int, bool)


@given(st.booleans(), st.none() | specs)
def test_trace_request_survives_the_way_to_the_engine(sampled: bool, spec: CaptureSpec | None) -> None:
    request = TraceRequest(TRACE, SPAN, sampled, spec)
    sent = to_extra_args(request)
    assert plain(sent)
    assert from_extra_args({EXTRA_ARGS_KEY: sent, "other": object()}) == request


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
parts = st.fixed_dictionaries({"logits": json_like, "attention": json_like, "summary": json_like})
broken = st.fixed_dictionaries(
    {"trace_id": st.just(TRACE) | json_like, "span_id": st.just(SPAN) | json_like, "sampled": json_like},
    optional={"capture": parts | json_like},
)


@given(broken | json_like)
def test_what_is_not_ours_is_ignored(value: Any) -> None:
    found = from_extra_args({EXTRA_ARGS_KEY: value})
    assert found is None or from_extra_args({EXTRA_ARGS_KEY: to_extra_args(found)}) == found


def test_absent_request() -> None:
    assert from_extra_args(None) is None
    assert from_extra_args({}) is None
    assert from_extra_args({"trace_capture": "logits"}) is None


# Generations of one request


def test_generation_ids_are_known_before_they_are_asked_for() -> None:
    inbound = Inbound(TRACE, SPAN)
    refs = inbound.refs(5)
    assert [inbound.issue()[1] for _ in range(5)] == [inbound.generation_id(k) for k in range(5)]
    assert refs == tuple(f"{TRACE}/{inbound.generation_id(k)}" for k in range(5))
    assert len(set(refs)) == 5
    assert inbound.issue() == (TRACE, inbound.generation_id(5))
    assert Inbound(TRACE, SPAN).generation_id(0) != inbound.generation_id(0)


def test_offline_generations_are_traces_of_their_own() -> None:
    inbound = Inbound.offline(CaptureSpec(LogitsSpec()))
    issued = [inbound.issue() for _ in range(3)]
    assert inbound.refs(3) == tuple("/".join(pair) for pair in issued)
    assert len({trace for trace, _ in issued}) == 3
    assert issued[0][0] == inbound.trace_id
    joined = replace(inbound, parent_span_id=SPAN)
    assert {joined.issue()[0] for _ in range(3)} == {joined.trace_id}


def in_threads(count: int, work: Callable[[], None]) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_never_get_the_same_generation() -> None:
    inbound = Inbound(TRACE)
    seen: list[str] = []

    def work() -> None:
        seen.extend(inbound.issue()[1] for _ in range(200))

    in_threads(8, work)
    assert set(seen) == {inbound.generation_id(k) for k in range(1600)}
    assert len(seen) == 1600
