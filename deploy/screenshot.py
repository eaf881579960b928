"""Makes docs/phoenix.png: a trace of a store in the UI of Arize Phoenix, by headless Chromium.

    .venv/bin/python -m deploy.screenshot captures docs/phoenix.png

needs Debian's `chromium` and the Python package `playwright`. Not run by the tests.
"""

from __future__ import annotations

import argparse
import base64
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import httpx
from google.protobuf.json_format import ParseDict  # type: ignore[import-untyped]
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from playwright.sync_api import Page, sync_playwright

from tracer.spans_file import newest_trace

PORT: Final = 16006
GRPC_PORT: Final = 14317
URL: Final = f"http://127.0.0.1:{PORT}"
START_SECONDS: Final = 180
SHOWN_SECONDS: Final = 60
ID_FIELDS: Final = ("traceId", "spanId", "parentSpanId")


def main() -> int:
    parser = argparse.ArgumentParser(description="A trace of a store in Phoenix's UI, as a picture.")
    parser.add_argument("store", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--span", default="decode", help="name of the span whose attributes are shown")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    chosen = parser.parse_args()
    trace_id = newest_trace(str(chosen.store))
    with tempfile.TemporaryDirectory() as data:
        ports = ["--port", str(PORT), "--grpc-port", str(GRPC_PORT)]
        phoenix = subprocess.Popen([sys.executable, "-m", "deploy.phoenix", *ports, "--data", data])
        try:
            _await(lambda: _get("/healthz"), START_SECONDS)
            for path in sorted((chosen.store / "spans").glob("*.jsonl")):
                for line in path.read_text(encoding="utf-8").splitlines():
                    _send(json.loads(line))
            _await(lambda: _get(f"/v1/projects/default/spans?trace_id={trace_id}").json()["data"], SHOWN_SECONDS)
            with sync_playwright() as driver:
                browser = driver.chromium.launch(executable_path=chosen.chromium)
                page = browser.new_page(viewport={"width": 1360, "height": 860}, color_scheme="light")
                _show(page, trace_id, chosen.span)
                page.screenshot(path=chosen.picture)
                browser.close()
        finally:
            phoenix.send_signal(signal.SIGINT)
            phoenix.wait(30)
    print(f"{chosen.picture}: {chosen.picture.stat().st_size / 1000:.0f} kB")
    return 0


def _show(page: Page, trace_id: str, span: str) -> None:
    """The trace's own page, with one step chosen."""
    page.goto(f"{URL}/redirects/traces/{trace_id}")
    page.get_by_text(span, exact=True).nth(2).click(timeout=30_000)
    page.get_by_role("tab", name="Attributes").click()
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(1000)


def _send(line: dict[str, Any]) -> None:
    """One line of OTLP-JSON, as protobuf: Phoenix takes nothing else."""
    message = ExportTraceServiceRequest()
    ParseDict(_base64_ids(line), message)
    headers = {"content-type": "application/x-protobuf"}
    body = message.SerializeToString()
    httpx.post(f"{URL}/v1/traces", content=body, headers=headers, timeout=30).raise_for_status()


def _base64_ids(node: Any) -> Any:
    """OTLP-JSON writes IDs in hexadecimal, protobuf's JSON in base64."""
    if isinstance(node, list):
        return [_base64_ids(one) for one in node]
    if not isinstance(node, dict):
        return node
    return {
        key: base64.b64encode(bytes.fromhex(value)).decode() if key in ID_FIELDS else _base64_ids(value)
        for key, value in node.items()
    }


def _get(path: str) -> httpx.Response:
    return httpx.get(URL + path, timeout=30).raise_for_status()


def _await(what: Any, seconds: float) -> None:
    """Return when `what` gives something; raise TimeoutError if it has not after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if what():
                return
        except httpx.HTTPError:  # It does not listen yet, or has no project yet.
            pass
        time.sleep(0.5)
    raise TimeoutError(f"Phoenix gave no answer in {seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
