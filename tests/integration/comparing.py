"""A capture against an oracle: every row, map and logit of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch

from tests.cpus import EAGER_TOLERANCE
from tests.integration.oracle import Oracle
from tests.integration.runs import rows_of, runner_of
from tracer import Capture

__all__ = ["DECODE", "LOGITS_TOLERANCE", "TOLERANCE", "WHOLE", "Inputs", "check"]

TOLERANCE: Final = EAGER_TOLERANCE
LOGITS_TOLERANCE: Final = 1e-4
WHOLE: Final = "logits;dtype=f32, attention;rows=all;dtype=f32"
DECODE: Final = "logits;dtype=f32, attention;dtype=f32"


def check(
    capture: Capture | None, length: int, want: Oracle, attention: float = TOLERANCE, logits: float = LOGITS_TOLERANCE
) -> None:
    """Every row of a capture of a prompt of `length` tokens is the oracle's."""
    assert capture is not None
    assert capture.complete, capture.missing
    steps = len(capture.steps)
    assert steps == want.logits.shape[0] - length
    np.testing.assert_allclose(np.asarray(capture.logits), want.logits[length - 1 : -1], rtol=0, atol=logits)
    assert list(capture.attention) == list(range(len(want.attention)))
    for layer in capture.attention:
        for step, row in enumerate(rows_of(capture, layer)):
            expected = want.attention[layer, :, length - 1 + step, : length + step]
            np.testing.assert_allclose(row, expected, rtol=0, atol=attention)
        if "attention_prefill" in capture.arrays:
            got = np.asarray(capture.attention_prefill[layer])[..., :length]
            np.testing.assert_allclose(got, want.attention[layer, :, :length, :length], rtol=0, atol=attention)


class Inputs:
    """Queries and keys as an engine's attention layers were given them: [layer][position, head, dim]."""

    def __init__(self, llm: Any) -> None:
        modules = runner_of(llm).compilation_config.static_forward_context
        self.layers: list[tuple[Any, list[torch.Tensor], list[torch.Tensor]]] = [
            (module, [], []) for module in modules.values() if hasattr(module, "kv_cache")
        ]
        for module, queries, keys in self.layers:
            module.register_forward_pre_hook(self._keep(queries, keys))

    def _keep(self, queries: list[torch.Tensor], keys: list[torch.Tensor]) -> Callable[..., None]:
        def keep(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            queries.append(inputs[0].view(-1, module.num_heads, module.head_size).double())
            keys.append(inputs[1].view(-1, module.num_kv_heads, module.head_size).double())

        return keep

    def attention(self) -> Any:
        """float64 [layer, head, query, key] of the one request that ran, from its definition."""
        maps = []
        for module, queries, keys in self.layers:
            query, key = torch.cat(queries), torch.cat(keys)
            key = key.repeat_interleave(module.num_heads // module.num_kv_heads, dim=1)
            scores = torch.einsum("qhd,khd->hqk", query, key) * module.impl.scale
            future = torch.ones(len(query), len(query), dtype=torch.bool).triu(1)
            maps.append(scores.masked_fill(future, -torch.inf).softmax(dim=-1).numpy())
        return np.stack(maps)
