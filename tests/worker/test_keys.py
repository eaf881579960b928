"""Key read-back against vLLM's real CPU cache kernels, and its refusals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from tests.cpus import AVX512
from tracer.worker.fp8 import FORMATS, Quantised
from tracer.worker.keys import LayoutError, learn


def cpu_layer(head_size: int, isa: str, kind: str = "auto", scale: float = 1.0, dtype: Any = None) -> Any:
    """A layer with the real `do_kv_cache_update` of the CPU backend, without a model around it."""
    impl = object.__new__(CPUAttentionBackendImpl)
    impl.attn_type, impl.kv_cache_dtype = "decoder", kind
    return SimpleNamespace(
        impl=impl, head_size=head_size, head_size_v=head_size, isa=isa, dtype=dtype, _k_scale_float=scale,
        _v_scale_float=0.3,
    )  # fmt: skip


@pytest.mark.parametrize("isa", ["vec", "amx", "vec16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_size", "block_size"), [(64, 32), (64, 128), (32, 96), (256, 64)])
def test_every_layout_of_the_cpu_backend_is_learned(
    isa: str, dtype: torch.dtype, head_size: int, block_size: int
) -> None:
    layer, heads = cpu_layer(head_size, isa), 3
    cache = torch.zeros(8, heads, block_size, 2 * head_size, dtype=dtype)
    if isa == "amx" and not AVX512:
        with pytest.raises(RuntimeError, match="Unsupported CPU attention configuration"):
            learn(layer, cache)
        return
    layout = learn(layer, cache)
    key = torch.randn(2 * block_size, heads, head_size).to(dtype)
    slots = torch.cat([torch.arange(block_size) + 5 * block_size, torch.arange(block_size) + 2 * block_size])
    layer.impl.do_kv_cache_update(layer, key, key.clone(), cache, slots)
    assert torch.equal(layout.read(cache, torch.tensor([5, 2])).transpose(0, 1), key)


@pytest.mark.parametrize(("isa", "head_size", "block_size"), [("vec", 64, 32), ("vec", 96, 128), ("amx", 64, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["fp8", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("scale", [1.0, 0.037, 2.5])
def test_every_fp8_layout_of_the_cpu_backend_is_learned(
    isa: str, head_size: int, block_size: int, dtype: torch.dtype, kind: str, scale: float
) -> None:
    layer, heads, quantised = cpu_layer(head_size, isa, kind, scale, dtype), 2, Quantised(FORMATS[kind], scale)
    cache = torch.zeros(6, heads, block_size, 2 * head_size, dtype=torch.uint8)
    if not AVX512:
        with pytest.raises(RuntimeError, match="Unsupported CPU attention configuration"):
            learn(layer, cache, quantised)
        return
    layout = learn(layer, cache, quantised)
    key = (torch.randn(2 * block_size, heads, head_size) * 4 * scale).to(dtype)
    slots = torch.cat([torch.arange(block_size) + 5 * block_size, torch.arange(block_size) + 2 * block_size])
    layer.impl.do_kv_cache_update(layer, key, key.clone(), cache, slots)
    read = layout.read(cache, torch.tensor([5, 2])).transpose(0, 1)
    assert read.dtype == torch.float32
    # Whichever way the backend rounds, a step of the format is the most that it is away.
    step = torch.finfo(quantised.dtype).eps * key.float().abs() + torch.finfo(quantised.dtype).smallest_normal * scale
    assert ((read - key.float()).abs() <= step).all()
    assert len(read.unique()) > 60


class Backend:
    """A cache in GPU style (keys in the first half of each slot), with a fault to order."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
        size, quantised = layer.head_size, getattr(layer, "stored", None)
        if quantised is not None:
            key, value = quantised.encode(key.float()), quantised.encode(value.float())
        for row, slot in enumerate(slots.tolist()):
            block, at = divmod(slot, cache.shape[2])
            cache[block, :, at, :size] = key[row] * (0.5 if self.fault == "scaled" else 1.0)
            cache[block, :, at, size:] = value[row]
        if self.fault == "swaps heads":
            cache[:, [0, 1]] = cache[:, [1, 0]]


def layer_with(backend: Any, stored: Quantised | None = None) -> Any:
    return SimpleNamespace(impl=backend, head_size=8, head_size_v=8, dtype=torch.float16, stored=stored)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)])
def test_gpu_style_layouts_and_strides(order: tuple[int, ...]) -> None:
    shape = (6, 2, 4, 16)
    base = torch.zeros([shape[dim] for dim in order])
    cache = base.permute([order.index(dim) for dim in range(4)])
    layout = learn(layer_with(Backend()), cache)
    cache.copy_(torch.randn(shape))
    assert torch.equal(layout.read(cache, torch.tensor([3])), cache[3, :, :, :8])


@pytest.mark.parametrize(("fault", "words"), [("scaled", "changed"), ("swaps heads", "does not read back")])
def test_a_cache_that_cannot_be_read_back_is_refused(fault: str, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        learn(layer_with(Backend(fault)), torch.zeros(6, 2, 4, 16))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)])
@pytest.mark.parametrize("quantised", [Quantised(torch.float8_e4m3fn, 0.7), Quantised(torch.float8_e5m2, 1.0)])
def test_bytes_that_a_backend_rounds_to_nearest_are_learned(order: tuple[int, ...], quantised: Quantised) -> None:
    shape, layer = (6, 2, 16, 16), layer_with(Backend(), quantised)
    memory = torch.zeros([shape[dim] for dim in order], dtype=torch.uint8)
    cache = memory.permute([order.index(dim) for dim in range(4)])
    layout = learn(layer, cache, quantised)
    values = torch.randn(shape)
    cache.copy_(quantised.encode(values))
    expected = quantised.encode(values).view(quantised.dtype).float() * quantised.scale
    assert torch.equal(layout.read(cache, torch.tensor([3])), expected[3, :, :, :8])


@pytest.mark.parametrize(
    ("stored", "taken"),
    [
        (Quantised(torch.float8_e5m2, 1.0), Quantised(torch.float8_e4m3fn, 1.0)),
        (Quantised(torch.float8_e4m3fnuz, 1.0), Quantised(torch.float8_e4m3fn, 1.0)),
        (Quantised(torch.float8_e4m3fn, 1.0), Quantised(torch.float8_e5m2, 1.0)),
        (Quantised(torch.float8_e4m3fn, 0.9), Quantised(torch.float8_e4m3fn, 1.0)),
        (Quantised(torch.float8_e4m3fn, 2.0), Quantised(torch.float8_e4m3fn, 0.5)),
    ],
)
def test_bytes_that_mean_something_else_are_refused(stored: Quantised, taken: Quantised) -> None:
    with pytest.raises(LayoutError):
        learn(layer_with(Backend(), stored), torch.zeros(6, 2, 16, 16, dtype=torch.uint8), taken)


def test_a_scale_that_the_engines_type_cannot_follow_is_refused() -> None:
    quantised = Quantised(torch.float8_e4m3fn, 1e-9)
    with pytest.raises(LayoutError):
        learn(layer_with(Backend(), quantised), torch.zeros(6, 2, 16, 16, dtype=torch.uint8), quantised)


def test_unknown_shapes_and_backends_are_refused() -> None:
    with pytest.raises(LayoutError, match="Backend: a KV cache of shape"):
        learn(layer_with(Backend()), torch.zeros(2, 6, 4, 2, 8))
    with pytest.raises(LayoutError, match="cannot be checked"):
        learn(layer_with(object()), torch.zeros(6, 2, 4, 16))
