"""Which models the engine can run, as far as a config tells: those that keep a standard KV cache.

What no config tells (attention sinks, softcapping, a norm between the heads) a probe finds when the engine is made.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from sluice.errors import EngineError

_KINDS = {
    "indexed_attention": "sparse attention, whose indexer keeps keys of its own beside the KV cache",
    "linear_attention": "linear attention, which keeps a state instead of keys and values",
    "mamba": "state-space layers, which keep a state instead of keys and values",
    "sliding_attention": "a sliding window",
    "chunked_attention": "attention in chunks",
}


def check_config(config: PretrainedConfig, *, context_length: int | None) -> None:
    """Refuse a model by name, before anything is loaded.

    Args:
        context_length: longest sequence that will be served; None: as long as the model can.

    Raises:
        EngineError: a layer is not full causal attention over a standard KV cache, with the reason.
    """
    text: Any = config.get_text_config()
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    name = model_class.__name__ if model_class else str(config.model_type)
    kinds = {str(kind) for kind in getattr(text, "layer_types", None) or ()} - {"full_attention"}
    window = getattr(text, "sliding_window", None)
    if window and getattr(text, "use_sliding_window", True) and not hasattr(text, "layer_types"):
        kinds.add("sliding_attention")
    if "sliding_attention" in kinds and window:
        longest = context_length or getattr(text, "max_position_embeddings", None)
        if longest and longest <= window:
            kinds.discard("sliding_attention")  # no sequence is ever longer than the window
        elif len(kinds) == 1:
            raise refusal(
                name,
                f"has layers of sliding_attention over {window} tokens",
                hint="train with SGLang: rollout.engine = 'sglang'; or set rollout.embedded.context_length to "
                f"{window} or less, where a window is full attention",
            )
    if kinds:
        raise refusal(
            name, "has " + " and ".join(f"{kind} layers ({_KINDS.get(kind, kind)})" for kind in sorted(kinds))
        )
    if getattr(model_class, "_is_stateful", False):
        raise refusal(name, "carries a state from token to token that is not keys and values")
    if model_class is not None and "logits_to_keep" not in inspect.signature(model_class.forward).parameters:
        raise refusal(name, "takes no logits_to_keep")
    if not getattr(text, "num_hidden_layers", None) or not getattr(text, "num_attention_heads", None):
        raise refusal(name, "names no layers or attention heads in its config")


def refusal(name: str, why: str, *, hint: str = "") -> EngineError:
    """The error for a model that this engine cannot run."""
    return EngineError(
        f"the embedded engine cannot run {name}: it {why}; only full causal attention over a standard KV cache is "
        "supported",
        hint=hint or "train with SGLang: rollout.engine = 'sglang'",
    )
