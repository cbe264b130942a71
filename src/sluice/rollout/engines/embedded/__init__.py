"""A small engine in this process: continuous batching over Hugging Face modules."""

from sluice.rollout.engines.embedded.engine import EmbeddedEngine
from sluice.rollout.engines.embedded.runner import engine_model

__all__ = ["EmbeddedEngine", "engine_model"]
