"""Every record survives the wire, and the wire refuses what is not a record."""

from __future__ import annotations

import msgspec
import pytest

from tracer import wire
from tracer.records import (
    ArrayRecord,
    ArraySlice,
    AttentionSpec,
    AttentionSummary,
    CaptureSpec,
    EngineInfo,
    FlushRecord,
    GenerationEnd,
    GenerationStart,
    LayerInfo,
    LogitsSpec,
    LogitsSummary,
    LogLine,
    PlainGeneration,
    Record,
    Region,
    RequestSpan,
    StepRecord,
    WorkerEnd,
)

TRACE, SPAN, STEP = "0123456789abcdef" * 2, "0123456789abcdef", "fedcba9876543210"
SLICE = ArraySlice("logits", "float16", (7,), 0, (0,))
LOGITS = LogitsSummary(1.0, 2.0, 0.5, -0.25, 0, (4, 2), (-0.25, -1.0))
ATTENTION = AttentionSummary(1.0, 0.5, 0.25, 0.1, 3, 0.2, 1, 2)
CAPTURE = CaptureSpec(LogitsSpec(), AttentionSpec((0, 2), None, "all", "f32"))
RECORDS: list[Record] = [
    EngineInfo("m", "0.32.0", "V1", "cpu", "float32", 10, 20, (LayerInfo(0, "l", 4, 2, 8, 0.5, sinks=True),)),
    StepRecord(TRACE, SPAN, STEP, 3, "decode", 1, 9, 1, 10, 5, 6, token_id=4, logits=LOGITS, attention=ATTENTION,
               arrays=(SLICE,), dropped=("attention: queue full",)),
    ArrayRecord(TRACE, SPAN, 2, (SLICE,)),
    WorkerEnd(TRACE, SPAN, 1, 7),
    GenerationStart(TRACE, SPAN, None, True, 1, "r", "m", "chat", params={"temperature": 0.0, "stop_sequences": ["a"]},
                    capture=CAPTURE, prompt_token_ids=(1, 2), prompt_token_bytes=(b"\xff", b"a"),
                    regions=(Region("user", 0, 2),)),
    GenerationEnd(TRACE, SPAN, 9, "ok", "stop", 3, output_token_bytes=(b"\x80",)),
    RequestSpan(TRACE, SPAN, None, 1, 2, "POST", "/v1/completions", 200, attributes={"a": 1, "b": 0.5, "c": "d"}),
    FlushRecord("t", (SPAN,)),
    PlainGeneration("m", "chat", 5, SPAN, 1, 7, 9, "error", "ValueError: x", 3, 6),
    LogLine(1, 30, "tensorspan.zarr", "said", "OSError", TRACE, SPAN, True),
]  # fmt: skip


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_round_trip(record: Record) -> None:
    kind, data = wire.encode(record)
    assert wire.decode(kind, memoryview(data)) == record


def test_json_round_trip() -> None:
    assert wire.decode_json(wire.encode_json(RECORDS[0]), EngineInfo) == RECORDS[0]


def test_other_bytes_are_refused() -> None:
    kind, _ = wire.encode(RECORDS[1])
    with pytest.raises(msgspec.MsgspecError):
        wire.decode(kind, b"\x81\xa1a\x01")
