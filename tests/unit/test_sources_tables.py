"""Templates and nested columns; Parquet files and folders of the `datasets` library."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from sluice.config.data import Columns, DatasetsSource, JsonlSource, ParquetSource
from sluice.data.sources import arrow, load_prompts
from sluice.data.sources.fields import MISSING, look_up, without
from sluice.errors import ConfigError, DataError
from sluice.types import Message

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


def write_lines(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_table(path: Path, rows: list[dict[str, Any]], **types: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    for name, type in types.items():
        table = table.set_column(table.column_names.index(name), name, pa.array([row[name] for row in rows], type))
    pq.write_table(table, path)
    return path


# ── nested columns ──────────────────────────────────────────────────────────────────────────────────────

NESTED: dict[str, Any] = {"a.b": 1, "a": {"b": 2, "c": [{"d": None}, 5]}, "e": 0}


@pytest.mark.parametrize(
    ("name", "value"),
    [("e", 0), ("a.b", 1), ("a.c.1", 5), ("a.c.0.d", None)],
)
def test_a_dotted_name_leads_inside(name: str, value: Any) -> None:
    assert look_up(NESTED, name) == value


@pytest.mark.parametrize("name", ["x", "a.x", "a.c.2", "a.c.x", "e.x", "a.c.-1", "a.b.c"])
def test_what_is_not_there_is_missing(name: str) -> None:
    assert look_up(NESTED, name) is MISSING
    assert without(NESTED, name) is NESTED


def test_a_field_is_taken_out_of_a_copy() -> None:
    before = json.dumps(NESTED)
    assert without(NESTED, "a.b") == {"a": NESTED["a"], "e": 0}
    assert without(NESTED, "a.c.0.d")["a"] == {"b": 2, "c": [{}, 5]}
    assert without(NESTED, "a.c.1")["a"]["c"] == [{"d": None}, None]
    assert json.dumps(NESTED) == before


def test_a_nested_answer_is_the_truth_and_leaves_the_metadata(tmp_path: Path) -> None:
    row = {"data": {"q": "1+1", "n": 7}, "reward_model": {"style": "rule", "ground_truth": "2"}, "level": 1}
    columns = Columns(prompt="data.q", answer="reward_model.ground_truth", id="data.n")
    (prompt,) = load_prompts(JsonlSource(path=write_lines(tmp_path / "r.jsonl", row), columns=columns))
    assert (prompt.id, prompt.messages, prompt.answer) == ("7", (Message("user", "1+1"),), "2")
    assert prompt.metadata == {"data": {}, "reward_model": {"style": "rule"}, "level": 1}, "an agent reads metadata"


# ── templates ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_template_makes_the_question_of_several_columns(tmp_path: Path) -> None:
    row = {"question": "Which?", "choices": ["x", "y"], "meta": {"unit": "m"}, "n": 1.5, "answer": "x", "prompt": "no"}
    source = JsonlSource(
        path=write_lines(tmp_path / "r.jsonl", row),
        template="{question}\nA: {choices.0} of {choices} in {meta.unit}, {n:.2f} {{sic}}",
        system="Short.",
    )
    (prompt,) = load_prompts(source)
    expected = 'Which?\nA: x of ["x", "y"] in m, 1.50 {sic}'
    assert prompt.messages == (Message("system", "Short."), Message("user", expected))
    assert (prompt.answer, prompt.metadata["choices"]) == ("x", ["x", "y"])
    assert "answer" not in prompt.metadata


@pytest.mark.parametrize(
    ("template", "row", "said"),
    [
        ("{qustion}", {"question": "a"}, "1 has no column 'qustion', which the template names; its columns are "
         "'question'\n  → did you mean 'question'?"),
        ("{question}", {"question": None}, "column 'question' is null, and the template names it"),
        ("{question:d}", {"question": "a"}, r"column 'question' is a string, which \{question:d\} of the template"),
        ("{question}", {"question": " "}, "the template gives an empty question"),
    ],
)  # fmt: skip
def test_a_row_that_does_not_fill_the_template(tmp_path: Path, template: str, row: dict[str, Any], said: str) -> None:
    path = write_lines(tmp_path / "r.jsonl", row, {"question": 5})
    with pytest.raises(DataError, match=said):
        load_prompts(JsonlSource(path=path, template=template))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{question", "is no format string: expected '}' before end of string; a brace itself is written twice"),
        ("a}", "is no format string"),
        ("{}", "has a hole without a name"),
        ("{0}", "has a hole without a name"),
        ("{q!r}", "has a conversion or a hole inside"),
        ("{q:{width}}", "has a conversion or a hole inside"),
        ("{q[0]}", r"nested fields are written with dots, {choices.0}, not {q\[0\]}"),
        ("What is it?", "names no column, so every row would ask the same"),
    ],
)
def test_what_is_no_template(template: str, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        JsonlSource(path=Path("x"), template=template)


def test_a_template_and_a_prompt_column_are_two_questions() -> None:
    with pytest.raises(ValidationError, match=r"template makes the question, so columns\.prompt would not be read"):
        JsonlSource(path=Path("x"), template="{a}", columns=Columns(prompt="b"))


# ── Parquet ─────────────────────────────────────────────────────────────────────────────────────────────


def test_parquet_gives_what_the_same_rows_as_json_lines_give(tmp_path: Path) -> None:
    rows = [
        {"prompt": MESSAGES, "answer": "1", "more": {"k": [1.5, None], "l": [True]}, "id": f"r{n}"} for n in range(5)
    ]
    table = load_prompts(ParquetSource(path=write_table(tmp_path / "r.parquet", rows)))
    lines = load_prompts(JsonlSource(path=write_lines(tmp_path / "r.jsonl", *rows)))
    assert table == lines


def test_a_folder_of_parquet_is_read_in_order_and_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow, "BATCH_ROWS", 2)
    for part in (1, 0):
        write_table(tmp_path / f"part-{part}.parquet", [{"prompt": f"{part}.{n}"} for n in range(5)])
    prompts = load_prompts(ParquetSource(path=tmp_path))
    assert [prompt.messages[0].content for prompt in prompts] == [f"{p}.{n}" for p in (0, 1) for n in range(5)]


def test_values_that_json_lacks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {
        "prompt": "q", "day": date(2026, 1, 2), "at": datetime(2026, 1, 2, 3, 4), "price": Decimal("1.10"),
        "gap": float("nan"), "text": b"old Spark", "image": b"\xff\xd8", "deep": [{"x": float("nan")}],
    }  # fmt: skip
    with caplog.at_level(logging.WARNING):
        (prompt,) = load_prompts(ParquetSource(path=write_table(tmp_path / "r.parquet", [row])))
    assert prompt.metadata == {
        "day": "2026-01-02", "at": "2026-01-02T03:04:00", "price": "1.10", "gap": None, "text": "old Spark",
        "image": None, "deep": [{"x": None}],
    }  # fmt: skip
    json.dumps(prompt.metadata, allow_nan=False)
    assert "r.parquet: row 1 and others: 1 values are bytes" in caplog.text


def test_bad_rows_of_a_table_are_named_and_can_be_skipped(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "x": 1.0}, {"prompt": "b", "x": float("inf")}, {"prompt": None, "x": 2.0}]
    path = write_table(tmp_path / "r.parquet", rows)
    with pytest.raises(DataError, match=r"r\.parquet: row 2: column 'x': infinity is no JSON number"):
        load_prompts(ParquetSource(path=path))
    assert len(load_prompts(ParquetSource(path=path, on_bad_row="skip"))) == 1


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    whole = write_table(tmp_path / "good.parquet", [{"prompt": "a" * 1000}])
    (tmp_path / "torn.parquet").write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"torn\.parquet cannot be read as Parquet: .*\n  → it may be cut short"):
        load_prompts(ParquetSource(path=tmp_path / "torn.parquet"))
    with pytest.raises(DataError, match=r"did you mean 'good\.parquet'"):
        load_prompts(ParquetSource(path=tmp_path / "god.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \*\.parquet file"):
        load_prompts(ParquetSource(path=tmp_path / "empty"))
    with pytest.raises(DataError, match="holds no usable row: it is empty"):
        load_prompts(ParquetSource(path=write_table(tmp_path / "none.parquet", [{"prompt": "a"}][:0])))


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)
    for source in (ParquetSource(path=tmp_path), DatasetsSource(path=tmp_path)):
        with pytest.raises(ConfigError, match=r"not installed\n  → pip install 'sluice-rl\[data\]'"):
            load_prompts(source)


# ── datasets ────────────────────────────────────────────────────────────────────────────────────────────


def texts(path: Path, **settings: Any) -> list[str]:
    return [prompt.messages[-1].content for prompt in load_prompts(DatasetsSource(path=path, **settings))]


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    train = Dataset.from_list([{"prompt": MESSAGES, "answer": 3}, {"prompt": MESSAGES[:1], "answer": 4}])
    DatasetDict({"train": train, "test": train.select([1])}).save_to_disk(str(tmp_path / "both"))
    train.save_to_disk(str(tmp_path / "one"))
    assert texts(tmp_path / "both") == texts(tmp_path / "one") == ["c", "a"]
    assert texts(tmp_path / "both", split="test") == ["a"]
    assert load_prompts(DatasetsSource(path=tmp_path / "one"))[0].answer == "3"
    with pytest.raises(DataError, match=r"has no split 'tets'\n  → did you mean 'test'"):
        texts(tmp_path / "both", split="tets")
    with pytest.raises(DataError, match="has no subsets"):
        texts(tmp_path / "both", subset="main")


def test_files_laid_out_as_a_data_set(tmp_path: Path) -> None:
    tables, lines, csv = tmp_path / "tables", tmp_path / "lines", tmp_path / "csv"
    for split in ("train", "test"):
        write_table(tables / "data" / f"{split}-00000-of-00001.parquet", [{"prompt": f"{split} q"}])
    write_lines(lines / "train.jsonl", {"prompt": "2020-01-01", "answer": "2020-01-02"}, {"prompt": "b", "extra": 1})
    csv.mkdir()
    (csv / "train.csv").write_text("prompt,answer\nwhat,5\n")
    assert texts(tables, split="test") == ["test q"]
    first, second = load_prompts(DatasetsSource(path=lines))
    assert (first.messages[0].content, first.answer) == ("2020-01-01", "2020-01-02"), (
        "text that looks like a date is text"
    )
    assert second.metadata == {"extra": 1}
    assert load_prompts(DatasetsSource(path=csv))[0].answer == "5"
    with pytest.raises(DataError, match=r"has no split 'validation'\n  → there is: test, train"):
        texts(tables, split="validation")
    with pytest.raises(DataError, match="has no subset 'mian'"):
        texts(tables, subset="mian")


def test_subsets_are_those_of_the_folders_card(tmp_path: Path) -> None:
    for name in ("main", "hard"):
        write_lines(tmp_path / name / "train.jsonl", {"prompt": name})
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("main", "hard"))
    (tmp_path / "README.md").write_text(f"---\nlicense_link: https://example.com\nconfigs:\n{configs}---\n# Text\n")
    assert texts(tmp_path, subset="hard") == ["hard"]


def test_nothing_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no folder on this machine.*nothing is fetched from a hub.*\n  → get it first"
    ):
        texts(Path("openai/gsm8k"))
    (tmp_path / "README.md").write_text("---\nconfigs:\n- data_files: [https://example.com/x.jsonl]\n---\n")
    with pytest.raises(DataError, match=r"names files elsewhere, https://example\.com/x\.jsonl"):
        texts(tmp_path)
    file = write_lines(tmp_path / "x.jsonl", {"prompt": "a"})
    with pytest.raises(DataError, match="is a file, and data sets are read from folders only"):
        texts(file)


def test_a_folder_that_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read as a data set: "):
        texts(tmp_path)
    (tmp_path / "dataset_dict.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as a data set: "):
        texts(tmp_path)


def test_reading_a_folder_leaves_no_cache_and_no_setting(tmp_path: Path) -> None:
    write_lines(tmp_path / "lines" / "train.jsonl", {"prompt": "a"})
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "train.csv").write_text("prompt\nb\n")
    code = (
        "import sys, datasets\n"
        "from pathlib import Path\n"
        "from sluice.config.data import DatasetsSource\n"
        "from sluice.data.sources import load_prompts\n"
        "for folder in sys.argv[1:]:\n"
        "    load_prompts(DatasetsSource(path=Path(folder)))\n"
        "print(datasets.config.HF_HUB_OFFLINE)\n"
    )
    clean = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "lines"), str(tmp_path / "table")],
        check=True, timeout=120, env={**clean, "HF_HOME": str(tmp_path / "cache")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "False"
    assert [file for file in (tmp_path / "cache").rglob("*") if file.is_file()] == []
