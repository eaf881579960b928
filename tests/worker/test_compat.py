"""Every private name that the hooks use is in this vLLM, and a missing one is told."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.attention.backend import AttentionMetadataBuilder
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from tracer.worker import compat
from tracer.worker.layers import METADATA, _window_agrees


@pytest.mark.parametrize("names", [compat.NAMES, compat.V1_NAMES, compat.V2_NAMES])
def test_this_vllm_has_every_name_with_the_parameters_we_know(names: Any) -> None:
    assert compat.is_known(compat.version())
    assert compat.missing_names(names) == []


def test_this_vllm_has_every_field() -> None:
    assert compat.missing_fields() == []


@pytest.mark.parametrize(
    "wanted",
    [
        ("vllm.gone", "Name", ()),
        ("vllm.sampling_params", "SamplingParams.gone", ()),
        ("vllm.v1.cudagraph_dispatcher", "CudagraphDispatcher.dispatch", ("self", "tokens")),
    ],
)
def test_a_missing_module_name_or_parameter_is_told(wanted: Any) -> None:
    assert compat.missing_names((wanted,)) == [f"{wanted[0]}.{wanted[1]}"]


def test_a_missing_field_or_attribute_is_told() -> None:
    module = "vllm.v1.worker.gpu.input_batch"
    assert compat.missing_fields(((module, "InputBatch", ("req_ids", "gone")),)) == [f"{module}.InputBatch.gone"]
    assert compat.missing_fields((("vllm.gone", "Name", ("x",)),)) == ["vllm.gone.Name.x"]
    runner = SimpleNamespace(model=None, states=SimpleNamespace(np=1))
    told = compat.missing_attributes(runner, ("model", "states.np", "states.gone", "model.compute_logits"))
    assert told == ["model_runner.states.gone", "model_runner.model.compute_logits"]


@pytest.mark.parametrize("name", compat.V2_ATTRIBUTES)
def test_runner_v2_sets_every_attribute_somewhere(name: str) -> None:
    """The class needs a GPU to be made; its source says what an instance has (`model.x`: what it uses)."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(GPUModelRunner)))
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert f"self.{name}" in used


BACKENDS = [
    ("flash_attn", "FlashAttentionMetadata", True),
    ("triton_attn", "TritonAttentionMetadata", True),
    ("flex_attention", "FlexAttentionMetadata", True),
    ("rocm_attn", "RocmAttentionMetadata", True),
    ("flashinfer", "FlashInferMetadata", False),
    ("hpc_attn", "HpcAttnMetadata", False),
]


def metadata_in_source(module: str, name: str) -> set[str]:
    """Annotated fields of a dataclass, from the source: FlashInfer's and others' modules need their GPU library."""
    spec = importlib.util.find_spec(f"vllm.v1.attention.backends.{module}")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return {ast.unparse(node.target) for node in found.body if isinstance(node, ast.AnnAssign)}


@pytest.mark.parametrize(("module", "name", "readable"), BACKENDS)
def test_which_backends_tell_their_block_table(module: str, name: str, readable: bool) -> None:
    assert (metadata_in_source(module, name) >= METADATA) is readable


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("name", ["triton_attn.TritonAttentionImpl",
                                  "flash_attn.FlashAttentionImpl", "flex_attention.FlexAttentionImpl"])  # fmt: skip
def test_the_kernels_window_is_read_as_the_backend_means_it(name: str, window: int | None) -> None:
    module, cls = name.split(".")
    kind = getattr(importlib.import_module(f"vllm.v1.attention.backends.{module}"), cls)
    impl = kind(2, 64, 0.125, 1, None, window, "auto")
    assert _window_agrees(SimpleNamespace(impl=impl, sliding_window=window))
    assert not _window_agrees(SimpleNamespace(impl=impl, sliding_window=6))
    assert not getattr(impl, "logits_soft_cap", None), "no soft cap is 0 for the kernels, never read as a cap"


def test_the_cpu_kernels_window_counts_the_visible_keys() -> None:
    source = inspect.getsource(CPUAttentionBackendImpl.__init__)
    assert "self.sliding_window = -1\n" in source
    assert "self.sliding_window = sliding_window\n" in source
    assert _window_agrees(SimpleNamespace(impl=SimpleNamespace(sliding_window=-1), sliding_window=None))
    assert _window_agrees(SimpleNamespace(impl=SimpleNamespace(sliding_window=5), sliding_window=5))


def test_metadata_is_found_through_the_builder() -> None:
    layer = SimpleNamespace(attn_backend=CPUAttentionBackend)
    assert compat.metadata_fields(layer) >= METADATA | {"seq_lens", "dynamic_causal"}
    unnamed = SimpleNamespace(get_builder_cls=lambda: AttentionMetadataBuilder)
    assert compat.metadata_fields(SimpleNamespace(attn_backend=unnamed)) == frozenset()


def test_patching_twice_wraps_once() -> None:
    owner = SimpleNamespace(call=lambda: 1)
    for _ in range(2):
        compat.patch(owner, "call", lambda original: lambda: original() + 1)
    assert owner.call() == 2
