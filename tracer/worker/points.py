"""Where a model's residual stream and its choices of experts can be tapped, and the taps' placing.

Only what is known is tapped. A decoder layer's class must be one whose output was compared with Transformers': it is
the residual stream, alone or as the two parts whose sum the next layer's norm takes. A router must be one that returns
the weights and the experts that its kernel then uses. Everything else is refused by name.

In eager mode taps are always there. A compiled model has them only if the server was started with `TENSORSPAN_TAPS`,
because a graph with taps is another graph: the setting is made a part of the compile cache's key.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import torch

from tracer.records import MembersInfo, RouterInfo
from tracer.worker import compat
from tracer.worker.taps import OPERATOR, tap

__all__ = ["ROUTER_PLACE", "place_taps", "placed"]

ROUTER_PLACE: Final = 1 << 16
"""Tap of layer *i*'s router; those of the stream are numbered from 0."""
STREAMS: Final = frozenset({
    "bloom.BloomBlock",
    "gemma2.Gemma2DecoderLayer",
    "gemma3.Gemma3DecoderLayer",
    "gpt2.GPT2Block",
    "gpt_oss.TransformerBlock",
    "granite.GraniteDecoderLayer",
    "llama.LlamaDecoderLayer",
    "mistral.MistralDecoderLayer",
    "mixtral.MixtralDecoderLayer",
    "opt.OPTDecoderLayer",
    "qwen2.Qwen2DecoderLayer",
    "qwen3.Qwen3DecoderLayer",
    "qwen3_moe.Qwen3MoeDecoderLayer",
})  # fmt: skip
"""Decoder layers of vLLM, by module and class, whose output tests/integration/test_members.py compares."""
MODELS: Final = "vllm.model_executor.models."
LAYER: Final = re.compile(r"(.*\.)?(layers|h)\.\d+")
ROUTERS: Final = frozenset({"CPURouter", "FusedTopKRouter"})
ATTRIBUTE: Final = "_tensorspan_members"
SETTING: Final = "unavailable: the compiled model has no taps; start the server with TENSORSPAN_TAPS={}"


def placed(worker: Any) -> MembersInfo:
    """What `place_taps` found, of this worker."""
    found: MembersInfo = getattr(worker, ATTRIBUTE, MembersInfo())
    return found


def place_taps(worker: Any, wanted: Sequence[str]) -> None:
    """Put taps into the model that `worker` has just loaded, before anything of it is compiled.

    wanted: members that a compiled model gets taps for (`hidden_states`, `router`).
    """
    config, model = worker.vllm_config, worker.model_runner.model
    eager = compat.is_eager(config)
    members = MembersInfo(hidden_size=config.model_config.get_hidden_size())
    reason = None if eager or not wanted else _mark(config, wanted)
    members = _place_stream(model, config, members, reason or _missing("hidden_states", wanted, eager))
    members = _place_routers(config, members, reason or _missing("router", wanted, eager))
    setattr(worker, ATTRIBUTE, members)


def _missing(member: str, wanted: Sequence[str], eager: bool) -> str | None:
    return None if eager or member in wanted else SETTING.format(member)


def _mark(config: Any, wanted: Sequence[str]) -> str | None:
    """Make the taps a part of the compile cache's key, and of what splits graphs; a reason if that cannot be done."""
    if not isinstance(config.additional_config, dict):
        return "unavailable: vLLM's additional_config is not a dictionary, which the compile cache's key is made of"
    config.additional_config = {**config.additional_config, "tensorspan_taps": sorted(wanted)}
    compilation = config.compilation_config
    if compilation.splitting_ops:  # Between the pieces of CUDA graphs Python runs, inside of them it does not.
        compilation.splitting_ops = [*compilation.splitting_ops, OPERATOR]
    return None


# -- the residual stream -------------------------------------------------------------------------------------------


def _place_stream(model: Any, config: Any, members: MembersInfo, reason: str | None) -> MembersInfo:
    layers, refusal = _decoder_layers(model, config)
    members = replace(members, hidden_states=len(layers) + 1, hidden_states_unsupported=refusal or reason)
    if members.hidden_states_unsupported is None:
        layers[0].register_forward_pre_hook(_before(layers[0]), with_kwargs=True)
        for index, layer in enumerate(layers):
            layer.register_forward_hook(_after(index + 1))
    return members


def _decoder_layers(model: Any, config: Any) -> tuple[list[Any], str | None]:
    """The model's decoder layers in order, and why their output is not known to be the stream, if so."""
    numbered = ((name, module) for name, module in model.named_modules() if LAYER.fullmatch(name))
    found = {name: module for name, module in numbered if _index(name) is not None}
    stacks = {name.rpartition(".")[0] for name in found}
    wanted = config.model_config.get_total_num_hidden_layers()
    layers = [found[name] for name in sorted(found, key=lambda name: _index(name) or 0)]
    if len(stacks) != 1 or len(layers) != wanted:
        return [], f"its {wanted} decoder layers are not one list of modules"
    kinds = {f"{type(layer).__module__.removeprefix(MODELS)}.{type(layer).__name__}" for layer in layers}
    unknown = sorted(kinds - STREAMS)
    if unknown:
        return layers, f"what {unknown[0]} returns was never compared with a reference"
    if "hidden_states" not in inspect.signature(layers[0].forward).parameters:
        return layers, f"{kinds.pop()} does not say which of its arguments is the stream"
    return layers, None


def _index(name: str) -> int | None:
    """The layer's number in a module's name; None if it holds none, or several."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    return int(numbers[0]) if len(numbers) == 1 else None


def _before(layer: Any) -> Callable[..., None]:
    """What the first layer reads; there is no residual beside it yet."""
    position = list(inspect.signature(layer.forward).parameters).index("hidden_states")

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tap(kwargs["hidden_states"] if "hidden_states" in kwargs else args[position], None, 0)

    return before


def _after(place: int) -> Callable[..., None]:
    def after(_module: Any, _args: Any, output: Any) -> None:
        if isinstance(output, tuple):
            tap(output[0], output[1], place)
        else:
            tap(output, None, place)

    return after


# -- choices of experts --------------------------------------------------------------------------------------------


def _place_routers(config: Any, members: MembersInfo, reason: str | None) -> MembersInfo:
    runners = compat.moe_runners(config)
    infos = [_router_info(name, runner) for name, runner in runners]
    sizes = [info.top_k for info in infos if info.unsupported is None]
    infos = [
        replace(info, unsupported="it chooses another number of experts than the first layer does")
        if info.unsupported is None and info.top_k != sizes[0]
        else info
        for info in infos
    ]
    able = [info for info in infos if info.unsupported is None]
    refusal = None
    if not infos:
        refusal = "the model has no experts"
    elif not able:
        refusal = infos[0].unsupported
    elif len({info.index for info in able}) < len(able):
        refusal = "several routers are in one layer"
    refusal = refusal or _parallel(config) or reason
    if refusal is None:
        for (_, runner), info in zip(runners, infos, strict=True):
            if info.unsupported is None:
                _tap_router(runner.router, ROUTER_PLACE + info.index)
    return replace(members, routers=tuple(infos), router_unsupported=refusal)


def _router_info(name: str, runner: Any) -> RouterInfo:
    index, router = _index(name), runner.router
    kind = type(router).__name__
    checks = (
        (index is None, f"its name {name!r} does not say which layer it is"),
        (runner.routed_experts.quant_method.is_monolithic, "its kernel chooses the experts by itself"),
        (kind not in ROUTERS or not _plain(router), f"how its {kind} chooses was never compared with a reference"),
    )
    reason = next((reason for failed, reason in checks if failed), None)
    experts, top_k = int(getattr(router, "global_num_experts", 0)), int(getattr(router, "top_k", 0))
    return RouterInfo(index or 0, name, experts, top_k, reason)


def _plain(router: Any) -> bool:
    """True if the experts are the K best of one softmax."""
    groups, function = getattr(router, "use_grouped_topk", False), getattr(router, "custom_routing_function", None)
    return not groups and function is None and getattr(router, "scoring_func", "softmax") == "softmax"


def _parallel(config: Any) -> str | None:
    parallel = config.parallel_config
    if parallel.data_parallel_size > 1 or parallel.enable_expert_parallel:
        return "unavailable: with data or expert parallelism a router sees other ranks' tokens"
    return None


def _tap_router(router: Any, place: int) -> None:
    """`_compute_routing` gives the model's own numbering of experts, before replicas are balanced."""
    original = router._compute_routing  # noqa: SLF001

    def compute_routing(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weights, experts = original(*args, **kwargs)
        tap(experts, weights, place)
        return weights, experts

    router._compute_routing = compute_routing  # noqa: SLF001
