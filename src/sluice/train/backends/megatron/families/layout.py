"""Whether a model can be cut as a layout says."""

from __future__ import annotations

from sluice.errors import ConfigError
from sluice.train.backends.megatron.families.base import Architecture


def check_layout(architecture: Architecture, *, tp: int, pp: int, vpp: int, cp: int) -> None:
    """Refuse numbers of ranks that do not divide the model.

    Args:
        architecture: the model.
        tp: tensor-parallel ranks.
        pp: pipeline stages.
        vpp: parts of the model that each stage holds.
        cp: context-parallel ranks. They cut sequences, not the model, so that any number fits.

    Raises:
        ConfigError: names the field of config.json and the keys of train.megatron.
    """
    if min(tp, pp, vpp, cp) < 1:
        raise ConfigError(f"train.megatron: tp = {tp}, pp = {pp}, vpp = {vpp}, cp = {cp} must all be at least 1")
    sizes = {
        "num_attention_heads": architecture.heads,
        "num_key_value_heads": architecture.groups,
        "intermediate_size": architecture.ffn,
        "vocab_size": architecture.vocabulary,
    }
    for field, value in sizes.items():
        if value % tp:
            raise ConfigError(
                f"train.megatron.tp = {tp} does not divide the model's {field} = {value}",
                hint=f"tp may be {_listed(_common_divisors(tuple(sizes.values())))} for this model",
            )
    if architecture.layers % (pp * vpp):
        cut = f"pp = {pp}" if vpp == 1 else f"pp × vpp = {pp} × {vpp}"
        raise ConfigError(
            f"train.megatron.{cut} does not divide the model's num_hidden_layers = {architecture.layers}",
            hint=f"every stage has as many layers as the others: pp × vpp may be "
            f"{_listed(_common_divisors((architecture.layers,)))}",
        )


def _common_divisors(values: tuple[int, ...]) -> list[int]:
    return [number for number in range(1, min(values) + 1) if not any(value % number for value in values)]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
