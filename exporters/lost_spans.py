"""Spans that will not arrive: counted by cause, and said in the captures that they would have led to."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from opentelemetry.sdk.trace import ReadableSpan

from exporters.otlp_sender import CAUSES
from exporters.shards import write_new
from tracer import config, metric_names, semconv
from tracer._guard import Guard
from tracer.config import Settings
from tracer.figures import Figure
from tracer.store_files import SPANS_LOST

__all__ = ["LostSpans"]

MOST: Final = 4096
"""Captures that wait to be told; beyond it the oldest are not."""


class LostSpans:
    """`note` may be called on any thread; what it noted is written when somebody has time for it (`say`)."""

    def __init__(self, settings: Settings) -> None:
        self._store = config.local_store(settings)
        self._counts: Counter[str] = Counter()
        self._unsaid: deque[tuple[str, str]] = deque(maxlen=MOST)
        self._guard = Guard()

    def note(self, count: int, cause: str, spans: Sequence[ReadableSpan]) -> None:
        """`count` of `spans` are lost; where not all are, each of them may be."""
        self._counts[cause] += count
        for span in spans:
            reference = str((span.attributes or {}).get(semconv.CAPTURE_REF, ""))
            if reference.count("/") == 1:  # A generation's; steps have a third part.
                self._unsaid.append((reference, cause))

    def say(self) -> None:
        """Tell the captures whose generation spans are among the lost, as far as they are still there."""
        while self._unsaid:
            reference, cause = self._unsaid.popleft()
            directory = Path(self._store) / reference
            with self._guard("telling a capture that its span was lost"):
                if directory.is_dir() and not (directory / SPANS_LOST).exists():
                    write_new(directory / SPANS_LOST, json.dumps({"cause": cause}).encode())

    def figures(self) -> Iterable[Figure]:
        """Lost spans by cause."""
        for cause in CAUSES:
            yield Figure(metric_names.SPANS_LOST, self._counts[cause], ((semconv.DROP_CAUSE, cause),))
