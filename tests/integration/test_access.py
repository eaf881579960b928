"""Keys, budgets and proxies on a real server: what a client gets, what the store and the spans say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.receiver import Receiver, attributes
from tests.integration.runs import make_tokenized, prompt
from tests.integration.server import Server, server_environment
from tracer import open_capture

pytestmark = pytest.mark.engine

KEYS = """
[alice]
key = "geheim"
capture_mb_per_hour = 0.01
[bob]
key = "offen"
"""


def test_a_real_server_asks_for_keys_and_keeps_books(models: Path, receiver: Receiver, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.touch(mode=0o600)
    keys.write_text(KEYS)
    environment = server_environment(
        TENSORSPAN_STORE=str(tmp_path / "store"), TENSORSPAN_CAPTURE="key", TENSORSPAN_KEYS_FILE=str(keys),
        TENSORSPAN_TRUSTED_PROXIES="127.0.0.1", OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint,
        OTEL_EXPORTER_OTLP_INSECURE="true",
    )  # fmt: skip
    options = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256")
    server = Server.vllm(make_tokenized("llama", models), tmp_path / "log", environment, *options)

    def ask(**headers: str) -> tuple[int, dict[str, str], Any]:
        body = {"model": "demo", "prompt": prompt(40), "max_tokens": 10, "temperature": 0, "ignore_eos": True}
        return server.post("/v1/completions", body, {name.replace("_", "-"): text for name, text in headers.items()})

    try:
        status, _, problem = ask(Trace_Capture="logits")
        assert (status, "the header Trace-Capture-Key" in problem["detail"]) == (403, True)
        status, granted, _ = ask(Trace_Capture="logits", Trace_Capture_Key="geheim", X_Forwarded_For="203.0.113.9")
        assert status == 200
        [server_span] = [span for span in receiver.trace(granted["traceresponse"].split("-")[1]) if span.kind == 2]
        audit = attributes(server_span)
        assert (audit["tensorspan.capture.key"], audit["tensorspan.capture.policy"]) == ("alice", "key")
        assert audit["client.address"] == "203.0.113.9"
        assert open_capture(tmp_path / "store", granted["trace-capture-ref"]).attrs["owner"] == "alice"
        status, refused, problem = ask(Trace_Capture="logits", Trace_Capture_Key="geheim")
        assert (status, int(refused["retry-after"]) > 0) == (429, True), "10 rows of 512 logits are more than 10 kB"
        assert "capture_mb_per_hour of the key alice" in problem["detail"]
        assert ask(Trace_Capture="logits", Trace_Capture_Key="offen")[0] == 200
        assert ask()[0] == 200
    finally:
        server.stop()
    assert "geheim" not in server.log.read_text()
