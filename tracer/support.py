"""What of vLLM's features can be traced and captured: the table of docs/support.md and `tensorspan doctor`.

A row says `yes` or `part` only with tests on the real engine that hold it, `refused` with the words that a user is
told, and `unproven` where neither is there. tests/test_support.py looks up every test and every word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["FEATURES", "Feature", "State", "markdown", "summary"]

State = Literal["yes", "part", "refused", "unproven"]

_FEATURES: Final = "tests/integration/test_features.py::"
_MODELS: Final = "tests/integration/test_feature_models.py::"
_ENGINES: Final = "tests/integration/test_feature_engines.py::"
_SCHEDULING: Final = "tests/integration/test_scheduling.py::"
_BATCHES: Final = "tests/integration/test_batches.py::"
_SPECULATION: Final = (
    "tests/integration/test_speculation.py::test_accepted_rows_are_eagers_and_rejected_ones_are_nowhere"
)
_REFUSALS: Final = "tests/integration/test_refusals.py::"
_FAMILIES: Final = "tests/integration/test_families.py::test_attention_and_logits_equal_eager"
_REAL: Final = "tests/integration/test_real_window.py::test_attention_of_a_real_model_with_windows_equals_eager"
_PARALLEL: Final = "tests/integration/test_parallel.py::"
_FP8: Final = "tests/integration/test_fp8.py::test_an_fp8_cache_gives_the_weights_that_the_kernel_used"
_MEMBERS: Final = "tests/integration/test_members.py::"
_BACKENDS: Final = "tests/worker/test_backends.py::test_each_backend_is_read_or_refused_by_its_name"
_LAYERS: Final = "tests/worker/test_engine_refusals.py::test_a_layer_that_is_not_understood_is_refused"
_SET_UPS: Final = "tests/worker/test_engine_refusals.py::test_a_set_up_that_is_not_understood_is_refused"


@dataclass(frozen=True, slots=True)
class Feature:
    """One row: a feature of the engine, and what becomes of spans and captures with it."""

    name: str
    state: State
    says: str
    """What is captured, or what is not and what happens instead."""
    tests: tuple[str, ...] = ()
    """`file::function` of what proves it on the real engine."""
    refusals: tuple[str, ...] = ()
    """What a user is told, in the words of the code."""


FEATURES: Final[tuple[Feature, ...]] = (
    Feature(
        "model families", "yes",
        "71, listed in docs/families.md, and two real models: every row is that of Transformers' eager attention within"
        " 1e-5 in float32; a layer, a kernel or a configuration that is not understood is named and left out",
        (_FAMILIES, _REAL), ("is not causal softmax attention with a key cache", "is not known to this release"),
    ),
    Feature(
        "tensor parallel", "yes",
        "each rank writes its heads of the same capture, rank 0 the logits; what a rank did not bring is named; members"
        " other than logits, attention, summary and qk are refused",
        (_PARALLEL + "test_two_ranks_write_one_capture", _PARALLEL + "test_a_rank_that_cannot_be_hooked"),
    ),
    Feature(
        "data parallel", "yes", "each engine captures its own requests",
        (_PARALLEL + "test_two_engines_behind_one_server",),
    ),
    Feature(
        "pipeline parallel", "refused", "spans, no capture; the CPU engine cannot run it at all",
        (_SET_UPS,), ("pipeline parallelism is not supported",),
    ),
    Feature(
        "context parallel", "refused", "prefill: no capture; decode: logits, no attention",
        (_SET_UPS,), ("context parallelism is not supported", "each rank holds a part of every request's keys"),
    ),
    Feature(
        "chunked prefill", "yes", "one `prefill` span per chunk, the rows of an unchunked prompt",
        (_SCHEDULING + "test_chunked_prefill", _SCHEDULING + "test_chunks_among_decodes"),
    ),
    Feature(
        "prefix caching", "yes",
        "rows over cached keys; `rows=all` computes the whole prompt itself, for cached positions have no query",
        (_SCHEDULING + "test_prefix_cache_hit",),
    ),
    Feature(
        "preemption", "yes", "the last attempt's rows, one span per step of each attempt",
        (_SCHEDULING + "test_preemption",),
    ),
    Feature(
        "speculative decoding, n-gram", "yes",
        "rows of accepted drafts at their positions, rows of rejected ones nowhere; how many of each on the step span",
        (_SPECULATION,),
    ),
    Feature(
        "speculative decoding, draft model", "yes",
        "likewise; the drafting model's own layers are not captured. Of both kinds under tensor parallelism: vLLM's"
        " ranks may draw different tokens for a sampled request, with or without us, and rows are what they computed",
        (_SPECULATION,),
    ),
    Feature(
        "structured output", "yes", "logits from before the grammar masks them",
        (_BATCHES + "test_logits_are_from_before_the_grammar",),
    ),
    Feature(
        "penalties, logit bias", "yes", "logits from before both, bit for bit",
        (
            _BATCHES + "test_eight_requests_at_once_equal_each_alone",
            _BATCHES + "test_logits_are_the_samplers_bit_for_bit",
        ),
    ),
    Feature(
        "LoRA", "yes",
        "several adapters in a batch, each as its merged weights; `model` is the adapter, `engine.model` the base",
        (_FEATURES + "test_an_adapters_capture_is_that_of_the_merged_weights",),
    ),
    Feature(
        "n > 1", "yes", "one capture and one generation span for each sequence",
        (_BATCHES + "test_three_choices_are_three_captures",),
    ),
    Feature(
        "beam search", "refused",
        "one trace in which every beam and step is a generation, as vLLM runs it; a capture of it is answered with 400",
        (
            _FEATURES + "test_beam_search_is_one_trace_and_no_capture",
            _ENGINES + "test_two_api_servers_before_one_engine",
        ),
        ("beam search cannot be captured",),
    ),
    Feature(
        "logprobs, prompt logprobs", "yes", "the same capture with and without them",
        (_FEATURES + "test_log_probabilities_of_prompt_and_answer_are_not_mixed_up",),
    ),
    Feature(
        "fp8 KV cache", "yes",
        "rows of the keys that the kernel used, within 1e-5 (CPUs with AVX-512; FLASH_ATTN and TRITON_ATTN unproven);"
        " other quantised caches are refused",
        (_FP8,), ("KV cache of type",),
    ),
    Feature(
        "quantised weights", "yes",
        "the rows of that very engine within 1e-5 (int8 with int8 activations, 4 bits in groups: compressed-tensors)",
        (_FEATURES + "test_quantised_weights",),
    ),
    Feature(
        "sliding windows, hybrid KV groups", "yes", "rows within the window, also after its blocks were given back",
        (_FEATURES + "test_windows_that_give_blocks_back",),
    ),
    Feature(
        "KV sharing", "yes", "rows over the other layer's keys (Gemma 3n); not with `kv_sharing_fast_prefill`",
        (_MODELS + "test_layers_that_read_another_layers_keys", _SET_UPS),
        ("it reads the KV cache of", "KV-sharing fast prefill keeps most queries from some layers"),
    ),
    Feature(
        "MLA", "part", "logits; attention is refused, by layer where a model has both kinds",
        (_REFUSALS + "test_a_model_without_softmax_attention_refuses_it_and_serves",),
        ("is not causal softmax attention with a key cache",),
    ),
    Feature(
        "Mamba, linear layers", "part",
        "logits, and attention of the other layers; the store and the generation span name the layers without",
        (
            _REFUSALS + "test_a_model_without_softmax_attention_refuses_it_and_serves",
            _REFUSALS + "test_a_hybrid_gives_what_it_has_and_names_the_rest",
        ),
        ("is not causal softmax attention with a key cache",),
    ),
    Feature(
        "mixture of experts", "yes", "as other models; the router's choices as the member `router`",
        (_FAMILIES, _MEMBERS + "test_every_row_is_transformers"),
    ),
    Feature(
        "multimodal inputs", "part",
        "rows over image tokens where they are causal (BLIP-2); a model whose image tokens see each other is refused",
        (_MODELS + "test_rows_over_an_image", _LAYERS), ("bidirectional attention over image tokens",),
    ),
    Feature(
        "prompt embeddings", "refused", "spans; a capture of such a prompt is answered with 400",
        (_FEATURES + "test_a_prompt_of_embeddings_is_traced_and_not_captured",),
        ("a prompt of embeddings cannot be captured",),
    ),
    Feature(
        "encoder-decoder", "refused", "spans, no capture",
        (_MODELS + "test_an_encoder_decoder_serves_and_says_that_it_cannot",),
        ("encoder-decoder models are not supported",),
    ),
    Feature(
        "pooling models", "refused", "served, neither spans nor captures: nothing is generated",
        (_REFUSALS + "test_an_embedding_model_serves_and_says_that_it_cannot",), ("the model does not generate",),
    ),
    Feature(
        "async scheduling", "yes", "as without it; a surplus step is in no span and no capture",
        (_ENGINES + "test_steps_that_run_before_their_tokens_are_known",),
    ),
    Feature(
        "sleep mode", "unproven",
        "the CPU engine pauses and keeps its memory: captures after it are right; on a GPU nobody has looked",
        (_FEATURES + "test_sleep_and_wake_up_change_nothing_in_a_capture",),
    ),
    Feature(
        "several API servers", "yes", "header, status, spans and captures are the same whichever process answers",
        (_ENGINES + "test_two_api_servers_before_one_engine",),
    ),
    Feature(
        "disaggregated prefill, KV connectors", "yes",
        "rows over keys that came from elsewhere (ExampleConnector); `rows=all` computes the prompt itself",
        (_ENGINES + "test_keys_that_came_from_another_instance",),
    ),
    Feature(
        "dual-batch overlap", "refused", "spans, no capture", (_SET_UPS,), ("dual-batch overlap is not supported",)
    ),
    Feature(
        "prompt logits, hidden states", "yes",
        "every row is Transformers' (tiny models, float32); a compiled model is tapped with `TENSORSPAN_TAPS`; decoder"
        " layers that were not compared are refused by name",
        (
            _MEMBERS + "test_every_row_is_transformers",
            _MEMBERS + "test_the_setting_taps_a_compiled_engine_in_its_own_process",
        ),
    ),
    Feature(
        "attention backends", "part",
        "CPU_ATTN; FLASH_ATTN, TRITON_ATTN and FLEX_ATTENTION are written for and unproven; others are refused by name",
        (_FAMILIES, _BACKENDS), ("is not known: its cache or its softmax may be another",),
    ),
    Feature(
        "runner V2, CUDA graphs, Triton kernels", "unproven",
        "written against vLLM's own classes and run in Triton's interpreter, on no GPU",
    ),
)  # fmt: skip


def summary() -> str:
    """How many features are in which state, e.g. `18 yes, 4 part, ...`."""
    states = [feature.state for feature in FEATURES]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states, key=_ORDER.index)))


_ORDER: Final[tuple[State, ...]] = ("yes", "part", "refused", "unproven")


def markdown() -> str:
    """The table as docs/support.md has it."""
    rows = ["| feature | state | what that means | held by |", "|---|---|---|---|"]
    for feature in FEATURES:
        tests = [f"`{test.rpartition('::')[2]}`" for test in feature.tests]
        words = [f'"{words}"' for words in feature.refusals]
        held = "; ".join([*tests, *words]) or "nothing"
        rows.append(f"| {feature.name} | {feature.state} | {feature.says} | {held} |")
    return "\n".join(rows)
