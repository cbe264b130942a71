"""Stock SGLang servers: one that runs already, by URL, or a fleet that is started and supervised here."""

from sluice.rollout.engines.sglang.engine import SGLangEngine
from sluice.rollout.engines.sglang.fleet import SGLangFleet
from sluice.rollout.engines.sglang.make import make_fleet

__all__ = ["SGLangEngine", "SGLangFleet", "make_fleet"]
