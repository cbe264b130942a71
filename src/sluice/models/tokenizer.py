"""A word-level tokenizer made from a list of words, for models that are made on the spot."""

from __future__ import annotations

import re
import unicodedata

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sluice.config.model import TokenizerConfig
from sluice.errors import ConfigError

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
SPECIAL_TOKENS = (PAD, EOS, UNK)
"""Ids 0, 1 and 2."""
WHITESPACE = (" ", "\n")
"""Ids 3 and 4: a space or line break that is not the start of a token."""


def build_tokenizer(config: TokenizerConfig) -> PreTrainedTokenizerFast:
    """The tokenizer of `config`: ids are the special tokens, whitespace, words, words after a space.

    Text is split at spaces, single digits and punctuation marks. A token carries the space before it, so
    each word has two ids (`is` and ` is`) and decoding joins tokens with nothing in between: `132` comes
    back as `132` and `1 3 2` as `1 3 2`. A word that mixes classes, such as `<answer>` or `x1`, is one
    token wherever it occurs; among several the longest wins. Anything else is `<unk>`.

    Raises:
        ConfigError: a word is empty, repeated, reserved or contains whitespace.
    """
    _check_words(config.words)
    vocabulary = (*SPECIAL_TOKENS, *WHITESPACE, *config.words, *(f" {word}" for word in config.words))
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    # The stubs of `tokenizers` declare these attributes without setters.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_pattern(config.words)), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        chat_template=config.chat_template,
    )


def _check_words(words: tuple[str, ...]) -> None:
    seen: set[str] = set()
    for word in words:
        if not word or any(character.isspace() for character in word):
            raise ConfigError(
                f"model.scratch.tokenizer.words: {word!r} is empty or contains whitespace",
                hint="space and line break are always in the vocabulary; list words one by one",
            )
        if word in SPECIAL_TOKENS:
            raise ConfigError(
                f"model.scratch.tokenizer.words: {word!r} is a special token and always in the vocabulary",
                hint="take it out of the list",
            )
        if word in seen:
            raise ConfigError(f"model.scratch.tokenizer.words: {word!r} is listed twice", hint="keep one of them")
        seen.add(word)


def _pattern(words: tuple[str, ...]) -> str:
    """One match per token: listed mixed words first, then digit, run of letters, any other mark."""
    mixed = sorted((word for word in words if not _is_simple(word)), key=lambda word: (-len(word), word))
    alternatives = [
        ("(?<!\\w)" if word[0].isalnum() else "") + re.escape(word) + ("(?!\\w)" if word[-1].isalnum() else "")
        for word in mixed
    ]
    return " ?(?:" + "|".join([*alternatives, r"\p{N}", r"[\p{L}\p{M}]+", r"[^\s\p{L}\p{M}\p{N}]"]) + r")|\s"


def _is_simple(word: str) -> bool:
    """A run of letters, or one character."""
    return len(word) == 1 or all(unicodedata.category(character)[0] in "LM" for character in word)
