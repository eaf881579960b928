"""Who asked for what: IDs, W3C trace context, and what one request carries from the edge to the engine.

Random IDs come from the operating system: vLLM seeds Python's `random` with 0 in every process, so IDs drawn from it
would repeat across restarts. Everything that several processes must agree on is derived by a keyed hash instead.
"""

from __future__ import annotations

import itertools
import os
import re
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final, Literal

from tracer.capture_request import check_capture, format_capture, parse_capture
from tracer.records import AttentionSpec, CaptureSpec, HiddenSpec, LogitsSpec, QKSpec, RouterSpec, TraceRequest

__all__ = [
    "ACTIVE",
    "EXTRA_ARGS_KEY",
    "TEXT_KEY",
    "Inbound",
    "SpanContext",
    "check_capture",
    "format_capture",
    "format_traceparent",
    "from_extra_args",
    "in_http_request",
    "new_span_id",
    "new_trace_id",
    "parse_capture",
    "parse_traceparent",
    "step_span_id",
    "to_extra_args",
    "wall_clock_ns",
]

EXTRA_ARGS_KEY: Final = "tensorspan"
"""Key of `SamplingParams.extra_args` under which a `TraceRequest` travels; a client's own value is never used."""
TEXT_KEY: Final = "trace_capture"
"""Key of `vllm_xargs` and of offline `extra_args` that holds the text of a `Trace-Capture` header."""

_TRACE_ID: Final = re.compile(r"(?!0{32})[0-9a-f]{32}")
_SPAN_ID: Final = re.compile(r"(?!0{16})[0-9a-f]{16}")
_TRACEPARENT: Final = re.compile(
    rf"(?P<version>(?!ff)[0-9a-f]{{2}})-(?P<trace>{_TRACE_ID.pattern})-(?P<span>{_SPAN_ID.pattern})"
    r"-(?P<flags>[0-9a-f]{2})(?P<rest>-.*)?"
)
_WALL_MINUS_MONOTONIC_NS: Final = time.time_ns() - time.monotonic_ns()


def wall_clock_ns() -> int:
    """Nanoseconds since the epoch, from one offset per process: never runs backwards, so children fit in parents."""
    return time.monotonic_ns() + _WALL_MINUS_MONOTONIC_NS


def new_trace_id() -> str:
    """A random trace ID."""
    return _random_hex(16)


def new_span_id() -> str:
    """A random span ID."""
    return _random_hex(8)


def step_span_id(span_id: str, position: int, attempt: int) -> str:
    """The span ID of one step of generation `span_id`: the same on every rank and in the writer.

    64-bit BLAKE2b of position and attempt (two little-endian int64), keyed by the text of `span_id`, person `step`.
    """
    return _derived_hex(span_id, b"step", position, attempt, size=8)


@dataclass(frozen=True, slots=True)
class SpanContext:
    """Identity of a span as W3C Trace Context carries it."""

    trace_id: str
    span_id: str
    sampled: bool
    random: bool = field(default=False, compare=False)
    """Level 2's claim that the trace ID is random; passed on, never made."""


def parse_traceparent(value: str) -> SpanContext | None:
    """The caller's span; None if `value` is not a valid `traceparent` of version 00 or of a later, longer one."""
    match = _TRACEPARENT.fullmatch(value.strip(" \t"))
    if match is None or (match["version"] == "00" and match["rest"]):
        return None
    flags = int(match["flags"], 16)
    return SpanContext(match["trace"], match["span"], bool(flags & 1), bool(flags & 2))


def format_traceparent(ctx: SpanContext) -> str:
    """`ctx` as the value of a `traceparent` or `traceresponse` header."""
    return f"00-{ctx.trace_id}-{ctx.span_id}-{ctx.sampled + 2 * ctx.random:02x}"


def to_extra_args(request: TraceRequest) -> dict[str, Any]:
    """The value for `extra_args[EXTRA_ARGS_KEY]`: strings, numbers and lists, which vLLM can send to its engine."""
    capture = request.capture
    out: dict[str, Any] = {"trace_id": request.trace_id, "span_id": request.span_id, "sampled": request.sampled}
    if capture is not None:
        logits, attention, prompt = capture.logits, capture.attention, capture.prompt_logits
        hidden, router = capture.hidden_states, capture.router
        out["capture"] = {
            "logits": logits and [logits.top, logits.dtype],
            "attention": attention
            and [_listed(attention.layers), _listed(attention.heads), attention.rows, attention.dtype],
            "summary": capture.summary,
            "qk": capture.qk and [_listed(capture.qk.layers), capture.qk.rows, capture.qk.dtype],
            "prompt_logits": prompt and [prompt.top, prompt.dtype],
            "hidden_states": hidden and [_listed(hidden.layers), hidden.rows, hidden.dtype],
            "router": router and [_listed(router.layers), router.rows],
        }
    return out


def from_extra_args(extra: Mapping[str, Any] | None) -> TraceRequest | None:
    """The request inside a `SamplingParams.extra_args`; None if there is none or it is not one of ours."""
    if not extra or EXTRA_ARGS_KEY not in extra:
        return None
    try:
        return _trace_request(extra[EXTRA_ARGS_KEY])
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class Inbound:
    """What one HTTP request, or one offline `capture(...)` block, says about the generations inside it."""

    trace_id: str
    parent_span_id: str | None = None
    """Parent of the generation spans: the SERVER span of an HTTP request."""
    sampled: bool = True
    capture: CaptureSpec | None = None
    operation: str = "text_completion"
    """`chat` or `text_completion` (GenAI `gen_ai.operation.name`)."""
    messages: tuple[tuple[str, str], ...] = ()
    """(role, text) of each message; content, so only filled for a capture."""
    source: Literal["http", "offline"] = "http"
    owner: str = ""
    """Name of the key with which the capture was granted."""
    on_end: Callable[[int, int], None] | None = field(default=None, repr=False, compare=False)
    """Told of the prompt and output tokens of each generation that has ended."""
    issued: list[tuple[str, str]] = field(default_factory=list, repr=False, compare=False)
    """Trace ID and span ID of each generation that the engine was given, in that order."""
    _first: str = field(default_factory=new_span_id, repr=False)
    # `next` on it is one C call: threads never see the same number.
    _count: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)

    @classmethod
    def offline(cls, capture: CaptureSpec | None, *, sampled: bool = True) -> Inbound:
        """For generations without an HTTP request: each is a trace of its own."""
        return cls(new_trace_id(), None, sampled, capture, source="offline")

    def generation_id(self, k: int) -> str:
        """Span ID of the k-th generation (from 0): known before the engine asks for it."""
        return self._first if k == 0 else _derived_hex(self._first, b"generation", k, size=8)

    def issue(self) -> tuple[str, str]:
        """Trace ID and span ID of the next generation; safe in threads."""
        identity = self._identity(next(self._count))
        self.issued.append(identity)
        return identity

    def refs(self, count: int) -> tuple[str, ...]:
        """`trace_id/span_id`, the group of the capture, of the first `count` generations."""
        return tuple("/".join(self._identity(k)) for k in range(count))

    def _identity(self, k: int) -> tuple[str, str]:
        alone = self.source == "offline" and self.parent_span_id is None and k > 0
        trace_id = _derived_hex(self._first, b"trace", k, size=16) if alone else self.trace_id
        return trace_id, self.generation_id(k)


ACTIVE: Final[ContextVar[Inbound | None]] = ContextVar("tensorspan_active", default=None)
"""The request that the current task serves, sampled or not; None outside our middleware."""
in_http_request: Final[ContextVar[bool]] = ContextVar("tensorspan_in_http_request", default=False)
"""True while an HTTP request is served: then a request's own `TEXT_KEY` has been judged and must not count again."""


def _random_hex(size: int) -> str:
    while not any(value := os.urandom(size)):
        pass  # All-zero IDs are invalid in W3C Trace Context.
    return value.hex()


def _derived_hex(key: str, kind: bytes, *numbers: int, size: int) -> str:
    """`size` bytes of keyed BLAKE2b over `numbers`; `kind` keeps the uses of one key apart."""
    data = struct.pack(f"<{len(numbers)}q", *numbers)
    value = blake2b(data, digest_size=size, key=key.encode(), person=kind).hexdigest()
    return value if value.strip("0") else value[:-1] + "1"


def _listed(numbers: tuple[int, ...] | None) -> list[int] | None:
    return None if numbers is None else list(numbers)


def _trace_request(value: Any) -> TraceRequest:
    """Rebuild what `to_extra_args` wrote; raises one of the errors its caller expects for anything else."""
    trace_id, span_id, sampled = value["trace_id"], value["span_id"], value["sampled"]
    if not (_TRACE_ID.fullmatch(trace_id) and _SPAN_ID.fullmatch(span_id) and isinstance(sampled, bool)):
        raise ValueError("not IDs of a generation")
    return TraceRequest(trace_id, span_id, sampled, _capture(value["capture"]) if "capture" in value else None)


def _capture(value: Any) -> CaptureSpec:
    logits, attention, summary = value["logits"], value["attention"], value["summary"]
    others = {name: value.get(name) for name in ("qk", "prompt_logits", "hidden_states", "router")}
    made = {name: _SPECS[name](*parts) for name, parts in others.items() if parts is not None}
    if not isinstance(summary, bool):
        raise ValueError("summary is not a boolean")
    return CaptureSpec(
        logits=None if logits is None else _logits_spec(*logits),
        attention=None if attention is None else _attention_spec(*attention),
        summary=summary,
        **made,
    )


def _logits_spec(top: Any, dtype: Any) -> LogitsSpec:
    if dtype not in ("f16", "f32") or not (top is None or (type(top) is int and top > 0)):
        raise ValueError("not a LogitsSpec")
    return LogitsSpec(top, dtype)


def _attention_spec(layers: Any, heads: Any, rows: Any, dtype: Any) -> AttentionSpec:
    if dtype not in ("f16", "f32") or rows not in ("decode", "all"):
        raise ValueError("not an AttentionSpec")
    return AttentionSpec(_indices(layers), _indices(heads), rows, dtype)


def _qk_spec(layers: Any, rows: Any, dtype: Any) -> QKSpec:
    if dtype not in (None, "f16", "f32") or rows not in ("decode", "all"):
        raise ValueError("not a QKSpec")
    return QKSpec(_indices(layers), rows, dtype)


def _hidden_spec(layers: Any, rows: Any, dtype: Any) -> HiddenSpec:
    if dtype not in (None, "f16", "f32") or rows not in ("decode", "all"):
        raise ValueError("not a HiddenSpec")
    return HiddenSpec(_indices(layers), rows, dtype)


def _router_spec(layers: Any, rows: Any) -> RouterSpec:
    if rows not in ("decode", "all"):
        raise ValueError("not a RouterSpec")
    return RouterSpec(_indices(layers), rows)


_SPECS: Final[dict[str, Any]] = {
    "qk": _qk_spec, "prompt_logits": _logits_spec, "hidden_states": _hidden_spec, "router": _router_spec
}  # fmt: skip


def _indices(numbers: Any) -> tuple[int, ...] | None:
    if numbers is None:
        return None
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError("not a list of indices")
    return tuple(numbers)
