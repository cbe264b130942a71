"""What the components of a rubric share and get from outside."""

from __future__ import annotations


class Means:
    """Opened on first use, closed with the rubric."""

    async def close(self) -> None:
        """End what was opened."""
