"""The engines of tests/integration, for the files here that `prove.sh` gives to pytest."""

from __future__ import annotations

from tests.integration.conftest import engine_environment, generate, models, offline, store

__all__ = ["engine_environment", "generate", "models", "offline", "store"]
