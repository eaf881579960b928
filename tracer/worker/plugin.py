"""The entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes.

Installed is not enabled: with neither TENSORSPAN_ENABLED nor TENSORSPAN_STORE set, nothing is imported or changed.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from tracer import config

__all__ = ["register"]

LOG = logging.getLogger("vllm.tensorspan")


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
        LOG.error("tensorspan: vLLM %s lacks %s; no capture", compat.version(), ", ".join(missing))
        return
    if not compat.version().startswith(compat.KNOWN_VERSIONS):
        LOG.warning("tensorspan: vLLM %s is not a version it was tested with", compat.version())
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
