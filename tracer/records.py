"""What crosses a process boundary: a `TraceRequest` goes in, records come out, nothing else.

Everything here is frozen data made of numbers, strings and tuples, so that it can be sent as MessagePack and
compared in tests. Times are wall-clock nanoseconds since the epoch; token positions are absolute (0 is the first
prompt token); trace IDs are 32 and span IDs 16 lowercase hexadecimal digits, as in W3C Trace Context.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tracer.log_records import LogLine
from tracer.member_records import HiddenSpec, MembersInfo, RouterInfo, RouterSpec
from tracer.metric_records import PlainGeneration

__all__ = [
    "ArrayRecord",
    "ArraySlice",
    "AttentionSpec",
    "AttentionSummary",
    "CaptureSpec",
    "EngineInfo",
    "FlushRecord",
    "GenerationEnd",
    "GenerationStart",
    "HiddenSpec",
    "LayerInfo",
    "LogLine",
    "LogitsSpec",
    "LogitsSummary",
    "MembersInfo",
    "Phase",
    "PlainGeneration",
    "QKSpec",
    "Record",
    "Region",
    "RequestSpan",
    "RouterInfo",
    "RouterSpec",
    "StepRecord",
    "TraceRequest",
    "WorkerEnd",
]

Phase = Literal["prefill", "decode"]
ArrayDtype = Literal["f16", "f32"]


@dataclass(frozen=True, slots=True)
class LogitsSpec:
    """Which logits to store: all of them, or the `top` best per step."""

    top: int | None = None
    """Number of best logits per step; None stores the whole row of the vocabulary."""
    dtype: ArrayDtype = "f16"
    """Stored precision; f16 holds bfloat16 logits of usual size exactly."""


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Which attention rows to store."""

    layers: tuple[int, ...] | None = None
    """Layer indices, ascending; None means every layer."""
    heads: tuple[int, ...] | None = None
    """Query head indices, ascending; None means every head."""
    rows: Literal["decode", "all"] = "decode"
    """`decode`: the rows that predict output tokens. `all`: the prompt's rows too."""
    dtype: ArrayDtype = "f16"


@dataclass(frozen=True, slots=True)
class QKSpec:
    """Queries and keys after rotary embedding, from which attention is rebuilt on reading."""

    layers: tuple[int, ...] | None = None
    """Layer indices, ascending; None means every layer. They must have the same numbers of heads and dims."""
    rows: Literal["decode", "all"] = "decode"
    """`decode`: the queries that predict output tokens. `all`: the prompt's queries too."""
    dtype: ArrayDtype | None = None
    """None: f32 for an engine in float32, f16 for one in half precision, which holds usual bfloat16 values exactly."""


@dataclass(frozen=True, slots=True)
class CaptureSpec:
    """What one request asked to store; see the grammar of the `Trace-Capture` header in the README."""

    logits: LogitsSpec | None = None
    attention: AttentionSpec | None = None
    summary: bool = False
    """Per-layer-and-head attention floats without the rows."""
    qk: QKSpec | None = None
    prompt_logits: LogitsSpec | None = None
    """Rows that predict the prompt's own tokens."""
    hidden_states: HiddenSpec | None = None
    router: RouterSpec | None = None

    @property
    def wants_layers(self) -> bool:
        """True if attention layers have to be watched at all."""
        return self.wants_attention or self.qk is not None

    @property
    def wants_attention(self) -> bool:
        """True if attention has to be computed, stored or not."""
        return self.attention is not None or self.summary


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """What the worker must know about one generation; travels in `SamplingParams.extra_args`."""

    trace_id: str
    span_id: str
    """The generation span: parent of the step spans and name of the capture's group."""
    sampled: bool = True
    """False: no spans are exported, but a capture may still be written (and says that no trace exists)."""
    capture: CaptureSpec | None = None


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One attention layer of the engine, in the model's order."""

    index: int
    name: str
    """vLLM's layer name, e.g. `model.layers.0.self_attn.attn`."""
    num_heads: int
    """Query heads of the whole model, not of this rank."""
    num_kv_heads: int
    """Likewise."""
    head_size: int
    scale: float
    sliding_window: int | None = None
    """Number of visible keys, the query's own included; None without a window."""
    soft_cap: float | None = None
    alibi: bool = False
    sinks: bool = False
    alibi_slopes: tuple[float, ...] = ()
    """One per query head, if `alibi`; in a worker's own EngineInfo those of its rank."""
    sink_logits: tuple[float, ...] = ()
    """One per query head, if `sinks`; likewise."""
    backend: str = ""
    unsupported: str | None = None
    """Why this layer cannot be captured; None if it can."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What one worker can capture, written at its start; the answer of `tensorspan doctor`."""

    model: str
    vllm_version: str
    runner: str
    """`V1` or `V2`: which of vLLM's model runners."""
    device: str
    dtype: str
    """Compute dtype of the model, e.g. `bfloat16`."""
    vocab_size: int
    max_model_len: int
    layers: tuple[LayerInfo, ...] = ()
    rank: int = 0
    """Tensor parallel rank: which of its engine's workers this is."""
    world_size: int = 1
    """Workers of its engine."""
    replica: int = 0
    """Data parallel rank: which of its server's engines. Each serves generations of its own."""
    block_size: int = 0
    prefix_caching: bool = False
    reasoning_parser: str = ""
    kernels: str = "torch"
    """What computes attention rows and statistics: `torch`, the C kernels (`native`) or Triton's (`triton`)."""
    logits_unsupported: str | None = None
    """Why logits cannot be captured; None if they can."""
    attention_unsupported: str | None = None
    """Why attention of no layer at all can be captured; None if it can."""
    members: MembersInfo = field(default_factory=MembersInfo)

    @property
    def num_heads(self) -> int:
        """Largest number of query heads of any capturable layer; 0 without one."""
        return max((layer.num_heads for layer in self.layers if layer.unsupported is None), default=0)


@dataclass(frozen=True, slots=True)
class LogitsSummary:
    """Statistics of one row of raw logits `z`, with `p = softmax(z)`; natural logarithms throughout."""

    entropy: float
    """`-sum p log p`, nats."""
    varentropy: float
    """`sum p (log p + entropy)^2`, nats squared."""
    margin: float
    """`log p(best) - log p(second)`, nats."""
    logprob: float
    """`log p(sampled token)` before penalties, bias, temperature and masks."""
    rank: int
    """How many tokens have a larger raw logit than the sampled one; 0 is the argmax."""
    topk_ids: tuple[int, ...] = ()
    topk_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class AttentionSummary:
    """Means over captured layers and heads of one attention row `a` (not renormalised: sinks make it sum below 1)."""

    entropy: float
    """`-sum a log a`, nats."""
    sink_mass: float
    """Weight on position 0 plus the weight of learned sinks (`1 - sum a`)."""
    prompt_mass: float
    """Weight on prompt positions, position 0 included."""
    self_weight: float
    """Weight of the row on its own position."""
    top_position: int
    """Key position of the largest single weight outside position 0 (-1 if there is none)."""
    top_weight: float
    top_layer: int
    top_head: int
    pairs: int = 1
    """Pairs of layer and head that the means are over: their weight beside those of other ranks."""


@dataclass(frozen=True, slots=True)
class ArraySlice:
    """Where one array lies in the payload that follows a record, and where it belongs in the capture."""

    name: str
    """Array of the store, see `tracer.schema`."""
    dtype: str
    """NumPy dtype name."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the payload."""
    start: tuple[int, ...] = ()
    """Index of the first element in the stored array, without the step axis."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One engine step of one generation, as seen by one worker."""

    trace_id: str
    span_id: str
    """Generation span."""
    step_span_id: str
    step: int | None
    """Index of the output token this step predicted; None for a prefill chunk that sampled nothing."""
    phase: Phase
    attempt: int
    """1, plus one for every preemption of the request."""
    position: int
    """Absolute position of the step's last query row."""
    tokens: int
    """Query rows of this request in the step."""
    kv_len: int
    """Keys visible to the last row before any window."""
    start_ns: int
    end_ns: int
    rank: int = 0
    """Tensor parallel rank of the worker. Rank 0 speaks for all but the other ranks' heads."""
    sampled: bool = True
    batch_requests: int = 1
    batch_tokens: int = 1
    cuda_graph: str = "NONE"
    drafts: int = 0
    """Draft tokens of this generation that the engine step verified; its accepted ones share the step's times."""
    drafts_accepted: int = 0
    token_id: int | None = None
    logits: LogitsSummary | None = None
    attention: AttentionSummary | None = None
    capture: bool = False
    """True if this generation has a store."""
    arrays: tuple[ArraySlice, ...] = ()
    dropped: tuple[str, ...] = ()
    """Arrays that this step should have stored and did not, each as `name: cause`."""


@dataclass(frozen=True, slots=True)
class ArrayRecord:
    """Arrays that belong to no output token.

    Attention rows of the prompt (`attention_prefill[layer, head, query, key]`), or what goes by its positions: queries
    and keys (`query_prompt[position, layer, head, dim]`, `key_prompt[position, layer, kv_head, dim]`), and the arrays
    of `tracer.member_records`.
    """

    trace_id: str
    span_id: str
    attempt: int
    arrays: tuple[ArraySlice, ...]
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerEnd:
    """The worker will send nothing more for this generation."""

    trace_id: str
    span_id: str
    rank: int = 0
    records_lost: int = 0
    """Records that did not fit into the queue even without arrays."""


@dataclass(frozen=True, slots=True)
class Region:
    """A run of prompt tokens that came from one message or from the chat template."""

    role: str
    """`system`, `user`, `assistant`, `tool`, `template`, ..."""
    start: int
    end: int
    """First position after the region."""


@dataclass(frozen=True, slots=True)
class GenerationStart:
    """Facts known when the engine accepts a generation; sent by the process that called the engine."""

    trace_id: str
    span_id: str
    parent_span_id: str | None
    sampled: bool
    start_ns: int
    request_id: str
    """The engine's request ID."""
    model: str
    operation: str
    """`chat`, `text_completion` or `generate_content` (GenAI `gen_ai.operation.name`)."""
    choice: int = 0
    """Index of this sequence among the request's `n`."""
    prompt_tokens: int = 0
    max_tokens: int | None = None
    params: dict[str, int | float | str | bool | list[str]] = field(default_factory=dict)
    """Sampling parameters that differ from the server's silence, by their GenAI attribute suffix."""
    capture: CaptureSpec | None = None
    prompt_token_ids: tuple[int, ...] = ()
    """Only for captured generations: a capture is content and was authorised as such."""
    prompt_token_bytes: tuple[bytes, ...] = ()
    regions: tuple[Region, ...] = ()
    owner: str = ""
    """Name of the key with which the capture was granted; empty without one."""
    step_spans: int = 1
    """Every how many output tokens a step has a span of its own; 0: none has."""
    conversation_id: str = ""


@dataclass(frozen=True, slots=True)
class GenerationEnd:
    """How a generation ended, from the process that called the engine."""

    trace_id: str
    span_id: str
    end_ns: int
    status: Literal["ok", "aborted", "error"]
    finish_reason: str
    output_tokens: int
    cached_tokens: int = 0
    first_token_ns: int | None = None
    error: str = ""
    reasoning_tokens: int | None = None
    """Output tokens inside the model's thinking; None if the server has no reasoning parser."""
    output_token_ids: tuple[int, ...] = ()
    output_token_bytes: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestSpan:
    """The SERVER span of one HTTP request."""

    trace_id: str
    span_id: str
    parent_span_id: str | None
    start_ns: int
    end_ns: int
    method: str
    route: str
    status_code: int
    error: str = ""
    attributes: dict[str, int | float | str | bool] = field(default_factory=dict)
    sampled: bool = True
    """False: no span is made of it, and the metrics count it all the same."""
    operation: str = ""


@dataclass(frozen=True, slots=True)
class FlushRecord:
    """Ask the exporter process to finish what it has been handed and to answer with `token`."""

    token: str
    generations: tuple[str, ...] = ()
    """Generation span IDs that must have ended before the answer."""


Record = (
    EngineInfo | StepRecord | ArrayRecord | WorkerEnd | GenerationStart | GenerationEnd | RequestSpan | FlushRecord
    | PlainGeneration | LogLine
)  # fmt: skip
