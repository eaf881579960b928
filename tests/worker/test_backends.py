"""Every attention backend and cache type that this vLLM knows is read, or refused by its name."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from vllm.config.cache import CacheDType
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tracer.worker import compat, fp8
from tracer.worker.layers import METADATA, Layer, _refusal, describe_layers

READ = {"CPU_ATTN", "FLASH_ATTN", "FLEX_ATTENTION", "TRITON_ATTN"}
PLAIN = {"auto": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FP8 = {
    "CPU_ATTN": {"fp8", "fp8_e4m3", "fp8_e5m2"}, "FLASH_ATTN": {"fp8", "fp8_e4m3"}, "TRITON_ATTN": {"fp8", "fp8_e4m3"}
}  # fmt: skip


@pytest.fixture(autouse=True)
def _kernels_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's module for ROCm loads `vllm._C`: registered already under another name where a CPU has no AVX-512."""
    monkeypatch.setitem(sys.modules, "vllm._C", ModuleType("vllm._C"))


def backend_of(name: str) -> Any:
    """The backend's class; where its module needs a GPU's libraries, one that looks like it."""
    member = AttentionBackendEnum[name]
    if member.value:
        try:
            return member.get_class()
        except Exception:  # noqa: BLE001 - whatever such a module wants and does not find here
            module, _, qualname = member.value.rpartition(".")
    else:
        module, qualname = "somewhere", name.title()
    return type(qualname, (), {"__module__": module, "get_name": staticmethod(lambda: name)})


def layer_of(backend: Any, **changes: Any) -> Any:
    """A plain decoder layer as the engine would have it on that backend."""
    kind = compat.attention_class()
    layer = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    values = {
        "attn_backend": backend, "attn_type": "decoder",
        "impl": SimpleNamespace(scale=1.0, sliding_window=None, num_heads=2, num_kv_heads=1, head_size=8),
        "kv_cache": torch.zeros(2, 1, 16, 16), "kv_cache_dtype": "auto", "dtype": torch.float32, "isa": "vec",
        "kv_sharing_target_layer_name": None, "use_alibi_sqrt": False, "use_mm_prefix": False, "sliding_window": None,
        "query_quant": None, "num_heads": 2, "num_kv_heads": 1, "head_size": 8, "head_size_v": 8,
        "_k_scale": torch.tensor(0.5), "_k_scale_float": 0.5, "_q_scale": torch.tensor(0.25), "_q_scale_float": 0.25,
    }  # fmt: skip
    for name, value in {**values, **changes}.items():
        setattr(layer, name, value)
    return layer


def quantised(name: str, kind: str, **changes: Any) -> Any:
    """An fp8 layer as the engine would have it on that backend."""
    asked = None if name == "CPU_ATTN" else object()
    values = {"kv_cache": torch.zeros(2, 1, 16, 16, dtype=torch.uint8), "kv_cache_dtype": kind, "query_quant": asked}
    return layer_of(backend_of(name), **{**values, **changes})


@pytest.mark.parametrize("name", [member.name for member in AttentionBackendEnum])
def test_each_backend_is_read_or_refused_by_its_name(name: str) -> None:
    backend = backend_of(name)
    reason = _refusal(layer_of(backend))
    if name in READ:
        assert reason is None
        assert compat.metadata_fields(SimpleNamespace(attn_backend=backend)) >= METADATA
        assert hasattr(backend.get_impl_cls(), "do_kv_cache_update")
        assert not backend.forward_includes_kv_cache_update, "the step's keys would not be in the cache yet"
    else:
        assert reason is not None
        assert reason.startswith(f"attention backend {backend.get_name()} ({backend.__module__}.")
        assert reason.endswith("is not known: its cache or its softmax may be another")


def test_another_class_under_a_known_name_is_not_known() -> None:
    other: Any = type("Mine", (backend_of("CPU_ATTN"),), {"__module__": "my.plugin"})
    assert other.get_name() == "CPU_ATTN"
    assert "attention backend CPU_ATTN (my.plugin.Mine) is not known" in str(_refusal(layer_of(other)))
    assert "attention backend without a name is not known" in str(_refusal(layer_of(None)))


@pytest.mark.parametrize("name", sorted(READ))
@pytest.mark.parametrize("kind", get_args(CacheDType))
def test_each_type_of_cache_is_read_or_refused_by_its_name(name: str, kind: str) -> None:
    if kind in PLAIN:
        layer = layer_of(
            backend_of(name), kv_cache=torch.zeros(2, 1, 16, 16, dtype=PLAIN[kind]), kv_cache_dtype=kind,
            dtype=PLAIN[kind],
        )  # fmt: skip
        assert _refusal(layer) is None
        assert fp8.key_storage(layer) is fp8.query_storage(layer) is None
        return
    layer = quantised(name, kind)
    reason = _refusal(layer)
    if kind not in FP8.get(name, set()):
        assert reason is not None
        assert reason.startswith(f"KV cache of type {kind}")
        return
    assert reason is None
    stored, asked = fp8.key_storage(layer), fp8.query_storage(layer)
    assert stored == fp8.Quantised(torch.float8_e5m2 if kind == "fp8_e5m2" else torch.float8_e4m3fn, 0.5)
    assert asked == (None if name == "CPU_ATTN" else fp8.Quantised(torch.float8_e4m3fn, 0.25))


def test_a_cache_of_another_type_than_the_queries_is_refused() -> None:
    reason = _refusal(layer_of(backend_of("TRITON_ATTN"), kv_cache_dtype="float16", dtype=torch.bfloat16,
                               kv_cache=torch.zeros(2, 1, 16, 16, dtype=torch.float16)))  # fmt: skip
    assert reason == "KV cache of type float16 beside queries of torch.bfloat16"


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("CPU_ATTN", {"isa": "amx_fp8"}, "of the CPU kernel 'amx_fp8'"),
        ("CPU_ATTN", {"isa": "vec16"}, "of the CPU kernel 'vec16'"),
        ("CPU_ATTN", {"query_quant": object()}, "backend CPU_ATTN should not see"),
        ("TRITON_ATTN", {"query_quant": None}, "backend TRITON_ATTN should not see"),
        ("FLASH_ATTN", {"kv_cache": torch.zeros(2, 1, 16, 16)}, "not in bytes"),
        ("CPU_ATTN", {"_k_scale": torch.ones(2)}, "without one scale of its keys"),
        ("CPU_ATTN", {"_k_scale": torch.tensor(0.25)}, "without one scale of its keys"),
        ("CPU_ATTN", {"_k_scale_float": float("nan")}, "without one scale of its keys"),
        ("CPU_ATTN", {"_k_scale": torch.tensor(0.0), "_k_scale_float": 0.0}, "without one scale of its keys"),
        ("FLASH_ATTN", {"_q_scale": torch.ones(2)}, "without one scale of its queries"),
    ],
)
def test_an_fp8_layer_that_is_not_fully_known_is_refused(name: str, changes: dict[str, Any], words: str) -> None:
    reason = _refusal(quantised(name, "fp8", **changes))
    assert reason is not None
    assert reason.startswith("KV cache of type fp8")
    assert words in reason


def test_layers_are_stored_in_one_precision() -> None:
    """Beside an fp8 layer with a scale, queries and keys of 16-bit layers take float32, too: they share an array."""
    plain = layer_of(backend_of("TRITON_ATTN"), kv_cache=torch.zeros(2, 1, 16, 16).half(), dtype=torch.float16)
    scaled = quantised("TRITON_ATTN", "fp8", dtype=torch.float16)
    for layer in (plain, scaled):
        layer.get_kv_cache_spec = None
        layer.impl = type("Impl", (SimpleNamespace,), {"do_kv_cache_update": staticmethod(store)})(**vars(layer.impl))
    for modules, wide in (({"0": plain}, False), ({"0": plain, "1": scaled}, True)):
        layers = describe_layers(modules)
        assert [layer.info.unsupported for layer in layers] == [None] * len(modules)
        assert [layer.needs_f32 for layer in layers] == [wide] * len(modules)


def test_one_scale_of_one_needs_no_more_than_the_engines_precision() -> None:
    for dtype, scale, wide in ((torch.bfloat16, 1.0, False), (torch.bfloat16, 0.5, True), (torch.float32, 1.0, True)):
        one = {"_k_scale": torch.tensor(scale), "_k_scale_float": scale}
        module = quantised("CPU_ATTN", "fp8", dtype=dtype, **one)
        keys = SimpleNamespace(quantised=fp8.key_storage(module))
        layer: Any = SimpleNamespace(module=module, keys=keys, query=None, beside_f32=False)
        layer.query_dtype = Layer.query_dtype.fget(layer)  # type: ignore[attr-defined]
        assert Layer.needs_f32.fget(layer) == wide  # type: ignore[attr-defined]


def store(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
    """A cache update in the style of GPUs."""
    quantised_ = fp8.key_storage(layer)
    if quantised_ is not None:
        key, value = quantised_.encode(key.float()), quantised_.encode(value.float())
    for row, slot in enumerate(slots.tolist()):
        block, at = divmod(slot, cache.shape[2])
        cache[block, :, at, : layer.head_size], cache[block, :, at, layer.head_size :] = key[row], value[row]
