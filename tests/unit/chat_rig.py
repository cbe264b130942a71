"""Tokenizers with chat templates, made on the spot: byte-level BPE trained on a few lines."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sluice.config.gateway import ChatConfig
from sluice.rollout.chat.renderer import ChatRenderer

TEMPLATES = Path(__file__).parent / "templates"
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>", "<|system|>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
    *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁sep｜>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
    *("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
)
NOT_SPECIAL = ("<tool_call>", "</tool_call>", "<think>", "</think>")
"""One token each, as with Qwen, but not left out of decoded text."""
EOS = {
    "thinking": "<|im_end|>",
    "opened": "<|im_end|>",
    "observation": "<|endoftext|>",
    "single": "<|eot_id|>",
    "outputs": "<｜end▁of▁sentence｜>",
    "plain": "<|im_end|>",
}
"""Template to end-of-sequence token."""
FORMAT = {
    "thinking": "qwen",
    "opened": "qwen_coder",
    "observation": "glm",
    "single": "llama",
    "outputs": "deepseek",
    "plain": "none",
}
"""Template to the format that is found in it."""
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer"},
                    "b": {"type": "number"},
                    "note": {"type": "string"},
                    "flags": {"type": "array"},
                    "loud": {"type": "boolean"},
                    "limit": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                },
            },
        },
    },
)
_TEXT = [
    'The quick brown fox, {"name": "add", "arguments": {"a": 1, "b": 2}} and more of it.\n',
    "Grüße aus der Welt: 世界, мир, 👩‍👩‍👧 and <tool_call> tags.\n",
]


@cache
def backend() -> Tokenizer:
    """One trained vocabulary for all."""
    tokenizer = Tokenizer(models.BPE())
    # The stubs of `tokenizers` declare these attributes without setters.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=360, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in NOT_SPECIAL])
    return tokenizer


def make_tokenizer(template: str | None, eos: str | None = None) -> PreTrainedTokenizerFast:
    """The vocabulary with the template `templates/NAME.jinja`, or with none."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend().to_str()),
        eos_token=eos or EOS.get(template or "plain"),
        clean_up_tokenization_spaces=False,
        chat_template=(TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8") if template else None,
    )


@cache
def renderer(template: str, format: str = "auto", **template_kwargs: bool) -> ChatRenderer:
    """Made once for each template and format."""
    config = ChatConfig.model_validate({"format": format})
    return ChatRenderer(make_tokenizer(template), config, template_kwargs)


@cache
def fallback_renderer() -> ChatRenderer:
    """A vocabulary like Llama 2's: pieces with a mark for space, and a token for each byte."""
    tokens = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "▁lo", "a", "lo", "e")
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, [], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    template = "{% for message in messages %}{{ message.role + message.content }}</s>{% endfor %}"
    return ChatRenderer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=template))
