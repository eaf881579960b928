"""Samplers and rules: OpenTelemetry's own decisions, and ours where nobody has decided."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased

from tracer.config import Settings, load
from tracer.context import new_trace_id
from tracer.errors import CaptureRequestError, SettingsError
from tracer.sampling import Sampler, parse_rules
from tracer.step_spans import parse_step_spans

FIXED = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Sampler:
    name, argument = request.param
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", name)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", argument)
    return Sampler.of(Settings())


@pytest.mark.parametrize(
    ("sampler", "decisions"),
    [
        (("", ""), (True, True, False)),
        (("parentbased_always_on", ""), (True, True, False)),
        (("parentbased_always_off", ""), (False, True, False)),
        (("parentbased_traceidratio", "0"), (False, True, False)),
        (("always_on", ""), (True, True, True)),
        (("always_off", ""), (False, False, False)),
        (("traceidratio", "1"), (True, True, True)),
        (("xray", ""), (True, True, False)),
        (("traceidratio", "many"), (True, True, True)),
    ],
    indirect=["sampler"],
)
def test_the_standard_samplers(sampler: Sampler, decisions: tuple[bool, bool, bool]) -> None:
    assert tuple(sampler.decide(FIXED, parent, {}) for parent in (None, True, False)) == decisions


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_a_ratio_is_decided_as_opentelemetry_decides_it(ratio: float) -> None:
    ours, theirs = Sampler(ratio), TraceIdRatioBased(ratio)
    for trace_id in (new_trace_id() for _ in range(500)):
        want = theirs.should_sample(None, int(trace_id, 16), "x").decision is Decision.RECORD_AND_SAMPLE
        assert ours.decide(trace_id, None, {}) is want


def test_the_first_rule_that_fits_decides_where_nobody_has() -> None:
    rules = parse_rules("path=/v1/completions 0; tenant=acme,model=llama-* 1; model=* 0 ;")
    sampler = Sampler(1.0, rules=rules)
    facts = {"path": "/v1/chat/completions", "tenant": "acme", "model": "llama-3"}
    assert sampler.decide(FIXED, None, facts)
    assert not sampler.decide(FIXED, None, facts | {"path": "/v1/completions"})
    assert not sampler.decide(FIXED, None, facts | {"tenant": "other"})
    assert sampler.decide(FIXED, None, {"path": "/v1/chat/completions"}), "no rule fits an unknown model"
    assert sampler.decide(FIXED, True, facts | {"path": "/v1/completions"}), "the caller has decided"
    assert sampler.asks_for_model
    assert not Sampler(1.0, rules=parse_rules("tenant=a 0")).asks_for_model
    assert not Sampler(0.0, rules=parse_rules("0.0")).decide(FIXED, None, {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path=/v1 2", "'2' is not a ratio"), ("path=/v1", "'path=/v1' is not a ratio"), ("host=a 1", "is not one of"),
        ("path= 1", "is not one of"), ("path=/v1 nan", "not a ratio"), ("path=/a, 1", "is not one of"),
    ],
)  # fmt: skip
def test_rules_that_cannot_be_understood(text: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as error:
        parse_rules(text)
    assert "example: path=/v1/completions 0.1" in str(error.value)


def test_no_spans_at_all() -> None:
    assert not Sampler.of(Settings(trace=False)).decide(FIXED, True, {})


@pytest.mark.parametrize(("text", "every"), [("all", 1), ("summary", 0), (" Every:16 ", 16), ("every:1", 1)])
def test_step_spans(text: str, every: int) -> None:
    assert parse_step_spans(text) == every


@pytest.mark.parametrize("text", ["", "none", "every", "every:0", "every:-1", "every:1.5", "every:9999999", "all, all"])
def test_step_spans_that_are_none(text: str) -> None:
    with pytest.raises(CaptureRequestError, match="allowed: all, every:N"):
        parse_step_spans(text)
    with pytest.raises(SettingsError, match="TENSORSPAN_STEP_SPANS is"):
        load({"step_spans": text})
