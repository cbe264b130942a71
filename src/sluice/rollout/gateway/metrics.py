"""Counters of the gateway in Prometheus' text form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sluice.rollout.gateway.server import Gateway

_COUNTERS = {
    "turns": "Answers recorded",
    "segments": "Segments begun",
    "mismatches": "Histories that came back otherwise than recorded",
    "sampling_flagged": "Calls that asked for other sampling parameters",
    "malformed_calls": "Texts that began like a tool call and were none",
    "sampled_tokens": "Tokens sampled",
    "aborted_calls": "Calls ended before the model did",
}


def metrics_text(gateway: Gateway) -> str:
    """All of them; those of sessions are sums over open and ended ones."""
    totals = Counter(gateway.book.totals)
    for entry in gateway.book:
        totals.update(entry.session.counters())
    forks = {name.removeprefix("forks/"): count for name, count in totals.items() if name.startswith("forks/")}
    lines = [*_family("sessions_open", "gauge", "Open sessions", {"": len(gateway.book)})]
    lines += _family("sessions_ended_total", "counter", "Ended sessions", _labelled("outcome", gateway.book.outcomes))
    for name, words in _COUNTERS.items():
        lines += _family(f"{name}_total", "counter", words, {"": totals[name]})
    lines += _family("forks_total", "counter", "Segments that fork from another", _labelled("reason", _known(forks)))
    codes = {f'{{api="{api}",code="{code}"}}': count for (api, code), count in gateway.responses.items()}
    lines += _family("responses_total", "counter", "HTTP answers", codes)
    return "\n".join(lines) + "\n"


_REASONS = frozenset({"mismatch", "branch", "compaction", "sub_agent", "tools"})


def _known(forks: Mapping[str, int]) -> dict[str, int]:
    """Reasons that are the owner's own words count as `declared`: labels must stay few."""
    found: Counter[str] = Counter()
    for reason, count in forks.items():
        found[reason if reason in _REASONS else "declared"] += count
    return dict(found)


def _labelled(label: str, values: Mapping[str, int]) -> dict[str, int]:
    return {f'{{{label}="{name}"}}': count for name, count in values.items()}


def _family(name: str, kind: str, words: str, values: Mapping[str, int]) -> Iterator[str]:
    yield f"# HELP sluice_gateway_{name} {words}."
    yield f"# TYPE sluice_gateway_{name} {kind}"
    for labels, value in sorted(values.items()):
        yield f"sluice_gateway_{name}{labels} {value}"
