"""Every attention-like key of every model that this vLLM serves is known, and an unknown one is refused by name."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
import vllm
from transformers.configuration_utils import ALLOWED_ATTN_LAYER_TYPES
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from vllm.model_executor.models.registry import ModelRegistry

from tracer.worker.kernel_facts import KERNEL_ATTRIBUTES, kernel_refusal
from tracer.worker.model_config import (
    HARMLESS,
    KNOWN,
    LAYER_TYPES,
    LOOKS_LIKE_ATTENTION,
    REFUSED,
    config_refusal,
)

BACKENDS = ("cpu_attn", "flash_attn", "triton_attn", "flex_attention", "rocm_aiter_fa", "rocm_attn")
"""Files of vLLM's backends whose layers we capture where their cache can be read back."""
READ_ELSEWHERE = {"is_causal", "attn_config", "attention"}
"""Keys with a rule of their own."""


def served() -> list[str]:
    """Model types of Transformers that generate and that this vLLM names."""
    architectures = set(ModelRegistry.get_supported_archs())
    names: dict[str, Any] = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    found = [kind for kind, made in names.items() if {made} & architectures or set(_several(made)) & architectures]
    return [kind for kind in found if kind in CONFIG_MAPPING]


def _several(made: Any) -> tuple[str, ...]:
    return tuple(made) if isinstance(made, (tuple, list)) else ()


def keys_of(config: Any) -> set[str]:
    """The keys of a text configuration, those inside `attn_config` too."""
    flat = dict(config.to_dict())
    for nested in ("attn_config", "attention"):
        if isinstance(flat.get(nested), dict):
            flat |= flat.pop(nested)
    return set(flat)


def read_by_vllm() -> set[str]:
    """Names that vLLM's own text models read from a configuration."""
    folder = Path(vllm.__file__).parent / "model_executor" / "models"
    # What other tests have loaded is registered as a class.
    known = [getattr(info, "module_name", "") or info.model_cls.__module__ for info in _text_models()]
    registered = {name.rsplit(".", 1)[-1] for name in known}
    found: set[str] = set()
    for name in sorted(registered):
        path = folder / f"{name}.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if path.exists() else ():
            found |= _config_names(node)
    return found


def _text_models() -> list[Any]:
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

    return [ModelRegistry.models[name] for name in _TEXT_GENERATION_MODELS if name in ModelRegistry.models]


def _config_names(node: ast.AST) -> set[str]:
    """`config.NAME` and `getattr(config, "NAME")`."""
    if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] in ("config", "hf_config"):
        return {node.attr}
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr") and len(node.args) > 1:
        name = node.args[1]
        if "config" in ast.unparse(node.args[0]) and isinstance(name, ast.Constant):
            return {str(name.value)}
    return set()


def test_every_key_of_every_served_model_is_known() -> None:
    kinds = served()
    assert len(kinds) > 100
    keys = {key for kind in kinds for key in keys_of(CONFIG_MAPPING[kind]().get_text_config())}
    unknown = {key for key in keys | read_by_vllm() if LOOKS_LIKE_ATTENTION.search(key)}
    assert sorted(unknown - KNOWN - set(REFUSED) - READ_ELSEWHERE) == []


def test_every_layer_type_of_transformers_is_known() -> None:
    assert set(ALLOWED_ATTN_LAYER_TYPES) <= LAYER_TYPES


def test_the_table_says_each_key_once_and_each_is_looked_at() -> None:
    names = [key for group in HARMLESS.values() for key in group] + list(REFUSED)
    assert len(names) == len(set(names))
    assert [key for key in names if not LOOKS_LIKE_ATTENTION.search(key)] == []


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"attention_wobble": 0.5}, "attention config key 'attention_wobble' is not known to this release"),
        ({"attn_config": {"alibi": True, "attn_uses_sequence_id": True}}, "'attn_uses_sequence_id': tokens of other"),
        ({"use_bidirectional_attention": True}, "'use_bidirectional_attention': tokens attend to later ones"),
        ({"is_causal": False}, "'is_causal': tokens attend to later ones"),
        ({"layer_types": ["full_attention", "wobble_attention"]}, "layer type 'wobble_attention' is not known"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "'dual_chunk_attention_config'"),
    ],
)
def test_what_changes_the_weights_or_is_new_is_refused_by_name(extra: dict[str, Any], says: str) -> None:
    config = SimpleNamespace(to_dict=lambda: transformers.LlamaConfig().to_dict() | extra)
    assert says in str(config_refusal(config))


@pytest.mark.parametrize(
    "extra",
    [{}, {"attention_wobble": None}, {"attn_config": {"alibi": True}}, {"use_bidirectional_attention": "vision"}],
)
def test_what_is_known_or_switched_off_is_not(extra: dict[str, Any]) -> None:
    config = SimpleNamespace(to_dict=lambda: transformers.LlamaConfig().to_dict() | extra)
    assert config_refusal(config) is None


def test_every_attribute_of_the_backends_kernels_is_known() -> None:
    folder = Path(vllm.__file__).parent / "v1" / "attention" / "backends"
    assigned = {name: _assigned(folder / f"{name}.py") for name in BACKENDS}
    assert all("scale" in names for names in assigned.values())
    unknown = {name: sorted(names - KERNEL_ATTRIBUTES - {"out_transform"}) for name, names in assigned.items()}
    assert unknown == {name: [] for name in BACKENDS}


def _assigned(path: Path) -> set[str]:
    """Attributes that the `...Impl` classes of a file set on themselves."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Impl")]
    return {
        node.attr
        for owner in classes
        for node in ast.walk(owner)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }


def kernel(**extra: Any) -> Any:
    """An implementation with everything that it must state, and more."""
    stated = {"num_heads": 4, "num_kv_heads": 2, "head_size": 32, "scale": 0.2, "sliding_window": -1}
    return SimpleNamespace(**stated | extra)


def test_a_kernel_that_holds_what_we_do_not_know_is_refused_by_name() -> None:
    assert kernel_refusal(SimpleNamespace(impl=kernel())) is None
    assert kernel_refusal(SimpleNamespace(impl=kernel(score_bias=None, wobble=-1, lean=False))) is None
    assert "'score_bias'" in str(kernel_refusal(SimpleNamespace(impl=kernel(score_bias=object()))))
    assert "'out_transform'" in str(kernel_refusal(SimpleNamespace(impl=kernel(out_transform=abs))))
    assert "logical_mask_mod" in str(kernel_refusal(SimpleNamespace(impl=kernel(), logical_mask_mod=abs)))
    routed = SimpleNamespace(num_heads=4, num_kv_heads=2, head_size=32, scale=0.2, general_impl=kernel())
    assert "does not state 'sliding_window'" in str(kernel_refusal(SimpleNamespace(impl=routed)))
