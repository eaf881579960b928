"""Real engines for the tests: one store and one exporter process for all engines inside the test process."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deploy.model import demo_model
from tests.integration.receiver import Receiver
from tests.integration.server import Server, server_environment
from tracer import capture

CACHE_BYTES = 1 << 26


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of every offline engine of this session."""
    return tmp_path_factory.mktemp("captures")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny models are made."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def engine_environment() -> Iterator[None]:
    """The engine inside this process, so that it starts in seconds and our errors are raised, not guarded."""
    before = dict(os.environ)
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    os.environ.pop(
        "VLLM_CPU_KVCACHE_SPACE", None
    )  # It outranks `kv_cache_memory_bytes`, and a gigabyte takes a second.
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def offline(engine_environment: None, store: Path) -> Callable[..., Any]:
    """`with offline(model, **engine_options) as (llm, record)`; `record(what)` is a `capture(...)` block."""

    @contextmanager
    def start(model: Path, **options: Any) -> Iterator[tuple[Any, Callable[[str], Any]]]:
        from vllm import LLM

        chosen = {
            "dtype": "float32", "skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 256,
            "distributed_executor_backend": "uni", "kv_cache_memory_bytes": CACHE_BYTES,
            "enable_prefix_caching": False, "disable_log_stats": True,
        } | options  # fmt: skip

        def record(what: str) -> Any:
            return capture(what, store=store)

        gc.freeze()  # vLLM collects garbage eight times per start, each time through all objects of all libraries.
        with record(""):
            llm = LLM(str(model), **chosen)
        yield llm, record
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()

    return start


@pytest.fixture
def generate() -> Callable[..., list[list[int]]]:
    """Generate greedily from token IDs; the answers as token IDs, in the prompts' order."""

    def run(llm: Any, prompts: list[list[int]], max_tokens: int = 8, **params: Any) -> list[list[int]]:
        from vllm import SamplingParams

        chosen = {"temperature": 0.0, "ignore_eos": True, "detokenize": False, "max_tokens": max_tokens} | params
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, SamplingParams(**chosen), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return run


@pytest.fixture(scope="session")
def demo() -> Path:
    """SmolLM2-135M-Instruct in float32, converted once per machine."""
    return demo_model("float32")


@pytest.fixture(scope="session")
def receiver() -> Iterator[Receiver]:
    """A collector that the server's exporter process sends to."""
    running = Receiver()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def server_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of the session's server."""
    return tmp_path_factory.mktemp("server-captures")


def logging_config(folder: Path, traced: Path) -> Path:
    """vLLM's logging with a second handler, whose format asks for our filter's attributes."""
    loggers = {"vllm": {"handlers": ["console", "traced"], "level": "INFO", "propagate": False}}
    handlers = {
        "console": {"class": "logging.StreamHandler"},
        "traced": {
            "class": "logging.FileHandler", "filename": str(traced), "delay": True,
            "filters": ["trace"], "formatter": "trace",
        },
    }  # fmt: skip
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"trace": {"()": "tracer.log_context.TraceContextFilter"}},
        "formatters": {"trace": {"format": "%(otelTraceID)s %(otelSpanID)s %(message)s"}},
        "handlers": handlers,
        "loggers": loggers,
    }
    path = folder / "logging.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def server(
    demo: Path, receiver: Receiver, server_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """One compiled float32 server for the session; prompts over 32 tokens are prefilled in chunks."""
    environment = server_environment(
        TENSORSPAN_STORE=str(server_store),
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint,
        OTEL_EXPORTER_OTLP_INSECURE="true",
        OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT="SPAN_ONLY",
    )
    folder = tmp_path_factory.mktemp("server")
    log = folder / "log"
    environment |= {
        "OTEL_METRIC_EXPORT_INTERVAL": "1000",
        "VLLM_LOGGING_CONFIG_PATH": str(logging_config(folder, folder / "traced.log")),
    }
    options = (
        "--enable-log-requests",
        "--enable-auto-tool-choice",
        "--tool-call-parser",
        "hermes",
        "--dtype",
        "float32",
        "--max-model-len",
        "1024",
        "--max-num-batched-tokens",
        "32",
        "--max-num-seqs",
        "16",
    )
    running = Server.vllm(demo, log, environment, *options)
    yield running
    running.stop()
