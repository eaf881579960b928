"""Reading keys back from vLLM's paged cache.

Where a backend puts element (token, dim) of a key inside a block is its own business: row-major on GPUs, transposed
or tiled on CPUs, and a wrong guess gives plausible garbage. So nothing is guessed. `learn` writes known numbers
through the backend's own `do_kv_cache_update` into a scratch block, reads the raw memory, and derives the map; then
it checks the map on random keys, bit for bit. A backend for which that fails is refused.

In an fp8 cache backends round as they like, some to nearest and some towards zero. The probe's numbers therefore lie
a quarter of a step beyond an element, from where both ways lead to it; the check writes every element that way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from tracer.worker.fp8 import Quantised

__all__ = ["KeyLayout", "LayoutError", "learn"]

BASE: Final = 128
"""Base of the probe's numbers: every digit is exact in bfloat16 and float16."""
FP8_BASE: Final = 4
"""The same for fp8, whose formats all know the numbers 4 to 7 and at most one between two of them ..."""
FP8_ZERO: Final = 4
"""... of which this one stands for the digit 0."""
NUDGE: Final = 0.25
"""What is added to a number before a backend rounds it, in steps of the format."""
LEAST_CODES: Final = 32
"""Elements of the format that must survive the engine's own precision for a check to mean something."""
BLOCKS: Final = 4
"""Blocks of the scratch cache."""


class LayoutError(RuntimeError):
    """The backend's cache could not be read back exactly."""


@dataclass(frozen=True, slots=True)
class KeyLayout:
    """Where the key of one token lies inside one block of one KV head."""

    block_size: int
    """Tokens per block of the kernel (`kv_cache.shape[2]`)."""
    head_size: int
    offsets: torch.Tensor
    """int64 [block_size, head_size]: index into a block's flattened `[block_size, 2 * head_size]` region."""
    strides: tuple[int, int, int] | None
    """(first, per token, per dim) if the offsets are affine: then a view reads without a gather."""
    quantised: Quantised | None = None
    """What the cache's bytes stand for; None if it holds keys as they are."""

    def read(self, kv_cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """Keys of these blocks in order, [kv_heads, len(blocks) * block_size, head_size].

        kv_cache: [num_blocks, kv_heads, block_size, 2 * head_size], any strides. Keys of an fp8 cache come as the
        float32 numbers that they stand for, others in the cache's own type.
        """
        if self.strides is not None and self.strides[1:] == (kv_cache.shape[3], 1):
            first = self.strides[0]  # one half of each slot, on GPUs: a slice whatever the cache's own strides
            picked = kv_cache[..., first : first + self.head_size][blocks]
        elif self.strides is not None and _interior_contiguous(kv_cache):
            picked = self._view(kv_cache)[blocks]
        else:
            flat = kv_cache[blocks].reshape(len(blocks), kv_cache.shape[1], -1)
            picked = flat[:, :, self.offsets.flatten()]
            picked = picked.view(len(blocks), kv_cache.shape[1], self.block_size, self.head_size)
        keys = picked.transpose(0, 1).reshape(kv_cache.shape[1], -1, self.head_size)
        return keys if self.quantised is None else self.quantised.decode(keys)

    def _view(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """All keys as a strided view, [num_blocks, kv_heads, block_size, head_size]."""
        assert self.strides is not None
        first, per_token, per_dim = self.strides
        shape = (kv_cache.shape[0], kv_cache.shape[1], self.block_size, self.head_size)
        strides = (kv_cache.stride(0), kv_cache.stride(1), per_token, per_dim)
        return kv_cache.as_strided(shape, strides, kv_cache.storage_offset() + first)


@dataclass(frozen=True, slots=True)
class _Digits:
    """The probe's digits, as keys that the backend is given and as what its memory then shows."""

    dtype: torch.dtype
    """Of the keys that the engine gives the backend."""
    quantised: Quantised | None

    @property
    def base(self) -> int:
        return BASE if self.quantised is None else FP8_BASE

    @property
    def nothing(self) -> float | int:
        """What memory is filled with: no digit."""
        return -1.0 if self.quantised is None else int(self.quantised.encode(torch.tensor(-self.quantised.scale)))

    def written(self, digits: torch.Tensor) -> torch.Tensor:
        if self.quantised is None:
            return digits.to(self.dtype)
        return ((digits + FP8_ZERO + NUDGE / 2) * self.quantised.scale).to(self.dtype)

    def seen(self, raw: torch.Tensor) -> torch.Tensor:
        """float32, below 0 where no digit is."""
        if self.quantised is None:
            return raw.to(torch.float32)
        return raw.view(self.quantised.dtype).to(torch.float32) - FP8_ZERO


def learn(layer: Any, kv_cache: torch.Tensor, quantised: Quantised | None = None) -> KeyLayout:
    """The layout that `layer.impl` writes into caches like `kv_cache`; raises LayoutError if it cannot be read back.

    layer: a vLLM `Attention` layer; kv_cache: its bound cache, used for shape, dtype and strides only; quantised: what
    the cache's bytes are taken for, which is checked, too.
    """
    if not hasattr(layer.impl, "do_kv_cache_update"):
        raise LayoutError(f"backend {type(layer.impl).__name__} writes its cache where it cannot be checked")
    if kv_cache.dim() != 4 or kv_cache.shape[3] != 2 * layer.head_size:
        raise LayoutError(
            f"{type(layer.impl).__name__}: a KV cache of shape {tuple(kv_cache.shape)} is not "
            "[blocks, kv_heads, block, 2 * head_size]"
        )
    scratch = _scratch_like(kv_cache)
    digits = _Digits(kv_cache.dtype if quantised is None else layer.dtype, quantised)
    offsets = _probe(layer, scratch, digits)
    layout = KeyLayout(scratch.shape[2], layer.head_size, offsets.to(scratch.device), _affine(offsets), quantised)
    _verify(layer, scratch, layout, digits)
    return layout


def _scratch_like(kv_cache: torch.Tensor) -> torch.Tensor:
    """A small cache with the strides' order of the real one."""
    order = sorted(range(4), key=lambda dim: -kv_cache.stride(dim))
    shape = (BLOCKS, *kv_cache.shape[1:])
    base = torch.zeros([shape[dim] for dim in order], dtype=kv_cache.dtype, device=kv_cache.device)
    return base.permute([order.index(dim) for dim in range(4)])


def _write(layer: Any, scratch: torch.Tensor, key: torch.Tensor, slots: torch.Tensor) -> None:
    """Let the backend store `key` [tokens, kv_heads, head_size]; values are a constant no probe uses."""
    value = torch.full((*key.shape[:2], layer.head_size_v), -3.0, dtype=key.dtype, device=key.device)
    layer.impl.do_kv_cache_update(layer, key, value, scratch, slots.to(key.device))


def _probe(layer: Any, scratch: torch.Tensor, digits: _Digits) -> torch.Tensor:
    """Offsets of every (token, dim), found by writing each element's own number, digit by digit."""
    block_size, head_size, heads = scratch.shape[2], layer.head_size, scratch.shape[1]
    numbers = torch.arange(block_size * head_size)
    found = torch.zeros(block_size * 2 * head_size, dtype=torch.int64)
    is_key = torch.ones_like(found, dtype=torch.bool)
    power = 1
    while power < len(numbers):
        scratch.fill_(digits.nothing)
        digit = digits.written(numbers // power % digits.base).view(block_size, 1, head_size)
        key = digit.expand(block_size, heads, head_size).contiguous().to(scratch.device)
        _write(layer, scratch, key, torch.arange(block_size, dtype=torch.int64) + block_size)
        region = scratch[1].reshape(heads, -1)
        if not torch.equal(region, region[:1].expand_as(region)):
            raise LayoutError("KV heads are stored in different layouts")
        raw = digits.seen(region[0].to(device="cpu", copy=True))
        is_key &= raw >= 0
        found += raw.clamp(min=0).to(torch.int64) * power
        power *= digits.base
    where = torch.nonzero(is_key).flatten()
    offsets = torch.full((block_size * head_size,), -1, dtype=torch.int64)
    if len(where) == len(numbers):
        offsets[found[where].clamp(max=len(numbers) - 1)] = where
    if len(where) != len(numbers) or bool((offsets < 0).any()):
        raise LayoutError(f"backend {type(layer.impl).__name__} stores keys changed, not just moved")
    return offsets.view(block_size, head_size)


def _affine(offsets: torch.Tensor) -> tuple[int, int, int] | None:
    first = int(offsets[0, 0])
    per_token, per_dim = int(offsets[1, 0]) - first, int(offsets[0, 1]) - first
    tokens, dims = (torch.arange(n) for n in offsets.shape)
    expected = first + tokens[:, None] * per_token + dims[None, :] * per_dim
    return (first, per_token, per_dim) if torch.equal(expected, offsets) else None


def _interior_contiguous(kv_cache: torch.Tensor) -> bool:
    return bool(kv_cache.stride(3) == 1 and kv_cache.stride(2) == kv_cache.shape[3])


def _verify(layer: Any, scratch: torch.Tensor, layout: KeyLayout, digits: _Digits) -> None:
    """Random keys in scattered slots must come back bit for bit."""
    generator = torch.Generator().manual_seed(7)
    slots = torch.randperm(BLOCKS * layout.block_size, generator=generator)
    shape = (len(slots), scratch.shape[1], layout.head_size)
    if layout.quantised is None:
        key = expected = torch.randn(shape, generator=generator).to(digits.dtype)
    else:
        written, values = _elements(layout.quantised, digits.dtype)
        picked = torch.randint(len(values), shape, generator=generator)
        key, expected = written[picked], values[picked]
    _write(layer, scratch, key.to(scratch.device), slots)
    read = layout.read(scratch, torch.arange(BLOCKS, device=scratch.device)).cpu()
    if not torch.equal(read[:, slots].transpose(0, 1), expected):
        raise LayoutError(f"backend {type(layer.impl).__name__} does not read back what it stored")


def _elements(quantised: Quantised, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Every finite element of the format: a key of type `dtype` that is stored as it, and the number it stands for."""
    every = torch.arange(256, dtype=torch.uint8).view(quantised.dtype).float()
    every = every[every.isfinite()]
    sizes = every.abs().unique()
    steps = torch.cat([sizes.diff(), sizes[-1:] - sizes[-2:-1]])
    step = steps[torch.searchsorted(sizes, every.abs())]
    nudged = every + torch.where(every.signbit(), -NUDGE, NUDGE) * step
    key = (nudged * quantised.scale).to(dtype)
    kept = (key.float() / quantised.scale - nudged).abs() < NUDGE / 2 * step  # A float16 key may be too small or large.
    if int(kept.sum()) < LEAST_CODES:
        raise LayoutError(f"keys of type {dtype} can hardly be told apart at a scale of {quantised.scale:g}")
    return key[kept], every[kept] * quantised.scale
