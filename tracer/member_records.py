"""What can be asked of a model besides logits and attention: the specs, what an engine says of them, array names.

The lowest module: `tracer.records` is made of these, and so they are frozen data too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

__all__ = [
    "HIDDEN_STATES",
    "HIDDEN_STATES_PROMPT",
    "PROMPT_ARRAYS",
    "PROMPT_LOGITS",
    "PROMPT_LOGITS_TOPK",
    "PROMPT_LOGITS_TOPK_ID",
    "ROUTER_EXPERT",
    "ROUTER_EXPERT_PROMPT",
    "ROUTER_WEIGHT",
    "ROUTER_WEIGHT_PROMPT",
    "HiddenSpec",
    "MembersInfo",
    "RouterInfo",
    "RouterSpec",
]

PROMPT_LOGITS: Final = "prompt_logits"
PROMPT_LOGITS_TOPK: Final = "prompt_logits_topk"
PROMPT_LOGITS_TOPK_ID: Final = "prompt_logits_topk_id"
HIDDEN_STATES: Final = "hidden_states"
HIDDEN_STATES_PROMPT: Final = "hidden_states_prompt"
ROUTER_EXPERT: Final = "router_expert"
ROUTER_WEIGHT: Final = "router_weight"
ROUTER_EXPERT_PROMPT: Final = "router_expert_prompt"
ROUTER_WEIGHT_PROMPT: Final = "router_weight_prompt"
PROMPT_ARRAYS: Final = (
    PROMPT_LOGITS, PROMPT_LOGITS_TOPK, PROMPT_LOGITS_TOPK_ID,
    HIDDEN_STATES_PROMPT, ROUTER_EXPERT_PROMPT, ROUTER_WEIGHT_PROMPT,
)  # fmt: skip
"""Those whose first axis is the prompt's positions before the last, which is step 0."""
NOT_SAID: Final = "unavailable: the worker has not said that it can"


@dataclass(frozen=True, slots=True)
class HiddenSpec:
    """Which hidden states (the residual stream) to store."""

    layers: tuple[int, ...] | None = None
    """As Transformers counts: 0 is what the first layer reads, i + 1 what layer i leaves; None means all."""
    rows: Literal["decode", "all"] = "decode"
    """`decode`: the rows that predict output tokens. `all`: the prompt's rows too."""
    dtype: Literal["f16", "f32"] | None = None
    """None: f32 for an engine in float32, f16 for one in half precision."""


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """Which choices of experts to store."""

    layers: tuple[int, ...] | None = None
    """Indices of decoder layers, ascending; None means every layer with experts."""
    rows: Literal["decode", "all"] = "decode"


@dataclass(frozen=True, slots=True)
class RouterInfo:
    """One layer that chooses experts."""

    index: int
    """The decoder layer's."""
    name: str
    experts: int
    top_k: int
    """Experts that each token gets."""
    unsupported: str | None = None


@dataclass(frozen=True, slots=True)
class MembersInfo:
    """What one worker can capture besides logits and attention; a reason is as in `EngineInfo`."""

    prompt_logits_unsupported: str | None = None
    hidden_size: int = 0
    hidden_states: int = 0
    """Points of the residual stream that can be stored: the model's layers and one more."""
    hidden_states_unsupported: str | None = NOT_SAID
    routers: tuple[RouterInfo, ...] = ()
    router_unsupported: str | None = NOT_SAID
