"""What the engine's own CPU kernels can do on this machine, and how near to Transformers' they come."""

from __future__ import annotations

from typing import Final

import torch

__all__ = ["AVX512", "EAGER_TOLERANCE"]

AVX512: Final[bool] = torch.cpu._is_avx512_supported()
"""Without it vLLM has no kernels for fp8 caches and for 4-bit weights, and multiplies int8 with saturating sums."""
EAGER_TOLERANCE: Final = 1e-5 if AVX512 else 2e-5
"""Largest distance of an attention weight, in float32, from Transformers' eager one.

Without AVX-512 vLLM multiplies in another order: 1.1e-5 was measured with 30 layers. Rows from the queries and keys
that the engine really had are as near as ever, and tests that have those ask for 1e-5 everywhere.
"""
