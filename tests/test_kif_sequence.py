"""KIF over sequences of tasks: decoder-only models and encoder-decoders, with replay, and after kills."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import DATA, ROOT, TINY, read_jsonl
from safetensors.torch import load_file
from test_sequence import Stop
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from gere import TaskMemory
from gere.cli.main import main
from gere.continual import greedy_answers, likeliest_answers, read_sequence, run
from gere.continual.settings import settings_of
from gere.continual.tasks import TaskRow, encode
from gere.continual.trainers import kif_gere_trainer, kif_trainer
from gere.errors import ConfigError
from gere.kif.config import kif_config_of


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    """A T5 of random weights, with the tokenizer of the tiny Llama."""
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=768, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=2, eos_token_id=1,
        decoder_start_token_id=2, dropout_rate=0.0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    rows = read_jsonl(DATA / "task.jsonl", 160)
    words = {"one": {}, "two": {"good": "very nice", "bad": "not at all"}, "three": {"good": "yes", "bad": "no"}}
    for name, other in words.items():
        changed = [{**row, "output": other.get(row["output"], row["output"])} for row in rows]
        for kind, part in {"train": changed[:140], "dev": changed[140:148]}.items():
            (path / f"{name}.{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return path


@pytest.fixture
def settings(folder, tmp_path):
    """Make settings of a short sequence; everything can be replaced."""

    def make(**changes):
        training = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1}
        given = {
            "model": str(TINY),
            "tasks": ["one", "two"],
            "task_dir": str(folder),
            "out": str(tmp_path / "run"),
            "max_length": 96,
            "dev_rows": 4,
            "before": False,
            "trainer": "kif",
            "kif": {"preset": "paper", "inner_steps": 2, "outer_steps": 1, "outer_batch": 4},
            "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
            "training": {**training, "use_cpu": True},
        }
        return settings_of({**given, **changes}, "test")

    return make


Q_V = {"r": 4, "target_modules": ["q", "v"]}


def test_t5_goes_the_whole_way(settings, t5, tmp_path, capsys):
    """Three tasks by the command, each from the adapter of the one before, with the memory of all before it."""
    given = settings(model=str(t5), lora=Q_V, tasks=["one", "two", "three"], before=True, name="t5")
    file = tmp_path / "seq.json"
    file.write_text(json.dumps(vars(given)))
    assert main(["sequence", "--config", str(file)]) == 0
    assert "three: trains 140 rows" in capsys.readouterr().out
    out = Path(given.out)
    matrix = json.loads((out / "matrix.json").read_text())
    assert [len(row) for row in matrix["accuracy"]] == [3] * 3
    memories = [TaskMemory.read(path) for path in sorted(out.glob("task-*/kif_memory.jsonl"))]
    assert [memory.tasks for memory in memories] == [(), ("one",), ("one", "two")]
    assert [row.label for row in memories[2].rows] == ["bad", "good", "not at all", "very nice"]
    logs = [json.loads(line) for line in (out / "logs.jsonl").read_text().splitlines()]
    assert [(log["task"], log["step"]) for log in logs if "kif/neither" in log] == [(1, 2), (1, 4), (2, 2), (2, 4)]
    (weights,) = [load_file(path) for path in out.glob("task-03-three/model/adapter_model.safetensors")]
    assert any(weight.any() for name, weight in weights.items() if "lora_B" in name)


@pytest.mark.slow
def test_t5_learns_a_task(settings, t5):
    training = {"per_device_train_batch_size": 8, "max_steps": 150, "learning_rate": 1e-2, "use_cpu": True}
    lora = {"r": 16, "target_modules": ["q", "k", "v", "o", "wi", "wo"]}
    matrix = run(settings(model=str(t5), lora=lora, tasks=["one"], training=training, dev_rows=8))
    assert matrix.accuracy[0][0] >= 0.5 and matrix.invalid[0][0] == 0.0


def test_answers_of_an_encoder_decoder_against_one_by_one(t5, tokenizer):
    model = AutoModelForSeq2SeqLM.from_pretrained(t5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.7)
    rows = [TaskRow(row["instruction"], row["input"], row["output"]) for row in read_jsonl(DATA / "task.jsonl", 7)]
    encoded = [encode(tokenizer, row, 60 + 2 * place, encoder_decoder=True) for place, row in enumerate(rows)]
    assert all(one["input_ids"][-1] == one["labels"][-1] == tokenizer.eos_token_id for one in encoded)
    assert [tokenizer.decode(one["labels"][:-1]).strip() for one in encoded] == [row.output for row in rows]
    prompts = [one["input_ids"] for one in encoded]
    answers = greedy_answers(model, tokenizer, prompts, 9, batch=3)
    model.eval()
    for ids, answer in zip(prompts, answers, strict=True):
        found = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=9)[0]
        assert answer == tokenizer.decode(found, skip_special_tokens=True).split("\n")[0].strip()
    assert len({*answers}) > 1
    options = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" good", " bad", " not very nice")]
    expected = []
    for ids in prompts:
        losses = []
        for option in options:
            with torch.no_grad():
                losses.append(model(input_ids=torch.tensor([ids]), labels=torch.tensor([option])).loss.item())
        expected.append(min(range(3), key=losses.__getitem__))
    assert likeliest_answers(model, tokenizer, prompts, options, batch_tokens=200) == expected


def replayed(folder: Path) -> dict:
    return {"replay_dataset": str(DATA / "heldout.jsonl"), "replay_size": 12, "max_length": 40}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("rounds", 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("rounds", None), ("matrix", 3), ("replay", 3))),
    ],
)
def test_a_kill_in_task_two_changes_nothing(settings, folder, tmp_path, kind, step):
    training = {**settings().training, "max_steps": 5, "save_steps": 2}
    extra = {
        "training": training,
        "name": "same",
        "dev_rows": 2,
        "tasks": ["one", "two", "three"][: 2 + (step is None)],
    }
    if kind == "matrix":
        extra["kif"] = {"preset": "tasl"}
    if kind == "replay":
        extra["gere"] = replayed(folder)
    whole, broken = (settings(**extra, out=f"{tmp_path}/{name}") for name in "ab")
    run(whole)

    def make(model, tokenizer, train_rows, args, **extra):
        factory = kif_gere_trainer if kind == "replay" else kif_trainer
        trainer = factory(model, tokenizer, train_rows, args, **extra)
        if "task-02" in args.output_dir:
            trainer.add_callback(Stop(step))
        return trainer

    with pytest.raises(KeyboardInterrupt):
        run(broken, make_trainer=make)
    run(broken)
    a, b = Path(whole.out), Path(broken.out)
    assert (a / "matrix.json").read_bytes() == (b / "matrix.json").read_bytes()
    last = f"task-0{len(whole.tasks)}-{whole.tasks[-1]}"
    weights = [load_file(path / last / "model" / "adapter_model.safetensors") for path in (a, b)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    logs = [json.loads(line) for line in (a / "logs.jsonl").read_text().splitlines()]
    again = [json.loads(line) for line in (b / "logs.jsonl").read_text().splitlines()]
    assert [log for log in logs if "loss" in log] == [log for log in again if "loss" in log]
    if kind == "matrix":
        histories = [(path / last / "model" / "gere_kif.json").read_bytes() for path in (a, b)]
        assert histories[0] == histories[1]
    if kind == "replay":
        assert any("gere/ce" in log and "kif/neither" in log for log in logs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": None}, "adapter"),
        ({"mode": "multitask"}, "mode"),
        ({"kif": {"inner_stepps": 2}}, r"'inner_stepps'[\s\S]*Did you mean inner_steps"),
        ({"kif": {"preset": "papre"}}, "Did you mean paper"),
        ({"kif": {"share": 1}}, "share"),
        ({"trainer": "plain"}, "no such section"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(settings(**changes))


@pytest.mark.parametrize("changes", [{"general": str(DATA / "heldout.jsonl")}, {"gere": {"replay_size": 4}}])
def test_what_an_encoder_decoder_has_not_is_refused(settings, t5, changes):
    with pytest.raises(ConfigError, match="encoder-decoder has no next-token loss"):
        run(settings(model=str(t5), lora=Q_V, **changes))


def test_orders_1_to_6_ship():
    read = {path.stem: read_sequence(path) for path in sorted((ROOT / "examples" / "kif").glob("order-*.yaml"))}
    usual = {path.stem: read_sequence(path) for path in (ROOT / "examples" / "sequences").glob("*.yaml")}
    names = [f"fifteen-{number}" for number in (1, 2, 3)] + [f"four-{number}" for number in (1, 2, 3)]
    assert [given.tasks for given in read.values()] == [usual[name].tasks for name in names]
    for given in read.values():
        assert kif_config_of(given.kif, "kif").inner_steps == 8 and given.trainer == "kif"
