"""Every attribute name that spans carry, pinned here as strings.

Sources, read 2026-11-24:
- GenAI: github.com/open-telemetry/semantic-conventions-genai, `docs/gen-ai/client-inference.md` at commit
  024a4f944a1291fcb627c9c47da69e79868dd15e. Everything there has the status Development and names still move, which is
  why they are pinned: the constants of the Python package `opentelemetry-semantic-conventions` are deprecated. The
  schema URL is that of the repository's `model/manifest.yaml` (commit 06ec68e722c45a7218e23ea1bc1339fe4e21ecae, which
  depends on the core conventions 1.44.0); there is no tagged release.
- HTTP, error, host and service: core conventions 1.44.0, stable.
- `tensorspan.*`: ours. No convention exists for a span per engine step. `gen_ai.*` never goes on a step: backends sum
  `gen_ai.usage.*` over nested spans.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "ARRAY_NAME",
    "ATTENTION_ENTROPY",
    "ATTENTION_PROMPT_MASS",
    "ATTENTION_SELF_WEIGHT",
    "ATTENTION_SINK_MASS",
    "ATTENTION_TOP_HEAD",
    "ATTENTION_TOP_LAYER",
    "ATTENTION_TOP_POSITION",
    "ATTENTION_TOP_WEIGHT",
    "BATCH_REQUESTS",
    "BATCH_TOKENS",
    "CAPTURE_MISSING",
    "CAPTURE_OUTCOME",
    "CAPTURE_REF",
    "CAPTURE_URI",
    "CHOSEN_ID",
    "CHOSEN_LOGPROB",
    "CHOSEN_RANK",
    "CUDA_GRAPH",
    "DEFAULT_SERVICE",
    "DRAFTS",
    "DRAFTS_ACCEPTED",
    "DROPPED_ARRAYS",
    "DROPPED_CAUSES",
    "DROPPED_RECORDS",
    "DROPPED_SPANS",
    "DROP_CAUSE",
    "ERROR_TYPE",
    "ERROR_TYPE_CANCELLED",
    "ERROR_TYPE_OTHER",
    "EXCEPTION_TYPE",
    "GENERATION_CHOICE",
    "GENERATION_PROMPT_TOKENS",
    "HOST_NAME",
    "HTTP_METHOD",
    "HTTP_ROUTE",
    "HTTP_STATUS_CODE",
    "LOGGER_NAME",
    "LOGITS_ENTROPY",
    "LOGITS_MARGIN",
    "LOGITS_VARENTROPY",
    "LOSS_PLACE",
    "OPERATION_NAME",
    "OWN_REQUEST_PREFIX",
    "PROVIDER",
    "PROVIDER_NAME",
    "QUEUE_ROLE",
    "REQUEST_CHOICE_COUNT",
    "REQUEST_MAX_TOKENS",
    "REQUEST_MODEL",
    "REQUEST_PREFIX",
    "REQUEST_SUFFIXES",
    "RESPONSE_FINISH_REASONS",
    "RESPONSE_ID",
    "RESPONSE_MODEL",
    "RESPONSE_TIME_TO_FIRST_CHUNK",
    "SCHEMA_URL",
    "SCOPE",
    "SERVICE_NAME",
    "STEPS_COUNT",
    "STEPS_OMITTED",
    "STEP_ATTEMPT",
    "STEP_INDEX",
    "STEP_PHASE",
    "STEP_POSITION",
    "STEP_TOKENS",
    "TOKEN_TYPE",
    "TOPK_IDS",
    "TOPK_LOGPROBS",
    "USAGE_CACHED_TOKENS",
    "USAGE_INPUT_TOKENS",
    "USAGE_OUTPUT_TOKENS",
    "VERSION",
]

SCHEMA_URL: Final = "https://opentelemetry.io/schemas/gen-ai-dev/1.42.0-dev"
SCOPE: Final = "tensorspan"
DEFAULT_SERVICE: Final = "vllm"
PROVIDER: Final = "vllm"
"""A custom value of `gen_ai.provider.name`: the conventions list none for vLLM and allow one."""

# Generation spans: GenAI.
OPERATION_NAME: Final = "gen_ai.operation.name"
PROVIDER_NAME: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_PREFIX: Final = "gen_ai.request."
REQUEST_CHOICE_COUNT: Final = "gen_ai.request.choice.count"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
REQUEST_SUFFIXES: Final = frozenset(
    {
        "choice.count",
        "frequency_penalty",
        "max_tokens",
        "presence_penalty",
        "previous_response.id",
        "reasoning.level",
        "seed",
        "stop_sequences",
        "stream",
        "temperature",
        "top_k",
        "top_p",
    }
)
"""What may follow `gen_ai.request.`; other parameters go under `tensorspan.request.`."""
RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
RESPONSE_ID: Final = "gen_ai.response.id"
RESPONSE_MODEL: Final = "gen_ai.response.model"
RESPONSE_TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
USAGE_CACHED_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
USAGE_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
USAGE_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"

# Request spans and resources: core conventions.
ERROR_TYPE: Final = "error.type"
ERROR_TYPE_CANCELLED: Final = "cancelled"
ERROR_TYPE_OTHER: Final = "_OTHER"
HOST_NAME: Final = "host.name"
HTTP_METHOD: Final = "http.request.method"
HTTP_ROUTE: Final = "http.route"
HTTP_STATUS_CODE: Final = "http.response.status_code"
SERVICE_NAME: Final = "service.name"

# Generation spans: ours.
GENERATION_CHOICE: Final = "tensorspan.generation.choice"
"""Index of this sequence among the request's `n`."""
GENERATION_PROMPT_TOKENS: Final = "tensorspan.generation.prompt_tokens"
OWN_REQUEST_PREFIX: Final = "tensorspan.request."
STEPS_COUNT: Final = "tensorspan.steps.count"
"""Step spans made for this generation."""
STEPS_OMITTED: Final = "tensorspan.steps.omitted"
"""Steps past the setting `steps`: they ran and have no span."""
CAPTURE_MISSING: Final = "tensorspan.capture.missing"
"""What was asked for and this engine cannot give, each as `array what: reason`, e.g. `attention layers 0, 2: ...`."""
DROPPED_RECORDS: Final = "tensorspan.dropped.records"
"""Records that did not fit into the shared-memory queue."""
DROPPED_SPANS: Final = "tensorspan.dropped.spans"
"""Step spans that did not fit into the queue towards the collector."""

# Generation and step spans: ours.
CAPTURE_REF: Final = "tensorspan.capture_ref"
"""`<trace_id>/<generation span_id>`, on a step followed by `/<step>`: the parameter of Jaeger's linkPatterns."""
CAPTURE_URI: Final = "tensorspan.capture.uri"
"""The capture's Zarr group, e.g. `file:///srv/captures/<trace_id>/<generation span_id>`."""
DROPPED_ARRAYS: Final = "tensorspan.dropped.arrays"
"""How many arrays should have been stored and were not."""
DROPPED_CAUSES: Final = "tensorspan.dropped.causes"
"""Their distinct `name: cause`."""

# Step spans: ours.
STEP_INDEX: Final = "tensorspan.step.index"
"""Index of the output token that the step predicted; absent for a prefill chunk that sampled nothing."""
STEP_PHASE: Final = "tensorspan.step.phase"
STEP_ATTEMPT: Final = "tensorspan.step.attempt"
STEP_TOKENS: Final = "tensorspan.step.tokens"
"""Query rows of this generation in the step."""
STEP_POSITION: Final = "tensorspan.step.position"
BATCH_REQUESTS: Final = "tensorspan.batch.requests"
BATCH_TOKENS: Final = "tensorspan.batch.tokens"
CUDA_GRAPH: Final = "tensorspan.cuda_graph"
DRAFTS: Final = "tensorspan.draft.tokens"
"""Speculative decoding: draft tokens of this generation that the engine step verified; absent if there were none."""
DRAFTS_ACCEPTED: Final = "tensorspan.draft.accepted"
"""How many of them were accepted: that many step spans and one more come from the same engine step."""
CHOSEN_ID: Final = "tensorspan.token.id"
"""Content: only with the content opt-in."""
CHOSEN_LOGPROB: Final = "tensorspan.token.logprob"
CHOSEN_RANK: Final = "tensorspan.token.rank"
LOGITS_ENTROPY: Final = "tensorspan.logits.entropy"
LOGITS_VARENTROPY: Final = "tensorspan.logits.varentropy"
LOGITS_MARGIN: Final = "tensorspan.logits.margin"
TOPK_IDS: Final = "tensorspan.logits.topk.ids"
"""Content: only with the content opt-in."""
TOPK_LOGPROBS: Final = "tensorspan.logits.topk.logprobs"
ATTENTION_ENTROPY: Final = "tensorspan.attention.entropy"
ATTENTION_SINK_MASS: Final = "tensorspan.attention.sink_mass"
ATTENTION_PROMPT_MASS: Final = "tensorspan.attention.prompt_mass"
ATTENTION_SELF_WEIGHT: Final = "tensorspan.attention.self_weight"
ATTENTION_TOP_POSITION: Final = "tensorspan.attention.top.position"
ATTENTION_TOP_WEIGHT: Final = "tensorspan.attention.top.weight"
ATTENTION_TOP_LAYER: Final = "tensorspan.attention.top.layer"
ATTENTION_TOP_HEAD: Final = "tensorspan.attention.top.head"

# Metrics.
TOKEN_TYPE: Final = "gen_ai.token.type"
"""`input` or `output`."""
ARRAY_NAME: Final = "tensorspan.array.name"
CAPTURE_OUTCOME: Final = "tensorspan.capture.outcome"
"""How a captured generation ended: `ok`, `aborted` or `error`."""
DROP_CAUSE: Final = "tensorspan.drop.cause"
LOSS_PLACE: Final = "tensorspan.loss.place"
"""Where a record was lost: `worker` (the queue was full) or `exporter` (it belonged to no open generation)."""
QUEUE_ROLE: Final = "tensorspan.queue.role"
"""Who writes to a queue: `worker` or `api`."""

# Logs.
EXCEPTION_TYPE: Final = "exception.type"
LOGGER_NAME: Final = "tensorspan.logger"

# Resource: ours.
VERSION: Final = "tensorspan.version"
