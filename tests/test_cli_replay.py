"""`gere replay`: one file of several sources, what is in it, and no torch for a look at the help."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
from conftest import DATA, ROOT, TINY, load_tiny

from gere import GeReConfig
from gere.cli.main import main
from gere.cli.replay_stats import Record, describe, without_repeats
from gere.replay.texts import load_texts
from gere.replay.written import own_texts
from gere.session.checkpoint import write_key


@pytest.fixture
def write(tmp_path):
    def write(name, records):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return str(path)

    return write


def records_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def fails(capsys, *words):
    assert main(["replay", *map(str, words)]) == 1
    return capsys.readouterr().err


def test_help_imports_nothing_heavy():
    script = (
        "import sys\nfrom gere.cli.main import main\ntry:\n    main(['replay', '--help'])\nexcept SystemExit:\n"
        "    sys.stderr.write(' '.join({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == "" and "--source" in done.stdout and "self_temperature" in done.stdout


def test_texts_of_a_model_are_those_of_a_training(tmp_path, tokenizer, capsys):
    out = tmp_path / "new" / "replay.jsonl"
    words = f"--source self --size 12 --model {TINY} --set max_length=32 --set self_batch_size=8 --device cpu"
    assert main(["replay", *words.split(), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    config = GeReConfig(replay_dataset="self", replay_size=12, max_length=32, self_batch_size=8)
    texts = own_texts(load_tiny(), tokenizer, config, tmp_path / "cache")
    assert records_of(out) == [{"text": text, "source": "self"} for text in texts]
    assert load_texts(GeReConfig(replay_dataset=str(out)), tmp_path) == texts
    assert "texts        12\n" in shown and "self: 12 texts, 100.0%" in shown and "wrote 12 texts" in shown
    assert "tokens" in shown and "longer than 32 tokens" in shown


def test_saving_dir_finds_and_keeps_texts(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "saving"
    words = f"--source self=9 --model {TINY} --set max_length=24 --saving-dir {folder} --device cpu".split()
    assert main(["replay", *words]) == 0 and len(list(folder.glob("replay-self-*.jsonl"))) == 1
    monkeypatch.setattr("transformers.GenerationMixin.generate", None)
    assert main(["replay", *words]) == 0
    first, second = capsys.readouterr().out.split("texts        9")[1:]
    assert first == second
    assert list(tmp_path.iterdir()) == [folder], "without --out nothing else is written"


def test_sources_are_mixed_and_repeats_dropped(tmp_path, write, capsys):
    mixed = [{"text": f"web text {row}", "source": "web" if row % 2 else "books"} for row in range(6)]
    first = write("mixed.jsonl", mixed)
    second = write("plain.jsonl", ["web text 1", "WEB   text 3", "la " * 40, "new"])
    out = tmp_path / "out.jsonl"
    assert main(["replay", "--source", f"{first}=4", "--source", second, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert records_of(out) == [
        *mixed[:4],
        *({"text": text, "source": second} for text in ("WEB   text 3", "la " * 40, "new")),
    ]
    for line in ("texts        8\n", "repeated     1 texts", "near repeats 1 more", "loops        1 texts"):
        assert line in shown
    assert "words" in shown and "books: 2 texts, 25.0%" in shown and f"{second}: 4 texts, 50.0%" in shown
    assert shown.endswith(f"wrote 7 texts to {out}\n")


def test_hub_sources(tmp_path, monkeypatch, capsys):
    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        return ({"text": "not this", "body": f"{name} {row}"} for row in range(99))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    words = [
        "--source",
        "hub=3",
        "--source",
        "someone/general=2",
        "--set",
        "replay_split=dev",
        "--set",
        "replay_column=body",
    ]
    assert main(["replay", *words, "--out", str(tmp_path / "out.jsonl")]) == 0
    assert asked == [("DKYoon/SlimPajama-6B", "dev", True), ("someone/general", "dev", True)]
    records = records_of(tmp_path / "out.jsonl")
    assert [record["source"] for record in records] == ["hub"] * 3 + ["someone/general"] * 2
    assert records[4]["text"] == "someone/general 1"
    assert "hub: 3 texts, 60.0%" in capsys.readouterr().out


def test_numbers_of_the_report(tokenizer):
    records = [Record("one two", "a"), Record("One  two", "b"), Record("one two", "b"), Record("la " * 30, "b")]
    shown = describe(records, tokenizer, GeReConfig(max_length=20))
    whole = [len(ids) for ids in tokenizer([record.text for record in records])["input_ids"]]
    assert f"tokens       {sum(whole):,} (of a text: min {min(whole):,}" in shown and f"max {max(whole)}" in shown
    assert "cut          1 texts" in shown and "repeated     1 texts" in shown and "near repeats 1 more" in shown
    assert "b: 3 texts, 75.0%" in shown and "loops        1 texts" in shown
    assert without_repeats(records) == [*records[:2], records[3]]


def test_a_file_is_never_overwritten_by_accident(tmp_path, write, capsys):
    source, out = write("texts.jsonl", ["a text"]), tmp_path / "out.jsonl"
    out.write_text("precious")
    said = fails(capsys, "--source", source, "--out", out)
    assert "ConfigError" in said and "--force" in said and out.read_text() == "precious"
    assert main(["replay", "--source", source, "--out", str(out), "--force"]) == 0 and len(records_of(out)) == 1


def test_commands_of_the_page(tmp_path, monkeypatch, capsys):
    lines = [line for line in (ROOT / "docs" / "texts.md").read_text().splitlines() if line.startswith("gere replay")]
    assert len(lines) == 3
    monkeypatch.chdir(tmp_path)
    for name in ("base_llms", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    for line in lines:
        assert main(shlex.split(line, comments=True)[1:]) == 0, line
    shown = capsys.readouterr().out
    assert "self: 32 texts, 50.0%" in shown and "examples/data/general.jsonl: 32 texts, 50.0%" in shown


def test_errors_by_name(tmp_path, write, capsys):
    assert "--model" in fails(capsys, "--source", "self")
    assert "cannot be loaded" in fails(capsys, "--source", "self", "--model", tmp_path / "nothing")
    assert "self_top_p" in fails(capsys, "--source", "self", "--model", TINY, "--set", "self_top_p=2")
    assert "Did you mean max_length" in fails(capsys, "--source", "self", "--model", TINY, "--set", "max_lenght=9")
    for word in ("replay_dataset=a.jsonl", "replay_size=3", "w_strategy=dy"):
        said = fails(capsys, "--source", "self", "--model", TINY, "--set", word)
        assert "--source" in said and word.split("=")[0] in said
    assert "self_top_p" in fails(capsys, "--source", "self", "--model", TINY, "--top-p", "2")
    for number in ("0", "-3", "abc", ""):
        assert "SOURCE=N" in fails(capsys, "--source", f"self={number}", "--model", TINY)
    assert "a hub name" in fails(capsys, "--source", "")
    said = fails(capsys, "--source", write("a.jsonl", ["x y"]), "--out", tmp_path / "a.txt")
    assert ".jsonl" in said and not (tmp_path / "a.txt").exists()
    assert "ReplaySetError" in fails(capsys, "--source", tmp_path / "no.jsonl")
    assert "--column" in fails(capsys, "--source", write("a.jsonl", [{"body": "x y"}]))
    tuned = tmp_path / "tuned"
    load_tiny().save_pretrained(tuned)
    write_key(tuned, "0" * 32)
    said = fails(capsys, "--source", "self", "--model", tuned, "--tokenizer", TINY)
    assert "fine-tuned from a base model" in said and "gere_anchor.json" in said
    with pytest.raises(SystemExit):
        main(["replay"])


def test_options_are_short_for_settings(capsys):
    source = f"{DATA / 'general.jsonl'}=5"
    outputs = []
    for words in (["--max-length", "7"], ["--set", "max_length=7"]):
        assert main(["replay", "--source", source, "--tokenizer", str(TINY), *words]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and "longer than 7 tokens" in outputs[0]
