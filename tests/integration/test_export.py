"""`sluice export`: a real run's checkpoint, loaded by others, answers as it did in the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from benchmarks.export_vllm import by_transformers
from safetensors.torch import load_file, save_file
from tests.integration.sglang_server import running_sglang
from tests.tiny import rows, tiny
from transformers import AutoModelForCausalLM, GenerationConfig

from sluice import cli
from sluice.config.rollout import SamplingConfig
from sluice.models.build import load_tokenizer
from sluice.orchestrate import api
from sluice.orchestrate.exporting import export
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.types import Message, Prompt

QUESTIONS = [row["prompt"] for row in rows(8)]
ANSWER = 6
"""Tokens of an answer."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of four steps, with checkpoints of steps 2 and 4."""
    config = tiny(tmp_path_factory.mktemp("run"), steps=4, evaluation={"every": 0, "greedy": False})
    api.train(config)
    return config.folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def renderer(folder: Path) -> ChatRenderer:
    return ChatRenderer(load_tokenizer(folder))


def test_transformers_answers_as_the_embedded_engine_did(run: Path, tmp_path: Path) -> None:
    done = export(run, tmp_path / "model")
    assert done.step == 4
    sampling = SamplingConfig(temperature=0, max_new_tokens=ANSWER)
    ours = [answers[0] for answers in api.generate(run / "checkpoints/step-000004/model", QUESTIONS, sampling=sampling)]
    chat = renderer(done.folder)
    found = by_transformers(done.folder, QUESTIONS, ANSWER)
    assert [chat.text(answer) for _, answer in found] == ours
    for question, (prompt, _) in zip(QUESTIONS, found, strict=True):
        rendered = chat.prompt_ids(Prompt("p", "t", (Message("user", question),)))
        assert prompt == rendered.tolist()


def test_weights_are_those_of_the_checkpoint_asked_for(run: Path, tmp_path: Path) -> None:
    names = {2: "earlier", 4: "later"}
    for step, name in names.items():
        export(run, tmp_path / name, step=step)
        exact, got = tensors(run / f"checkpoints/step-00000{step}/model"), tensors(tmp_path / name)
        assert exact.keys() == got.keys()
        assert all(torch.equal(exact[key], got[key]) for key in exact)
    earlier, later = tensors(tmp_path / "earlier"), tensors(tmp_path / "later")
    assert any(not torch.equal(earlier[key], later[key]) for key in earlier), "two steps train something"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_precision_in_several_files(run: Path, tmp_path: Path, dtype: Any) -> None:
    done = export(run, tmp_path / "model", dtype=dtype, shard_bytes=8_000)
    shards = sorted(done.folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[-1].name == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    exact, got = tensors(run / "checkpoints/step-000004/model"), tensors(done.folder)
    assert all(torch.equal(exact[key].to(getattr(torch, dtype)), got[key]) for key in exact)
    assert exact.keys() == got.keys()
    index = json.loads((done.folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.weights_bytes == sum(t.numel() * 2 for t in exact.values())
    model = AutoModelForCausalLM.from_pretrained(done.folder)
    assert model.dtype is getattr(torch, dtype)


def test_turns_end_where_they_ended_in_training(run: Path, tmp_path: Path) -> None:
    folder = export(run, tmp_path / "model").folder
    named = GenerationConfig.from_pretrained(folder).eos_token_id
    assert set(renderer(folder).eos) <= {named} if isinstance(named, int) else set(named or ())


def test_the_card_names_where_the_weights_come_from(run: Path, tmp_path: Path) -> None:
    card = (export(run, tmp_path / "model", step=2, dtype="bfloat16").folder / "README.md").read_text()
    for row in ("| run | `tiny` |", "| step | 2 of 4, weights version 2.0 |", "| algorithm | grpo |",
                "| base model | a qwen3 of random weights |", "| weights | bfloat16 |", "| seed | 0 |"):  # fmt: skip
        assert row in card, card


def test_a_model_folder_is_converted_too(run: Path, tmp_path: Path) -> None:
    done = export(run / "model-init", tmp_path / "model", dtype="bfloat16")
    assert done.step is None
    assert {tensor.dtype for tensor in tensors(done.folder).values()} == {torch.bfloat16}


def test_overwrite_replaces_a_model_and_nothing_else(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    export(run, out, step=2)
    export(run, out, step=4, overwrite=True)
    exact, got = tensors(run / "checkpoints/step-000004/model"), tensors(out)
    assert all(torch.equal(exact[key], got[key]) for key in exact)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"], "nothing is left beside it"


@pytest.mark.parametrize("kept", ["checkpoints/step-000002/model", "model-init", "model-sft", "checkpoints/new"])
def test_what_the_run_resumes_from_is_never_replaced(
    run: Path, tmp_path: Path, kept: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(run), "--out", str(run / kept), "--dtype", "float16", "--overwrite"]
    assert "keeps its own model" in refused(words, capsys, 2)
    assert not (run / "checkpoints/new").exists()
    export(run, tmp_path / "model", step=2)


def refused(words: list[str], capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert cli.run(["export", *words]) == code
    return " ".join(capsys.readouterr().err.split())


def test_bad_input(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = ["--out", str(tmp_path / "model")]
    assert "there is no run in absent or runs/absent" in refused(["absent", *out], capsys, 2)
    assert "no checkpoint of step 3; there are: 2, 4" in refused([str(run), "--step", "3", *out], capsys, 8)
    assert "--dtype int8 is none of" in refused([str(run), "--dtype", "int8", *out], capsys, 2)
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json").write_text("{}")
    assert "has no checkpoint: the run ended" in refused([str(begun), *out], capsys, 8)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    taken = ["--out", str(tmp_path / "mine")]
    assert "exists already" in refused([str(run), *taken], capsys, 2)
    assert "is not a model folder, so --overwrite leaves it" in refused([str(run), *taken, "--overwrite"], capsys, 2)
    inside = ["--out", str(run.parent), "--overwrite"]
    assert "itself" in refused([str(run), *inside], capsys, 2)
    assert "has no steps" in refused([str(run / "model-init"), "--step", "1", *out], capsys, 2)
    assert not (tmp_path / "model").exists()


def copied(run: Path, folder: Path) -> Path:
    """A copy of the run's checkpoints that a test may damage."""
    import shutil

    shutil.copytree(run / "checkpoints", folder / "checkpoints")
    shutil.copy(run / "config.json", folder)
    return folder


def test_a_damaged_checkpoint_is_named_and_the_whole_one_still_exports(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(run, tmp_path / "run")
    weights = folder / "checkpoints/step-000004/model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    words = [str(folder), "--out", str(tmp_path / "model")]
    assert "step 4 is damaged" in (told := refused(words, capsys, 8))
    assert "export another: --step N (2)" in told
    manifest = folder / "checkpoints/step-000004/manifest.json"
    manifest.write_text(manifest.read_text()[:50])
    assert "no manifest that can be read" in refused(words, capsys, 8)
    assert list(tmp_path.iterdir()) == [folder], "a refused export leaves nothing"
    assert cli.run(["export", *words, "--step", "2"]) == 0


@pytest.mark.parametrize(("value", "told"), [(1e5, "does not fit float16: its largest number is 100000"),
                                            (float("nan"), "holds numbers that are not finite")])  # fmt: skip
def test_a_number_that_does_not_fit_names_its_tensor(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float, told: str
) -> None:
    export(run, tmp_path / "source")
    weights = tensors(tmp_path / "source")
    weights["model.norm.weight"][3] = value
    save_file(weights, tmp_path / "source/model.safetensors", metadata={"format": "pt"})
    words = [str(tmp_path / "source"), "--out", str(tmp_path / "model"), "--dtype", "float16"]
    assert f"model.norm.weight {told}" in refused(words, capsys, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sglang_serves_it_and_answers_the_same(run: Path, tmp_path: Path) -> None:
    folder = export(run, tmp_path / "model").folder
    arguments = ("--context-length", "64")
    with running_sglang(folder, extra_args=arguments, log_path=tmp_path / "server.log") as server:
        for question, (prompt, answer) in zip(QUESTIONS, by_transformers(folder, QUESTIONS, ANSWER), strict=True):
            params = {"temperature": 0, "max_new_tokens": ANSWER}
            body: dict[str, Any] = {"input_ids": prompt, "sampling_params": params}
            assert httpx.post(f"{server.url}/generate", json=body, timeout=60).json()["output_ids"] == answer
            messages = [{"role": "user", "content": question}]
            chat = {"model": "default", "messages": messages, "temperature": 0, "max_tokens": ANSWER}
            url = f"{server.url}/v1/chat/completions"
            said = httpx.post(url, json={**chat, "return_prompt_token_ids": True}, timeout=60).json()
            assert said["choices"][0]["message"]["content"] == renderer(folder).text(answer)
            assert said["choices"][0]["prompt_token_ids"] == prompt
