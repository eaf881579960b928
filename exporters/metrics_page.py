"""Metrics as families of the Prometheus exposition format, in the file that `/metrics` reads.

Names follow OpenTelemetry's rules for Prometheus: dots become underscores, the unit is appended, counters end in
`_total`. The SDK gives an exemplar once, to the first reading after it; here the last of each bucket is kept, as
Prometheus libraries do.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from opentelemetry.sdk.metrics.export import (
    HistogramDataPoint,
    InMemoryMetricReader,
    Metric,
    NumberDataPoint,
    Sum,
)

from tracer.metrics_file import write_metrics

__all__ = ["PageWriter"]

UNITS: Final = {"s": "seconds", "By": "bytes"}
Exemplars = dict[tuple[str, tuple[tuple[str, str], ...], int], list[Any]]


class PageWriter:
    """Writes `path` from what `reader` collects."""

    def __init__(self, reader: InMemoryMetricReader, path: Path) -> None:
        self._reader = reader
        self._path = path
        self._exemplars: Exemplars = {}
        self._last: list[dict[str, Any]] = []

    def write(self) -> None:
        """Replace the page if anything has changed; a directory that is gone costs the page and nothing else."""
        families = self.families()
        if families != self._last:
            with contextlib.suppress(OSError):
                write_metrics(self._path, families)
                self._last = families

    def families(self) -> list[dict[str, Any]]:
        """Every metric that has a value."""
        data = self._reader.get_metrics_data()
        if data is None:
            return []
        found = (metric for part in data.resource_metrics for scope in part.scope_metrics for metric in scope.metrics)
        return [self._family(metric) for metric in found]

    def _family(self, metric: Metric) -> dict[str, Any]:
        unit = UNITS.get(metric.unit or "", "")
        name = metric.name.replace(".", "_")
        if unit and not name.endswith(unit):
            name = f"{name}_{unit}"
        counts = isinstance(metric.data, Sum) and metric.data.is_monotonic
        samples: list[list[Any]] = []
        kind = "counter" if counts else "gauge"
        for point in metric.data.data_points:
            labels = _labels(point.attributes or {})
            if isinstance(point, HistogramDataPoint):
                kind = "histogram"
                samples += self._histogram(name, point, labels)
            elif isinstance(point, NumberDataPoint):
                samples.append(["_total" if counts else "", labels, point.value, None])
        return {"name": name, "type": kind, "unit": unit, "help": metric.description, "samples": samples}

    def _histogram(self, name: str, point: HistogramDataPoint, labels: dict[str, str]) -> list[list[Any]]:
        series = (name, tuple(sorted(labels.items())))
        for item in point.exemplars:
            if item.trace_id and item.span_id:
                pair = {"trace_id": f"{item.trace_id:032x}", "span_id": f"{item.span_id:016x}"}
                bucket = bisect_left(point.explicit_bounds, item.value)
                self._exemplars[*series, bucket] = [pair, item.value, item.time_unix_nano / 1e9]
        out: list[list[Any]] = []
        total = 0
        for bucket, count in enumerate(point.bucket_counts):
            total += count
            bound = "+Inf" if bucket == len(point.explicit_bounds) else str(float(point.explicit_bounds[bucket]))
            out.append(["_bucket", {**labels, "le": bound}, total, self._exemplars.get((*series, bucket))])
        return [*out, ["_count", labels, point.count, None], ["_sum", labels, point.sum, None]]


def _labels(attributes: Mapping[str, Any]) -> dict[str, str]:
    return {key.replace(".", "_"): str(value) for key, value in attributes.items()}
