"""Texts, whatever they come as: the same from every file, chats as TRL reads them, and nothing taken for a text."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path

import datasets
import hypothesis
import pytest
import torch
from conftest import DATA, TINY, load_tiny
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from gere import GeneralAbilityCallback, GeReConfig, general_loss
from gere.cli.main import main
from gere.continual import read_task
from gere.continual.settings import SequenceSettings
from gere.errors import ConfigError, ReplaySetError
from gere.evaluation import choice_accuracy, read_questions
from gere.evaluation.choices import encode
from gere.evaluation.examples import read_examples
from gere.replay import load_replay_set, load_texts, tokenize

TEXTS = [
    "The library opens at eight.",
    "图书馆每天早上八点开门。",
    "彼は毎朝六時に起きる。",
    "ห้องสมุดเปิดแปดโมง",
    "Le café ferme.",
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [{"role": "user", "content": "Why is the sky blue?"}, {"role": "assistant", "content": "Air scatters blue."}]


@pytest.fixture
def chatty(tokenizer, request):
    """The tiny tokenizer with a chat template; its own special tokens begin with BOS."""
    import copy

    own = copy.deepcopy(tokenizer)
    own.chat_template = TEMPLATE
    return own


def read(value, tmp_path, tokenizer=None, **changes):
    return load_texts(GeReConfig(replay_dataset=value, **changes), tmp_path, tokenizer=tokenizer)


def json_lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def write_all(folder: Path, texts: list[str]) -> list[Path]:
    """Write texts in every format that is read."""
    records = [{"n": place, "text": text} for place, text in enumerate(texts)]
    lines = json_lines(records).encode()
    files = {
        "a.jsonl": lines,
        "a.ndjson": lines.replace(b"\n", b"\r\n\r\n"),
        "lines.json": lines,
        "list.json": json.dumps(records).encode(),
        "pretty.json": json.dumps(records, indent=2, ensure_ascii=False).encode("utf-8-sig"),
        "a.jsonl.gz": gzip.compress(lines),
        "list.json.bz2": bz2.compress(json.dumps(texts).encode()),
        "a.JSONL.xz": lzma.compress(lines),
        "mark.jsonl": b"\xef\xbb\xbf" + lines,
        "wide.jsonl": json_lines(records).encode("utf-16"),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    for name, mark in (("a.csv", ","), ("a.tsv", "\t")):
        with (folder / name).open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ["n", "text"], delimiter=mark)
            writer.writeheader()
            writer.writerows(records)
    Dataset.from_list(records).to_parquet(folder / "a.parquet")
    return sorted(folder.iterdir())


LETTERS = st.text(st.characters(exclude_characters="\0\r\ufeff", exclude_categories=["Cs"]), min_size=1)


@hypothesis.settings(max_examples=20, deadline=None)
@given(texts=st.lists(LETTERS.filter(str.strip), min_size=1, max_size=4))
def test_every_format_gives_the_same_texts(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("formats")
    for path in write_all(folder, texts):
        assert read(path, folder) == texts, path.name
        assert read(path, folder, replay_size=1) == texts[:1], path.name


def test_languages_without_spaces_come_from_a_folder_too(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json_lines({"text": text} for text in TEXTS))
    Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    DatasetDict(dev=Dataset.from_dict({"text": TEXTS})).save_to_disk(tmp_path / "splits")
    assert read(folder, tmp_path) == read(tmp_path / "saved", tmp_path) == TEXTS
    assert read(tmp_path / "splits", tmp_path, replay_split="dev") == TEXTS
    with pytest.raises(ReplaySetError, match=r"^The folder[\s\S]*replay_split"):
        read(tmp_path / "splits", tmp_path)


def test_a_configuration_is_named(tmp_path):
    for part in ("en", "de"):
        (tmp_path / "two" / part).mkdir(parents=True)
        (tmp_path / "two" / part / "train.jsonl").write_text(json_lines([{"text": f"a text in {part}"}]))
    configs = "".join(f"- config_name: {part}\n  data_files: {part}/*.jsonl\n" for part in ("en", "de"))
    (tmp_path / "two" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert read(tmp_path / "two", tmp_path, replay_subset="de") == ["a text in de"]
    with pytest.raises(ReplaySetError, match=r"^The folder[\s\S]*replay_subset"):
        read(tmp_path / "two", tmp_path)


def test_paths_in_a_list_are_read_by_turns(tmp_path, model, tokenizer):
    for name in ("web", "code"):
        (tmp_path / f"{name}.jsonl").write_text(json_lines({"text": f"{name} text {row}"} for row in range(5)))
    paths = [str(tmp_path / "web.jsonl"), str(tmp_path / "code.jsonl")]
    mixed = ["web text 0", "code text 0", "web text 1", "code text 1"]
    for source in (paths, tuple(map(Path, paths))):
        assert read(source, tmp_path, replay_size=4) == mixed
    assert sorted(read(str(tmp_path / "*.jsonl"), tmp_path, replay_size=4)) == sorted(mixed)
    config = GeReConfig(replay_dataset=paths, heldout_dataset=paths)
    with pytest.raises(ReplaySetError, match="All held-out texts are replayed"):
        load_replay_set(config, tokenizer, tmp_path)
    expected = general_loss(model, tokenizer, read(paths, tmp_path))
    assert general_loss(model, tokenizer, paths) == expected
    assert GeneralAbilityCallback(texts=paths).measure(model, tokenizer)["general/loss"] == expected


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["web.jsonl", "A text of several words."], "both texts and paths"),
        (["A text of several words.", Path("web.jsonl")], "item 1[\\s\\S]*gere replay"),
        (["self", "web.jsonl"], "both texts and paths"),
        (["web.jsonl", "none.jsonl"], "none.jsonl[\\s\\S]*FileNotFoundError"),
        ("web.jsonl,code.jsonl", "a list of paths"),
        ("nothing/*.jsonl", "^No file fits"),
        ("/nowhere/texts", "^There is no such file or folder"),
        ("selff", 'Did you mean "self"'),
    ],
)
def test_paths_that_cannot_be_read(tmp_path, monkeypatch, names, match):
    monkeypatch.chdir(tmp_path)
    Path("web.jsonl").write_text(json_lines([{"text": "a b c"}]))
    with pytest.raises(ReplaySetError, match=match) as caught:
        read(names, tmp_path)
    assert "next:" in str(caught.value) and "cache folder" not in str(caught.value)


def test_a_text_that_ends_like_a_path_is_a_text(tmp_path):
    texts = ["Write the result to out.json", "An or/and of words", "docs/readme", "one"]
    assert read(texts, tmp_path) == texts


def test_empty_rows_are_counted_by_one_rule(tmp_path, caplog):
    rows = ["a b c", "", None, {"text": " "}, {"text": None}, {"messages": []}, {"prompt": "a", "completion": ""}, "d"]
    (tmp_path / "a.jsonl").write_text("\n" + "\n".join(map(json.dumps, rows)))
    assert read(tmp_path / "a.jsonl", tmp_path) == read(rows, tmp_path) == ["a b c", "d"]
    assert caplog.text.count("6 of 8 rows are empty") == 2 and "a.jsonl, line 3;" in caplog.text
    with pytest.raises(ReplaySetError, match=r"a\.jsonl, line 10[\s\S]*type int"):
        (tmp_path / "a.jsonl").open("a").write('\n{"text": 5}')
        read(tmp_path / "a.jsonl", tmp_path)


def test_tasks_questions_and_examples_are_read_from_every_format(tmp_path):
    rows = [{"instruction": None, "input": f"é {n}", "output": label} for n, label in enumerate(("good", "bad"))]
    questions = [{"query": "é", "choices": ["b", "c"], "gold": n} for n in range(2)]
    for name, content in (("rows", rows), ("questions", questions)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8-sig")
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(("{}\n" + json_lines(content)).encode()))
        Dataset.from_list(content).to_parquet(tmp_path / f"{name}.parquet")
    settings = SequenceSettings(model="m", tasks=["t"], out="o")
    for end in ("json", "jsonl.gz", "parquet"):
        file = str(tmp_path / f"rows.{end}")
        task = read_task({"train": file, "dev": file, "name": "t"}, settings)
        assert [(row.prompt, row.output) for row in task.train] == [("é 0", "good"), ("é 1", "bad")]
        assert [tuple(example) for example in read_examples(Path(file))] == [("é 0", "good"), ("é 1", "bad")]
        assert [question.answer for question in read_questions(tmp_path / f"questions.{end}")] == [0, 1]


def test_a_file_is_read_as_far_as_it_is_needed(tmp_path):
    lines = json_lines({"text": f"text number {row}"} for row in range(3000))
    for name, content in (("a.jsonl", lines), ("a.json", f"[{lines.strip().replace(chr(10), ',')}")):
        (tmp_path / name).write_text(content + '{"text": "cut')
        assert len(read(tmp_path / name, tmp_path, replay_size=3)) == 3
        with pytest.raises(ReplaySetError, match=r"line (3001|1) of the file"):
            read(tmp_path / name, tmp_path)


def test_half_a_pair_reaches_no_tokenizer(tmp_path, model, tokenizer, caplog):
    texts = ["A text \ud83d with half a pair.", "\ufeffA text behind a mark.", "\ud83d\ude00 is whole."]
    whole = ["A text \ufffd with half a pair.", "A text behind a mark.", "\U0001f600 is whole."]
    assert read(texts, tmp_path) == whole and "3 of 3 rows lose byte order marks, or get U+FFFD" in caplog.text
    assert general_loss(model, tokenizer, texts) == general_loss(model, tokenizer, whole)
    (tmp_path / "q.jsonl").write_text(json.dumps({"query": texts[0], "choices": ["a", "b"], "gold": 0}))
    assert choice_accuracy(model, tokenizer, read_questions(tmp_path / "q.jsonl")).standard_error == 0


@hypothesis.settings(max_examples=40, deadline=None)
@given(st.text("ab 。é\n", min_size=1, max_size=400), st.integers(2, 40), st.sampled_from([None, True, False]))
def test_a_long_text_has_the_tokens_of_the_whole(tokenizer, text, length, add_bos):
    text = text * 20
    config = GeReConfig(max_length=length, add_bos=add_bos)
    whole = tokenizer(text, add_special_tokens=add_bos is None)["input_ids"]
    expected = ([tokenizer.bos_token_id] if add_bos else []) + whole
    assert tokenize([text], tokenizer, config)[0] == expected[:length]


# Chats


def of_trl(tokenizer, record):
    """Token ids of a row as TRL's trainer makes them."""
    trl = pytest.importorskip("trl")
    row = trl.data_utils.maybe_convert_to_chatml(json.loads(json.dumps(record)))
    if trl.is_conversational(row):
        row = trl.apply_chat_template(row, tokenizer)
        whole = row["text"] if "text" in row else row["prompt"] + row["completion"]
        return tokenizer(whole, add_special_tokens=False)["input_ids"]
    return tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]


TURNS = [{"from": "user", "value": "Hi."}, {"from": "assistant", "value": "Hello."}]
RECORDS = [
    {"messages": CHAT},
    {"messages": [{"role": "system", "content": "Be brief."}, *CHAT, *CHAT], "tools": None},
    {"conversations": TURNS},
    {"prompt": CHAT[:1], "completion": CHAT[1:]},
    {"prompt": "Name a colour.", "completion": " Blue is one."},
]


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace("{{ bos_token }}", "")], ids=["bos", "no_bos"])
@pytest.mark.parametrize("record", RECORDS, ids=lambda record: "+".join(record))
def test_rows_are_those_of_trl(chatty, tmp_path, record, template):
    chatty.chat_template = template
    expected = of_trl(chatty, record)
    (tmp_path / "a.jsonl").write_text(json_lines([record]))
    Dataset.from_list([record]).to_parquet(tmp_path / "a.parquet")
    for source in ([record], tmp_path / "a.jsonl", tmp_path / "a.parquet", Dataset.from_list([record])):
        config = GeReConfig(replay_dataset=source)
        assert load_replay_set(config, chatty, tmp_path).rows == [expected]


def test_rows_are_those_of_trls_trainer(chatty, tmp_path):
    trl = pytest.importorskip("trl")
    args = trl.SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, packing=False)
    for record in (RECORDS[0], RECORDS[3], RECORDS[4]):
        trainer = trl.SFTTrainer(load_tiny(), args, train_dataset=Dataset.from_list([record]), processing_class=chatty)
        rows = load_replay_set(GeReConfig(replay_dataset=[record]), chatty, tmp_path).rows
        assert rows == [list(trainer.train_dataset[0]["input_ids"])]


def test_forms_that_trl_does_not_know(chatty, tokenizer, tmp_path):
    alpaca = {
        "instruction": "Add.",
        "input": "1 and 2",
        "output": "3",
        "history": [["Hi", "Hello"]],
        "system": "Be kind.",
    }
    assert read([alpaca], tmp_path, chatty) == [
        "<s>[system]Be kind.</s>[user]Hi</s>[assistant]Hello</s>[user]Add.\n1 and 2</s>[assistant]3</s>"
    ]
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    assert read([{"conversations": turns}, turns], tmp_path, chatty) == ["<s>[user]Hi</s>[assistant]Hello</s>"] * 2
    assert read([alpaca], tmp_path, tokenizer) == ["Be kind.\n\nHi\n\nHello\n\nAdd.\n1 and 2\n\n3"]
    assert read([{"text": "As it is.", "messages": CHAT}], tmp_path, chatty) == ["As it is."]
    assert read([{"talk": CHAT}], tmp_path, chatty, replay_column="talk") == read(
        [{"messages": CHAT}], tmp_path, chatty
    )


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"messages": [{"content": "no role"}]}, "message 0 has no role"),
        ({"messages": "words"}, "messages are of type str"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "more than text"),
        ({"conversations": TURNS, "image": "a.png"}, "images"),
        ({"prompt": 3, "completion": "b"}, "types int, str"),
        ({"instruction": "a", "output": 3}, "more than text: 3"),
        ({"question": "a"}, "a record with 'question'"),
    ],
)
def test_chats_that_cannot_be_read(tmp_path, record, match):
    with pytest.raises(ReplaySetError, match=f"item 0[\\s\\S]*{match}"):
        read([record], tmp_path)


def test_a_template_that_refuses_a_row_is_named(chatty, tmp_path):
    chatty.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ReplaySetError, match=r"item 0[\s\S]*roles must alternate"):
        read([{"messages": CHAT}], tmp_path, chatty)


def test_a_row_has_one_bos(chatty, tmp_path):
    bos, text = chatty.bos_token_id, chatty.apply_chat_template(CHAT, tokenize=False)
    assert text.startswith(chatty.bos_token)
    for add_bos in (None, True):
        for source in ([text], [{"messages": CHAT}], ["A plain text."]):
            rows = load_replay_set(GeReConfig(replay_dataset=source, add_bos=add_bos), chatty, tmp_path).rows
            assert rows[0].count(bos) == 1 and rows[0][0] == bos
    (tmp_path / "q.jsonl").write_text(json.dumps({"query": text, "choices": ["a", "b"], "gold": 0}))
    for row in encode(chatty, read_questions(tmp_path / "q.jsonl"), 512):
        assert row.ids.count(bos) == 1


def test_chats_of_the_hub_are_kept_for_every_template(chatty, tokenizer, tmp_path, monkeypatch):
    asked = []

    def load_dataset(path, **settings):
        asked.append(settings)
        return [{"messages": CHAT}, {"prompt": "a b", "completion": "c"}, {"text": "d e"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    source = {"replay_size": 3, "replay_subset": "small"}
    first = read("someone/chats", tmp_path, chatty, **source)
    assert read("someone/chats", tmp_path, chatty, **source) == first == [
        chatty.apply_chat_template(CHAT, tokenize=False), "a bc</s>", "d e"
    ]  # fmt: skip
    assert read("someone/chats", tmp_path, tokenizer, **source)[0] == "Why is the sky blue?\n\nAir scatters blue."
    assert asked == [{"split": "train", "streaming": True, "name": "small"}]


def test_gere_replay_shows_how_a_row_was_read_and_keeps_it(chatty, tmp_path, capsys):
    chatty.save_pretrained(tmp_path / "chatty")
    (tmp_path / "a.jsonl").write_text(json_lines(RECORDS[:5]))
    words = ["replay", "--source", str(tmp_path / "a.jsonl")]
    assert main([*words, "--tokenizer", str(tmp_path / "chatty"), "--out", str(tmp_path / "b.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert "messages: 2 texts, by the chat template, such as '<s>[user]Why is the sky blue?" in shown
    config = [GeReConfig(replay_dataset=str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl")]
    first, second = (load_replay_set(one, chatty, tmp_path).rows for one in config)
    assert [*dict.fromkeys(map(tuple, first))] == list(map(tuple, second))
    assert main(words) == 0 and "messages: 2 texts, joined" in capsys.readouterr().out


# What a command says


@pytest.mark.parametrize(
    ("words", "said", "unsaid"),
    [
        (["--source", "{texts}=9999"], "where:    --source {texts}=9999", "replay_size"),
        (["--source", "{texts}", "--model", "nosuch"], "where:    --model", "--tokenizer"),
        (["--source", "{texts}", "--tokenizer", "nosuch"], "where:    --tokenizer", "--model"),
        (["--source", "selff"], 'Did you mean "self"', "gere_config"),
        (["--source", "/nowhere"], "no such file or folder", "could not be fetched"),
        (["--source", "{texts}", "--out", "{file}/o.jsonl"], "Give another --out", "ache"),
        (["--source", "self=4", "--model", str(TINY), "--device", "nosuch"], "where:    --device", "Traceback"),
        (["--source", "{texts}", "--size", "0"], "where:    --size", "gere_config"),
    ],
)
def test_messages_of_gere_replay_name_the_right_thing(tmp_path, capsys, words, said, unsaid):
    (tmp_path / "file").write_text("")
    places = {"texts": DATA / "general.jsonl", "file": tmp_path / "file"}
    assert main(["replay", *(word.format(**places) for word in words)]) == 1
    shown = capsys.readouterr().err
    assert said.format(**places) in shown and unsaid not in shown.replace(str(TINY), "")


@pytest.mark.parametrize(
    ("setting", "where"),
    [
        ("training.learning_rate=fast", "training.learning_rate"),
        ("training.max_steps=1.5", "training.max_steps"),
        ("training.save_steps=often", "training.save_steps"),
        ("training.bf16=maybe", "training.bf16"),
        ("training.weight_decay=[1]", "training.weight_decay"),
        ("training.optim=nosuch", "training"),
        ("training.per_device_train_batch_size=0", "training.per_device_train_batch_size"),
    ],
)
def test_training_settings_of_another_type_are_named(tmp_path, capsys, setting, where):
    (tmp_path / "t.train.jsonl").write_text(json_lines([{"input": "a", "output": "b"}]))
    (tmp_path / "t.dev.jsonl").write_text(json_lines([{"input": "a", "output": "b"}]))
    config = {"model": str(TINY), "tasks": ["t"], "task_dir": str(tmp_path), "out": str(tmp_path / "out")}
    (tmp_path / "s.json").write_text(json.dumps(config))
    assert main(["sequence", "--config", str(tmp_path / "s.json"), "--set", setting]) == 1
    assert f"where:    {where}\n" in capsys.readouterr().err
    assert not (tmp_path / "out" / "sequence.json").exists(), "the folder is free for the right setting"


def test_an_adapter_without_peft_is_named(tmp_path, monkeypatch):
    from gere.continual.trainers import load_model

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'where: +lora[\s\S]*pip install "gere\[peft\]"'):
        load_model(SequenceSettings(model=str(TINY), tasks=["t"], out="o", lora={"r": 2}), None)


def test_the_bare_command_and_its_version(capsys):
    assert main([]) == 0 and "replay" in capsys.readouterr().out
    done = subprocess.run([sys.executable, "-m", "gere", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("gere 0.")


def test_active_dropout_is_said_with_its_number(make_trainer, caplog, tokenizer):
    caplog.set_level("INFO", "gere")
    make_trainer().train()
    assert "starts above 0" not in caplog.text
    sizes = {"vocab_size": len(tokenizer), "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 2}
    torch.manual_seed(0)
    trainer = make_trainer(model=GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.2, attn_pdrop=0.0)))
    trainer.train()
    assert "gere/tm starts above 0, since dropout 0.1, 0.2 is active" in caplog.text
    assert trainer.state.log_history[0]["gere/tm"] > 0


def test_config_errors_stay_config_errors(tmp_path):
    with pytest.raises(ConfigError, match="replay_subset"):
        GeReConfig(replay_subset="")
