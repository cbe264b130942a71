"""Episodes as the page's script reads them: token arrays in base64, everything else by name, texts once."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sluice.log.records import Disposition, Entry, EpisodeRecord, RewardRecord
from sluice.obs.report.history import Fate
from sluice.types import Author, Episode, Prompt, Reward, Turn, Version

_INFO_ITEMS, _INFO_LENGTH = 16, 300
_PROMPT_LENGTH = 1_000
"""Characters of a question or a ground truth that are kept."""


class Spelled(NamedTuple):
    """What a token spells: bytes, since a character may be spread over several tokens; None for an unknown id."""

    spelled: bytes | None
    special: bool = False


Spell: TypeAlias = Callable[[int], Spelled]


class Compact:
    """Packs episodes; keeps the tokens and prompts that they share.

    Args:
        spell: of the run's tokenizer; None when there is none, the page then shows ids.
    """

    def __init__(self, spell: Spell | None) -> None:
        self._spell = spell
        self._places: dict[int, int] = {}
        self._prompts: dict[tuple[str, str], int] = {}
        self.prompts: list[dict[str, Any]] = []

    def episode(self, entries: Sequence[Entry], fate: Fate | None) -> dict[str, Any] | None:
        """One episode from all that the log says about it; None when it was never finished.

        Arrays: `ids` of the tokens a segment owns, as places in `vocabulary()`, uint16 (`H…`) or uint32 (`I…`);
        `lp` behaviour log-probs of its sampled tokens, float32; `adv` a number, or float32 of all sampled tokens.
        """
        episode, reward = _newest(entries)
        if episode is None:
            return None
        packed: dict[str, Any] = {
            "id": episode.id, "group": episode.group_id, "prompt": self._prompt(episode.prompt),
            "outcome": str(episode.outcome), "reason": episode.reason[:_PROMPT_LENGTH], "policy": episode.policy,
            "info": _short(episode.info),
            "segments": [self._segment(episode, index) for index in range(len(episode.segments))],
        }  # fmt: skip
        if reward is not None:
            packed["reward"] = reward.total
            packed["components"] = {n: [value, reward.weights[n]] for n, value in reward.components.items()}
        if fate is not None:
            packed["fate"] = self._fate(episode, fate)
        return packed

    def vocabulary(self) -> dict[str, Any]:
        """The tokens in use, by place: ids, texts (null where the bytes are no UTF-8 of their own, then `hex`)."""
        texts: list[str | None] = []
        hexes: dict[int, str] = {}
        special: list[int] = []
        for id, place in self._places.items():
            spelled, is_special = self._spell(id) if self._spell else Spelled(None)
            if is_special:
                special.append(place)
            try:
                texts.append(None if spelled is None else spelled.decode())
            except UnicodeDecodeError:
                texts.append(None)
                hexes[place] = (spelled or b"").hex()
        return {"ids": list(self._places), "texts": texts, "hex": hexes, "special": special}

    def _segment(self, episode: Episode, index: int) -> dict[str, Any]:
        segment = episode.segments[index]
        own = np.concatenate([turn.ids for turn in segment.turns]) if segment.turns else np.empty(0, np.int32)
        logprobs = [turn.logprobs for turn in segment.turns if turn.logprobs is not None]
        packed: dict[str, Any] = {
            "ids": self._ids(own),
            "lp": base64(np.concatenate(logprobs).astype("<f4")) if logprobs else "",
            "turns": [_turn(turn) for turn in segment.turns],
        }
        if segment.fork is not None:
            packed["fork"] = list(segment.fork)
        return packed

    def _ids(self, ids: NDArray[np.int32]) -> str:
        places = [self._places.setdefault(int(id), len(self._places)) for id in ids]
        small = max(places, default=0) < 1 << 16
        return ("H" if small else "I") + base64(np.array(places, "<u2" if small else "<u4"))

    def _prompt(self, prompt: Prompt) -> int:
        """The place of what names a prompt for people; the whole of it is in the episode's tokens."""
        asked = [message.content for message in prompt.messages if message.role == "user"]
        question = (asked or [message.content for message in prompt.messages] or [""])[-1]
        key = (prompt.id, question)
        if key not in self._prompts:
            self._prompts[key] = len(self.prompts)
            told = {"id": prompt.id, "task": prompt.task, "question": question, "answer": str(prompt.answer)}
            self.prompts.append({name: text[:_PROMPT_LENGTH] for name, text in told.items()})
        return self._prompts[key]

    def _fate(self, episode: Episode, fate: Fate) -> dict[str, Any]:
        record = fate.record
        packed: dict[str, Any] = {
            "kind": str(record.disposition),
            "step": fate.step,
            "reason": record.reason[:_PROMPT_LENGTH],
        }
        if record.masked_tokens and record.disposition is Disposition.TRAINED:
            packed["masked"] = _stale_versions(episode, record.masked_tokens)
        if record.advantage is not None:
            given = record.advantage
            packed["adv"] = float(given[0]) if len(given) == 1 else base64(given.astype("<f4"))
        return packed


def base64(array: NDArray[Any]) -> str:
    """The bytes of an array, little-endian."""
    return b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _turn(turn: Turn) -> dict[str, Any]:
    if turn.author is Author.OBSERVED:
        return {"n": len(turn)}
    assert turn.sampling is not None  # held by Turn
    spans = [[span.start, span.end, str(span.version)] for span in turn.spans]
    return {"n": len(turn), "v": spans, "finish": turn.finish, "t": turn.sampling.temperature}


def _newest(entries: Sequence[Entry]) -> tuple[Episode | None, Reward | None]:
    """The last record of each kind; a reward counts only behind the episode that it judges."""
    episode: Episode | None = None
    reward: Reward | None = None
    for entry in entries:
        if isinstance(entry.record, EpisodeRecord):
            episode, reward = entry.record.episode, None
        elif isinstance(entry.record, RewardRecord):
            reward = entry.record.reward
    return episode, reward


def _stale_versions(episode: Episode, masked: int) -> list[str] | None:
    """The versions whose tokens staleness took out of the loss: the oldest ones that hold that many tokens.

    None when no set of oldest versions does (a run that went back to an abandoned version).
    """
    count: dict[Version, int] = {}
    for turn in episode.sampled_turns():
        for span in turn.spans:
            count[span.version] = count.get(span.version, 0) + span.end - span.start
    found: list[str] = []
    for version in sorted(count):
        if masked <= 0:
            break
        found.append(str(version))
        masked -= count[version]
    return found if masked == 0 else None


def _short(info: Mapping[str, Any]) -> list[list[str]]:
    """The plain values of an episode's `info`, as text, short."""
    rows: list[list[str]] = []
    for name, value in info.items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        for key, each in inner:
            if isinstance(each, (str, int, float, bool)) and each not in ("", 0):
                rows.append([f"{name}.{key}" if key else str(name), str(each)[:_INFO_LENGTH]])
    return rows[:_INFO_ITEMS]
