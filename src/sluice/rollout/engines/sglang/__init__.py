"""The HTTP client of a running SGLang server."""

from sluice.rollout.engines.sglang.engine import SGLangEngine

__all__ = ["SGLangEngine"]
