"""Models and tokenizers made from scratch or read from a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from family_cases import family
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from train_cases import SHAPE, WORDS, scratch

from sluice.config.model import ScratchConfig, TokenizerConfig
from sluice.errors import ConfigError, TrainError
from sluice.models.build import check_model_folder, load_model, load_tokenizer, make_scratch
from sluice.models.tokenizer import build_tokenizer

MIXED = ("<answer>", "</answer>", "don't", "x1", "x12", "What", "is", *"0123456789", *"+-=?.,()")
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{{ eos_token }}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scratch(tmp_path_factory.mktemp("model"), seed=3)


def _config(**architecture: object) -> ScratchConfig:
    given = {"model_type": "qwen3", **SHAPE, **architecture}
    return ScratchConfig(architecture=given, tokenizer=TokenizerConfig(words=WORDS, chat_template=TEMPLATE))


def test_same_seed_same_bytes(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = scratch(tmp_path / "again", seed=3)
    other = scratch(tmp_path / "other", seed=4)
    assert torch.equal(before, torch.get_rng_state())
    for file in folder.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()
    assert (other / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()


def test_loads_as_written(folder: Path) -> None:
    model = load_model(folder, dtype="float32", attn_implementation="sdpa")
    tokenizer = load_tokenizer(folder)
    assert not model.training
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    half = load_model(folder, dtype="bfloat16", attn_implementation="eager")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_the_vocabulary_may_be_padded(tmp_path: Path) -> None:
    """So that ranks can divide it, as published models have it."""
    make_scratch(_config(vocab_size=64), tmp_path, seed=0)
    model, tokenizer = load_model(tmp_path, dtype="float32", attn_implementation="sdpa"), load_tokenizer(tmp_path)
    assert dict(model.named_parameters())["model.embed_tokens.weight"].shape[0] == 64 > len(tokenizer)
    assert tokenizer.decode([len(tokenizer), 63]) == ""


@pytest.mark.parametrize(
    "text", ["132", "1 3 2", "What is 132 + 4 = ?", "<answer>46</answer>", "x12 x1\n(don't)", " 12  3\n\n", "x1+1"]
)
def test_round_trip(text: str) -> None:
    tokenizer = build_tokenizer(TokenizerConfig(words=MIXED, chat_template=TEMPLATE))
    ids = tokenizer.encode(text)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(MIXED), min_size=1, max_size=12))
def test_round_trip_of_listed_words(words: list[str]) -> None:
    tokenizer = build_tokenizer(TokenizerConfig(words=MIXED, chat_template=TEMPLATE))
    text = " ".join(words)
    ids = tokenizer.encode(text)
    assert len(ids) == len(words)
    assert tokenizer.decode(ids) == text


def test_mixed_words_are_whole_and_unlisted_ones_unknown() -> None:
    tokenizer = build_tokenizer(TokenizerConfig(words=MIXED, chat_template=TEMPLATE))
    assert tokenizer.tokenize("x12 is x123 <answer>") == ["x12", " is", "<unk>", "1", "2", "3", " <answer>"]


def test_chat_template_and_special_tokens(folder: Path, tmp_path: Path) -> None:
    make_scratch(_config(), tmp_path, seed=0)
    text = load_tokenizer(tmp_path).apply_chat_template([{"role": "a", "content": "b"}], tokenize=False)
    assert text == "<a>b\n<eos>"
    assert load_tokenizer(folder).all_special_ids == [1, 2, 0]


@pytest.mark.parametrize(
    ("words", "says"),
    [(("a", "a"), "listed twice"), (("a b",), "whitespace"), (("",), "empty"), (("<eos>",), "special token")],
)
def test_bad_words(words: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_tokenizer(TokenizerConfig(words=words, chat_template=TEMPLATE))


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        ({"model_type": "qwen33"}, "did you mean 'qwen3'"),
        ({"model_type": ""}, "is missing"),
        ({"model_type": "vit"}, "not a causal language model"),
        ({"hiden_size": 3}, "did you mean 'hidden_size'"),
        ({"vocab_size": 7}, "vocab_size is 7, but the tokenizer has"),
        ({"num_key_value_heads": 3}, "does not make a qwen3 model"),
        ({"hidden_size": "big"}, "does not make a qwen3 model"),
    ],
)
def test_bad_architecture(architecture: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        make_scratch(_config(**architecture), tmp_path, seed=0)


def _copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def test_missing_folder_and_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_model(tmp_path / "none", dtype="float32", attn_implementation="sdpa")
    for name, says in (("config.json", "no config.json"), ("model.safetensors", "no safetensors")):
        broken = _copy(folder, tmp_path / name)
        (broken / name).unlink()
        with pytest.raises(ConfigError, match=says):
            check_model_folder(broken)
    broken = _copy(folder, tmp_path / "t")
    (broken / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="has no tokenizer"):
        load_tokenizer(broken)


def _edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_folder_that_does_not_fit_together(folder: Path, tmp_path: Path) -> None:
    broken = _copy(folder, tmp_path / "a")
    _edit_config(broken, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    with pytest.raises(TrainError, match=r"lack 11 tensors.*layers\.2"):
        load_model(broken, dtype="float32", attn_implementation="sdpa")
    broken = _copy(folder, tmp_path / "b")
    _edit_config(broken, intermediate_size=50)
    with pytest.raises(
        TrainError,
        match=r"mlp\.\w+_proj.weight in .* is .*48.* but config.json makes it .*50.* \(intermediate_size = 50\)",
    ):
        load_model(broken, dtype="float32", attn_implementation="sdpa")
    broken = _copy(folder, tmp_path / "c")
    _edit_config(broken, vocab_size=10)
    with pytest.raises(ConfigError, match="tokenizer has 49 ids, but the model's vocabulary has 10"):
        load_tokenizer(broken)
    broken = _copy(folder, tmp_path / "d")
    (broken / "config.json").write_text("[")
    with pytest.raises(ConfigError, match="not a JSON object"):
        check_model_folder(broken)
    broken = _copy(folder, tmp_path / "e")
    _edit_config(broken, model_type="lama")
    with pytest.raises(ConfigError, match="did you mean 'llama'"):
        check_model_folder(broken)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 40}, r"\(hidden_size = 40\)"),
        ({"vocab_size": 60}, r"embed_tokens.weight in .* is \[49, 32\], but .* \[60, 32\] \(vocab_size = 60\)"),
        ({"num_attention_heads": 6}, r"o_proj.weight|q_proj.weight"),
        ({"tie_word_embeddings": False}, r"lack 1 tensors .* lm_head.weight\n.*tie_word_embeddings = true"),
        (
            {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
            r"hold 11 tensors that config.json does not know: its num_hidden_layers is 1, first model.layers.1",
        ),
    ],
)
def test_a_config_that_lies_about_its_weights(
    changes: dict[str, object], says: str, folder: Path, tmp_path: Path
) -> None:
    broken = _copy(folder, tmp_path / "a")
    _edit_config(broken, **changes)
    with pytest.raises(TrainError, match=says):
        load_model(broken, dtype="float32", attn_implementation="sdpa")


def test_tensors_that_lie(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]

    def written(name: str, **changes: torch.Tensor) -> Path:
        broken = _copy(folder, tmp_path / name)
        changed = {**weights, **{key.replace("__", "."): value for key, value in changes.items()}}
        save_file(changed, broken / "model.safetensors", metadata={"format": "pt"})
        return broken

    for broken, says in (
        (written("extra", surprise=torch.zeros(2)), "hold 1 tensors that config.json does not know, first surprise"),
        (written("flat", model__norm__weight=torch.zeros(31)), r"model.norm.weight in .* is \[31\], but .* \[32\]"),
        (written("tied", lm_head__weight=embedding + 1), "tie_word_embeddings = true, but lm_head.weight and"),
    ):
        with pytest.raises(TrainError, match=says):
            load_model(broken, dtype="float32", attn_implementation="sdpa")
    load_model(written("twice", lm_head__weight=embedding.clone()), dtype="float32", attn_implementation="sdpa")
    (torn := _copy(folder, tmp_path / "torn")).joinpath("model.safetensors").write_bytes(b"torn")
    with pytest.raises(TrainError, match="cannot be read"):
        load_model(torn, dtype="float32", attn_implementation="sdpa")


def test_layers_that_predict_further_ahead_are_left_aside(tmp_path: Path) -> None:
    folder = family(tmp_path, "glm4_moe")
    _edit_config(folder, num_nextn_predict_layers=1)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.eh_proj.weight"] = torch.zeros(32, 64)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load_model(folder, dtype="float32", attn_implementation="sdpa")
