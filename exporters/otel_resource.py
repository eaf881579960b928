"""Who we are, as every signal of ours says it."""

from __future__ import annotations

import socket
from importlib import metadata

from opentelemetry.sdk.resources import Resource

from tracer import semconv

__all__ = ["resource", "version"]


def resource() -> Resource:
    """`OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` win; Jaeger needs `host.name` to compare clocks."""
    service = {semconv.SERVICE_NAME: semconv.DEFAULT_SERVICE}
    host = {semconv.HOST_NAME: socket.gethostname()}
    theirs = Resource.create({semconv.VERSION: version()})
    if str(theirs.attributes.get(semconv.SERVICE_NAME, "")).startswith("unknown_service"):
        theirs = theirs.merge(Resource(service))
    return Resource(host).merge(theirs)


def version() -> str:
    """Our own."""
    try:
        return metadata.version("tensorspan")
    except metadata.PackageNotFoundError:
        return "0.0.0"
