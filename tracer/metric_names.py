"""Every metric: name, kind, unit and meaning, pinned here as spans' names are in `tracer.semconv`.

Sources: `gen_ai.server.*` and their buckets are those of github.com/open-telemetry/semantic-conventions-genai,
`docs/gen-ai/gen-ai-metrics.md` at commit 004902b8cb70aa5ae6ca4ae07132b7daabcd3e10 (status Development). Of tokens the
conventions know a metric of clients only: ours has its attributes and buckets, and a name that no client uses, so that
a backend that sees both sides does not count twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

__all__ = [
    "ARRAYS_DROPPED",
    "CAPTURE_BYTES",
    "CAPTURE_FINISHED",
    "CAPTURE_LOST",
    "CAPTURE_OPEN",
    "EXPORTER_FAILURES",
    "METRICS",
    "QUEUE_LIMIT",
    "QUEUE_USAGE",
    "RECORDS_LOST",
    "REQUEST_DURATION",
    "SPANS_LOST",
    "STORE_SIZE",
    "TIME_PER_OUTPUT_TOKEN",
    "TIME_TO_FIRST_TOKEN",
    "TOKEN_USAGE",
    "WRITER_LAG",
    "Instrument",
]

REQUEST_DURATION: Final = "gen_ai.server.request.duration"
TIME_TO_FIRST_TOKEN: Final = "gen_ai.server.time_to_first_token"
TIME_PER_OUTPUT_TOKEN: Final = "gen_ai.server.time_per_output_token"
TOKEN_USAGE: Final = "tensorspan.token.usage"
CAPTURE_BYTES: Final = "tensorspan.capture.bytes"
CAPTURE_OPEN: Final = "tensorspan.capture.open"
CAPTURE_FINISHED: Final = "tensorspan.capture.finished"
CAPTURE_LOST: Final = "tensorspan.capture.lost"
ARRAYS_DROPPED: Final = "tensorspan.arrays.dropped"
RECORDS_LOST: Final = "tensorspan.records.lost"
SPANS_LOST: Final = "tensorspan.spans.lost"
EXPORTER_FAILURES: Final = "tensorspan.exporter.failures"
QUEUE_USAGE: Final = "tensorspan.queue.usage"
QUEUE_LIMIT: Final = "tensorspan.queue.limit"
WRITER_LAG: Final = "tensorspan.writer.lag"
STORE_SIZE: Final = "tensorspan.store.size"

DURATIONS: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
FIRST_TOKENS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
NEXT_TOKENS: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
TOKENS: Final = tuple(float(4**power) for power in range(14))


@dataclass(frozen=True, slots=True)
class Instrument:
    """One metric."""

    name: str
    kind: Literal["histogram", "counter", "updown", "gauge"]
    unit: str
    """As UCUM has it: `s`, `By`, `{token}`."""
    description: str
    buckets: tuple[float, ...] = ()
    """Upper bounds, of a histogram."""


METRICS: Final = (
    Instrument(
        REQUEST_DURATION, "histogram", "s", "Time from a request's arrival to the last byte of its answer", DURATIONS
    ),
    Instrument(
        TIME_TO_FIRST_TOKEN, "histogram", "s", "Time to the first token, of successful generations", FIRST_TOKENS
    ),
    Instrument(
        TIME_PER_OUTPUT_TOKEN,
        "histogram",
        "s",
        "Mean time per token after the first, of successful generations",
        NEXT_TOKENS,
    ),
    Instrument(TOKEN_USAGE, "histogram", "{token}", "Tokens of a request's prompt, and of each answer", TOKENS),
    Instrument(CAPTURE_BYTES, "counter", "By", "Arrays handed to the store, before compression"),
    Instrument(CAPTURE_OPEN, "updown", "{capture}", "Captures of generations that have not ended"),
    Instrument(CAPTURE_FINISHED, "counter", "{capture}", "Captured generations that have ended"),
    Instrument(CAPTURE_LOST, "counter", "{capture}", "Captures that could not be written, or not to their end"),
    Instrument(ARRAYS_DROPPED, "counter", "{array}", "Arrays of a step that should have been stored and were not"),
    Instrument(RECORDS_LOST, "counter", "{record}", "Records that did not fit into a queue, or belonged to nothing"),
    Instrument(SPANS_LOST, "counter", "{span}", "Spans that never reached the collector or the file"),
    Instrument(EXPORTER_FAILURES, "counter", "{failure}", "Errors of our own that were logged and swallowed"),
    Instrument(QUEUE_USAGE, "updown", "By", "What waits in the queues towards the exporter process"),
    Instrument(QUEUE_LIMIT, "updown", "By", "What these queues can hold"),
    Instrument(WRITER_LAG, "gauge", "s", "Time from the end of an engine step to the reading of its record"),
    Instrument(STORE_SIZE, "updown", "By", "What the store holds; of a bucket, its spool"),
)
