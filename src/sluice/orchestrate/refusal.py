"""Which episodes of before a resume are sampled again.

An episode grows older until its batch is taken. Which one that is is known in dispatch order, the order of a gate that
waits: so many whole batches come first as there are groups before it. Another gate judges tokens when it meets them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from sluice.config.data import OnStale
from sluice.data.gate import Gate
from sluice.types import Version
from sluice.weights.lineage import Lineage

Refusal: TypeAlias = Callable[[Version, int], str]
"""Why tokens of a version may not be in a batch that is taken when weights of a step are in use; empty if they may."""


def refusal(gate: Gate, lineage: Lineage) -> Refusal:
    """That of a run: where the gate waits, versions that a resume abandoned, and those that will be too old."""
    bound = gate.config.max_lag

    def refused(version: Version, due: int) -> str:
        if gate.config.effective_on_stale is not OnStale.WAIT:
            return ""
        if not lineage.in_line(version):
            return f"abandoned version {version}"
        return too_old(bound) if due - version.step > bound else ""

    return refused


def too_old(bound: int) -> str:
    """Why what was sampled ahead cannot keep the bound of a resumed run, in optimizer steps."""
    return f"sampled under a wider bound than max_lag = {bound}, before the resume"
