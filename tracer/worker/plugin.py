"""The entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes.

Installed is not enabled: with neither TENSORSPAN_ENABLED nor TENSORSPAN_STORE set, nothing is imported or changed.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from tracer import config

__all__ = ["register"]

LOG = logging.getLogger("vllm.tensorspan")
_SAID: set[str] = set()


def register() -> None:
    """Hook this process; safe to call again. Never raises: a tracer that cannot start must not stop the server."""
    try:
        settings = config.load()
        if settings.active:
            _register(settings)
    except Exception:
        LOG.exception("tensorspan: the plugin cannot start; vLLM serves without it")


def _register(settings: config.Settings) -> None:
    from tracer import export
    from tracer.worker import compat, frontend

    if not settings.socket:
        # The first process of a server names the socket; its children inherit the name.
        settings = replace(settings, socket=str(export.socket_path()))
        config.publish(settings)
    missing = compat.missing_names()
    if missing:
        reason = f"vLLM {compat.version()} lacks {', '.join(missing)}"
        export.mark_unhookable(reason)
        if _speaks(settings):
            LOG.error("tensorspan: %s; it serves, and nothing is traced or captured", reason)
        return
    if not compat.is_known(compat.version()) and _speaks(settings):
        LOG.warning(
            "tensorspan: vLLM %s is not one this release was tested with (%s); it captures only if a test at the "
            "worker's start passes", compat.version(), ", ".join(compat.KNOWN_VERSIONS),
        )  # fmt: skip
    compat.patch(compat.worker_wrapper_class(), "initialize_from_config", lambda original: _hooked(original, settings))
    compat.patch(compat.worker_wrapper_class(), "init_device", lambda original: _tapped(original, settings))
    frontend.install(settings)


def _tapped(original: Any, settings: config.Settings) -> Any:
    """`WorkerWrapperBase.init_device`, after which the worker's `load_model` puts taps into what it has loaded."""

    def init_device(self: Any) -> Any:
        result = original(self)
        worker, load = self.worker, self.worker.load_model

        def load_model(*args: Any, **kwargs: Any) -> Any:
            loaded = load(*args, **kwargs)
            try:
                from tracer.worker import points

                points.place_taps(worker, settings.tapped)
            except Exception:
                LOG.exception("tensorspan: the model cannot be tapped; it serves without hidden states and routers")
            return loaded

        worker.load_model = load_model
        return result

    return init_device


def _speaks(settings: config.Settings) -> bool:
    """True once in the process that named the socket: what holds for a server is said by one of its processes."""
    owner, _, _ = Path(settings.socket).name.partition("-")
    if owner != str(os.getpid()) or settings.socket in _SAID:
        return False
    _SAID.add(settings.socket)
    return True


def _hooked(original: Any, settings: config.Settings) -> Any:
    """`WorkerWrapperBase.initialize_from_config`, then our hooks: the KV caches exist, no graph is captured yet."""

    def initialize_from_config(self: Any, kv_cache_configs: Any) -> Any:
        result = original(self, kv_cache_configs)
        try:
            from tracer.worker import hooks

            hooks.install(self.worker, settings)
        except Exception:
            LOG.exception("tensorspan: this worker cannot be hooked; it serves without capture")
        return result

    return initialize_from_config
