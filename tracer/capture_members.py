"""Prompt logits, hidden states and choices of experts of an opened capture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import xarray as xr

from tracer import config
from tracer import member_records as names
from tracer.capture_parts import AttentionLayers
from tracer.store_files import spans_lost

__all__ = ["CaptureMembers"]


class CaptureMembers(ABC):
    """What `Capture` has beside logits and attention; all of it lazy."""

    @abstractmethod
    def _variable(self, name: str) -> xr.DataArray: ...

    @abstractmethod
    def _layers(self, name: str, axis: str = "layer") -> AttentionLayers: ...

    attrs: dict[str, Any]
    location: str

    @property
    def traced(self) -> bool:
        """True if spans were made of this generation; False: its trace was not sampled, and no trace leads here."""
        return bool(self.attrs.get("traced", True))

    @property
    def spans_lost(self) -> str:
        """Why the generation span never reached the collector; empty if nothing says so (a bucket never does)."""
        return "" if config.is_remote(self.location) else spans_lost(config.local_path(self.location))

    @property
    def prompt_logits(self) -> xr.DataArray:
        """Raw logits `[prompt_row, vocab]`: row *p* predicts prompt token *p* + 1; KeyError says what exists instead.

        The row that predicts the first output token is `logits[0]`.
        """
        return self._variable(names.PROMPT_LOGITS)

    @property
    def hidden_states(self) -> AttentionLayers:
        """`hidden_states[i]` → `[step, hidden]`: the residual stream at the rows that predict output tokens.

        *i* as in Transformers' `hidden_states`: 0 is what the first layer reads, *i* + 1 what layer *i* leaves; the
        last is from before the final norm.
        """
        return self._layers(names.HIDDEN_STATES, "hidden_layer")

    @property
    def hidden_states_prompt(self) -> AttentionLayers:
        """Likewise `[prompt_row, hidden]` of the positions before the last prompt row."""
        return self._layers(names.HIDDEN_STATES_PROMPT, "hidden_layer")

    @property
    def router_expert(self) -> AttentionLayers:
        """`router_expert[layer]` → `[step, expert_slot]`: experts that the row went to, the heaviest first."""
        return self._layers(names.ROUTER_EXPERT, "router_layer")

    @property
    def router_weight(self) -> AttentionLayers:
        """`router_weight[layer]` → `[step, expert_slot]`: what their outputs were multiplied by."""
        return self._layers(names.ROUTER_WEIGHT, "router_layer")

    @property
    def router_expert_prompt(self) -> AttentionLayers:
        """Likewise `[prompt_row, expert_slot]`."""
        return self._layers(names.ROUTER_EXPERT_PROMPT, "router_layer")

    @property
    def router_weight_prompt(self) -> AttentionLayers:
        """Likewise `[prompt_row, expert_slot]`."""
        return self._layers(names.ROUTER_WEIGHT_PROMPT, "router_layer")
