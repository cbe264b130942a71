"""Rendering of single prompts: messages become token ids once, and sampled ids become text. Never back again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sluice.rollout.chat.renderer import ChatRenderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Renderer(ChatRenderer):
    """The chat template of one tokenizer with the settings that `model` gives it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(tokenizer, template_kwargs=template_kwargs)
