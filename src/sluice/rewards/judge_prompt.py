"""What a judge is asked: a text with fields."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sluice.config.rewards import JudgeRewardBase
from sluice.errors import RewardError
from sluice.nearest import nearest
from sluice.rewards.http import question
from sluice.types import Prompt

OF_PROMPT = ("prompt", "messages", "answer", "task")
_FIELD = re.compile(r"\{([a-z_]+)\}|\{metadata\.([^{}]+)\}")


class JudgePrompt:
    """The text of a recipe, with the fields of an episode put in. Braces that name no field stay as they are.

    Args:
        needs: at least one of these fields must be in it, or the judge would see no answer.

    Raises:
        RewardError: the file cannot be read, a field seems mistyped, or none of `needs` is there.
    """

    def __init__(self, config: JudgeRewardBase, needs: Sequence[str]) -> None:
        self._text = config.prompt
        if config.prompt_file is not None:
            try:
                self._text = config.prompt_file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise RewardError(
                    f"the judge's prompt_file cannot be read: {error}",
                    hint="paths are relative to the working directory",
                ) from error
        known = (*OF_PROMPT, *needs)
        named = [match[1] for match in _FIELD.finditer(self._text) if match[1]]
        for name in named:
            meant = nearest(name, known)
            if name not in known and meant:
                raise RewardError(f"the judge's prompt has {{{name}}}", hint=f"did you mean {{{meant}}}?")
        if not set(needs) & set(named):
            raise RewardError(
                f"the judge's prompt has no {' or '.join(f'{{{name}}}' for name in needs)}: "
                "the judge would see no answer",
                hint=f"put {{{needs[0]}}} where the answer belongs",
            )

    def check(self, prompt: Prompt) -> None:
        """Raise RewardError when the prompt lacks metadata that the text asks for."""
        for match in _FIELD.finditer(self._text):
            if match[2] and match[2] not in prompt.metadata:
                near = nearest(match[2], list(prompt.metadata))
                raise RewardError(
                    f"the judge's prompt asks for {match[0]}, which the metadata of prompt {prompt.id} does not have",
                    hint=f"did you mean {{metadata.{near}}}?" if near else "add it to the source's rows",
                )

    def fill(self, prompt: Prompt, **fields: str) -> str:
        """The text for one question. Braces in what is put in are left alone."""
        values = {
            "prompt": question(prompt),
            "messages": "\n\n".join(f"{message.role}: {message.content}" for message in prompt.messages),
            "answer": prompt.answer,
            "task": prompt.task,
            **fields,
        }

        def value(match: re.Match[str]) -> str:
            if match[2]:
                return str(prompt.metadata[match[2]])
            return values.get(match[1], match[0])

        return _FIELD.sub(value, self._text)
