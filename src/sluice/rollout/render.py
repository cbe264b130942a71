"""Rendering: messages become token ids once, and sampled ids become text for rewards. Never back again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sluice.errors import DataError
from sluice.types import Ids, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Renderer:
    """The chat template of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any] | None = None) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template",
                hint="add one to its tokenizer_config.json (or chat_template.jinja)",
            )
        self._tokenizer = tokenizer
        self._kwargs = template_kwargs or {}
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"the tokenizer of {tokenizer.name_or_path} has no end-of-sequence token: answers would never end",
                hint="set eos_token in its tokenizer_config.json",
            )
        self.eos: tuple[int, ...] = (int(tokenizer.eos_token_id),)  # pyright: ignore[reportArgumentType]

    def prompt_ids(self, prompt: Prompt) -> Ids:
        """The prompt as the model sees it, up to where its answer begins; shape `[n]`."""
        messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **self._kwargs)
        ids = self._tokenizer.encode(str(text), add_special_tokens=False)
        if not ids:
            raise DataError(f"prompt {prompt.id} renders to no tokens", hint="check its messages and the template")
        return np.asarray(ids, dtype=np.int32)

    def response_ids(self, text: str) -> Ids:
        """A demonstrated answer with its end-of-sequence token; shape `[n]`."""
        return np.asarray([*self._tokenizer.encode(text, add_special_tokens=False), *self.eos], dtype=np.int32)

    def text(self, ids: Ids) -> str:
        """Sampled ids as text, special tokens left out."""
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=True))
