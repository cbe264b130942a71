"""A service of the user's own as a reward."""

from __future__ import annotations

import json
from typing import Any, cast

from sluice.config.rewards import HttpReward
from sluice.errors import RewardError
from sluice.rewards.base import Score, Submission, shown
from sluice.rewards.means import Means
from sluice.rewards.remote import Service, ServiceError
from sluice.types import Prompt


class HttpVerifier:
    """Posts the episode, reads `reward` and whatever other numbers come with it."""

    def __init__(self, config: HttpReward, means: Means) -> None:
        self._service = Service(config, config.url, means)

    def check(self, prompt: Prompt) -> None:
        """The prompt must fit into JSON."""
        try:
            json.dumps(dict(prompt.metadata), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"the metadata of prompt {prompt.id} cannot be sent as JSON: {error}",
                hint="metadata for an http reward holds finite numbers, strings, lists and dictionaries",
            ) from error

    async def score(self, submission: Submission) -> Score:
        """What the service says.

        Raises:
            ServiceError: it says nothing, or nothing that is a score.
        """
        prompt = submission.prompt
        reply = await self._service.post(
            {
                "prompt": question(prompt),
                "prompt_id": prompt.id,
                "messages": [message._asdict() for message in prompt.messages],
                "answer": prompt.answer,
                "metadata": dict(prompt.metadata),
                "task": prompt.task,
                "episode_id": submission.episode_id,
                "response": submission.response,
                "extracted": submission.text,
            }
        )
        if not isinstance(reply, dict) or "reward" not in reply:
            raise ServiceError(f'the service answered with {shown(reply)}, not with {{"reward": …}}')
        fields = cast("dict[str, Any]", reply)
        return Score(fields.pop("reward"), parts=_numbers(fields), notes=_others(fields))


def question(prompt: Prompt) -> str:
    """The last message of the user; empty when there is none."""
    return next((message.content for message in reversed(prompt.messages) if message.role == "user"), "")


def _numbers(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if isinstance(value, bool | int | float)}


def _others(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if not isinstance(value, bool | int | float)}
