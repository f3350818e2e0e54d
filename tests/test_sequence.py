"""Sequences of tasks: settings, answers, the matrix, one anchor throughout, and kills that change nothing."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import DATA, ROOT, TINY, load_tiny, read_jsonl
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed

from gere.ability import Question, choice_accuracy
from gere.cli.main import main
from gere.continual import (
    Matrix,
    SequenceSettings,
    greedy_answers,
    likeliest_answers,
    read_sequence,
    read_task,
    run,
    score,
)
from gere.continual.folder import RunFolder, read_matrix
from gere.continual.settings import settings_of
from gere.continual.tasks import TaskRow, encode, prompt_ids
from gere.continual.trainers import gere_trainer, load_model, order_seed, plain_trainer, training_arguments
from gere.errors import ConfigError, ReplaySetError
from gere.report import make_report

KILLER = """
import os, signal
from transformers import TrainerCallback
from gere.continual.trainers import gere_trainer, plain_trainer

class Kill(TrainerCallback):
    def _at(self, args, place):
        if os.environ.get("KILL") == f"{args.output_dir.split('task-')[-1][:2]} {place}":
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args, state, control, **kwargs):
        self._at(args, state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self._at(args, "end")

def make(model, tokenizer, train_rows, args, **settings):
    kind = gere_trainer if "gere_config" in settings else plain_trainer
    trainer = kind(model, tokenizer, train_rows, args, **settings)
    trainer.add_callback(Kill())
    return trainer
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two small tasks that share no label, general texts, and a module with a trainer factory."""
    path = tmp_path_factory.mktemp("tasks")
    rows = read_jsonl(DATA / "task.jsonl", 80)
    words = {"one": {}, "two": {"good": "very nice", "bad": "not at all"}}
    for name, other in words.items():
        changed = [{**row, "output": other.get(row["output"], row["output"])} for row in rows]
        for kind, part in {"train": changed[:48], "dev": changed[48:68]}.items():
            (path / f"{name}.{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    texts = read_jsonl(DATA / "general.jsonl", 24)
    (path / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (path / "killer.py").write_text(KILLER)
    return path


@pytest.fixture
def settings(folder, tmp_path):
    """Make settings of a short sequence on the tiny model; everything can be replaced."""

    def make(**changes) -> SequenceSettings:
        training = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1}
        given = {
            "model": str(TINY),
            "tasks": ["one", "two"],
            "task_dir": str(folder),
            "out": str(tmp_path / "run"),
            "max_length": 96,
            "dev_rows": 8,
            "training": {**training, "use_cpu": True},
        }
        return settings_of({**given, **changes}, "test")

    return make


def replay(folder: Path) -> dict:
    return {"replay_dataset": str(folder / "general.jsonl"), "max_length": 40, "num_interpolate_per_batch": 1}


# Answers


def prompts_of(tokenizer, count: int) -> list[list[int]]:
    rows = [TaskRow(row["instruction"], row["input"], row["output"]) for row in read_jsonl(DATA / "task.jsonl", count)]
    return [prompt_ids(tokenizer, row, 20 + 3 * place) for place, row in enumerate(rows)]


def one_by_one(model, tokenizer, ids: list[int], most: int) -> str:
    row = torch.tensor([ids])
    out = model.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=most)[0]
    return tokenizer.decode(out[len(ids) :], skip_special_tokens=True).split("\n")[0].strip()


def test_batched_decoding_equals_generate_one_by_one(tokenizer):
    model = load_tiny()
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform, so that answers differ
            parameter.mul_(2.5)
    bias = torch.zeros(768)
    bias[[tokenizer.eos_token_id, tokenizer("\n", add_special_tokens=False)["input_ids"][-1]]] = 1.0
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + bias)  # rows end at different places
    prompts = prompts_of(tokenizer, 23)
    before = model.generation_config
    model.train()
    answers = greedy_answers(model, tokenizer, prompts, 12, batch=5)
    assert model.training and model.generation_config is before
    model.eval()
    assert answers == [one_by_one(model, tokenizer, ids, 12) for ids in prompts]
    lengths = {len(tokenizer(answer)["input_ids"]) for answer in answers}
    assert len({*answers}) > 15 and min(lengths) < 5 and max(lengths) > 20


def test_decoding_stops_at_line_end_and_at_eos(tokenizer):
    model = load_tiny()
    prompts = prompts_of(tokenizer, 3)
    line, other = tokenizer("\n", add_special_tokens=False)["input_ids"][-1], tokenizer("x")["input_ids"][-1]
    calls = []

    def head(script):
        def forward(module, args, output):
            calls.append(1)
            output.logits[:] = 0
            output.logits[..., script[min(len(calls), len(script)) - 1]] = 1
            return output

        return forward

    for script, expected in (([other, line, other], "x"), ([other, tokenizer.eos_token_id, other], "x")):
        calls.clear()
        handle = model.register_forward_hook(head(script))
        assert greedy_answers(model, tokenizer, prompts, 9) == [expected] * 3
        assert len(calls) == 2
        handle.remove()
    # A word that ends a text is none of its special tokens, and no part of the answer either.
    own = copy.deepcopy(tokenizer)
    own.eos_token = "z"
    end = own.eos_token_id
    calls.clear()
    model.register_forward_hook(head([other, end, other]))
    assert greedy_answers(model, own, prompts, 9) == ["x"] * 3 and len(calls) == 2


def test_likeliest_answers_against_float64(tokenizer):
    model = load_tiny()
    prompts = prompts_of(tokenizer, 9)
    options = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" good", " bad", " not very nice")]
    double = load_tiny().double().eval()
    expected = []
    for prompt in prompts:
        means = []
        for option in options:
            with torch.no_grad():
                logs = double(torch.tensor([prompt + option])).logits[0].log_softmax(-1).numpy()
            means.append(sum(logs[len(prompt) - 1 + at, token] for at, token in enumerate(option)) / len(option))
        expected.append(max(range(3), key=means.__getitem__))
    assert likeliest_answers(model, tokenizer, prompts, options, batch_tokens=200) == expected


def test_score_counts_invalid_apart_from_wrong():
    answers = ["World.", "sports", "Sprots", "", "science or  technology"]
    right = ["World", "World", "Sports", "Sports", "Science or Technology"]
    labels = ["World", "Sports", "Business", "Science or Technology"]
    assert score(answers, right, labels) == (2 / 5, 2 / 5)


# Tasks and settings


def test_rows_are_drawn_by_seed_and_long_prompts_keep_both_ends(settings, tokenizer):
    first, same = read_task("one", settings(rows=10)), read_task("one", settings(rows=10))
    assert first == same and len(first.train) == 10 and first.labels == ("bad", "good")
    assert read_task("one", settings(rows=10, seed=1)).train != first.train
    assert read_task("one", settings(dev_skip=2)).dev[0] == read_task("one", settings()).dev[2]
    row = first.train[0]
    whole, cut = prompt_ids(tokenizer, row, 10**6), prompt_ids(tokenizer, row, 24)
    assert len(cut) == 24 and cut[:6] == whole[:6] and cut[-6:] == whole[-6:]
    example = encode(tokenizer, row, 24)
    learned = [token for token in example["labels"] if token != -100]
    assert len(example["input_ids"]) == 24 and learned[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(learned[:-1]).strip() == row.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modell": "x"}, r"'modell'[\s\S]*Did you mean model"),
        ({"trainer": "other"}, "trainer"),
        ({"gere": {"replay_size": 3}}, "no such section"),
        ({"dev_rows": 0}, "dev_rows"),
        ({"answers": "loud"}, "answers"),
        ({"tasks": ["three"]}, r"three\.train\.jsonl"),
        ({"tasks": ["one", "one"]}, "different names"),
        ({"training": {"max_step": 3}}, r"'max_step'[\s\S]*Did you mean max_steps"),
        ({"training": {"output_dir": "x"}}, "output_dir"),
        ({"trainer": "gere", "gere": {"replay_sise": 3}}, "replay_sise"),
        ({"trainer": "no_such_module:make"}, "cannot be imported"),
        ({"model": "/nowhere"}, "cannot be loaded"),
        ({"lora": {"rank": 3}}, "LoraConfig"),
        ({"dev_skip": 999}, "dev_skip"),
        ({"ability": {"limits": 3}}, r"'limits'[\s\S]*Did you mean limit"),
        ({"ability": {"texts": "x"}}, "'texts'"),
        ({"max_length": 2000}, "at most 1024"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(settings(**changes))


def test_yaml_with_words_of_the_command_line(tmp_path):
    file = tmp_path / "seq.yaml"
    file.write_text("model: m\ntasks: [a]\nout: o\ntraining: {max_steps: 3, learning_rate: 1e-4}\n")
    read = read_sequence(file, ["seed=3", "training.max_steps=5", "lora.r=4"])
    assert (read.seed, read.training["max_steps"], read.lora) == (3, 5, {"r": 4})
    assert training_arguments(read, tmp_path).learning_rate == 1e-4
    with pytest.raises(ConfigError, match="tasks and out"):
        settings_of({"model": "m"}, file)
    with pytest.raises(ConfigError, match="--set"):
        read_sequence(file, ["seed=[3"])
    file.write_text("model: [m")
    with pytest.raises(ConfigError, match=r"seq\.yaml"):
        read_sequence(file)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input": "x", "output": null}', "line 3\n[\\s\\S]*output is missing, null"),
        ('{"input": null, "output": "good"}', "line 3\n[\\s\\S]*instruction or input is missing"),
        ('{"input": "x"}', "line 3\n[\\s\\S]*output is missing"),
        ('["x", "good"]', "line 3\n[\\s\\S]*list, which is no record"),
        ('{"input": "x", "output": "good"', "line 3 of the file: Expecting"),
        ("", "no rows"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(settings, tmp_path, line, message):
    good = '{"instruction": null, "input": "x", "output": "good"}\n'
    (tmp_path / "own.dev.jsonl").write_text(good)
    file = tmp_path / "own.train.jsonl"
    file.write_text(f"{good if line else ''}\n{line}\n")
    with pytest.raises(ConfigError, match=rf"own\.train\.jsonl[\s\S]*{message}"):
        read_task(str(file), settings())
    file.write_text(good)
    assert read_task(str(file), settings()).train == [TaskRow("", "x", "good")]


def test_general_texts_that_are_null_are_no_texts(settings, tmp_path):
    file = tmp_path / "general.jsonl"
    file.write_text('{"text": null}\n{"text": null}\n')
    with pytest.raises(ReplaySetError, match=r"is empty[\s\S]*general"):
        run(settings(general=str(file)))


def test_a_label_longer_than_a_row_is_refused(settings, folder):
    task = {kind: f"{folder}/one.{kind}.jsonl" for kind in ("train", "dev")}
    given = settings(tasks=[{**task, "labels": ["good", "bad", "altogether unforgettable"]}], max_length=8)
    with pytest.raises(ConfigError, match="max_length"):
        run(given)


SHIPPED = sorted((ROOT / "examples" / "sequences").glob("*.yaml"))


def test_shipped_orders():
    orders = {path.stem: list(read_sequence(path).tasks) for path in SHIPPED}
    assert len(orders) == 6
    four, fifteen = ([{*tasks} for tasks in orders.values() if len(tasks) == size] for size in (4, 15))
    assert four == [{"agnews", "amazon", "dbpedia", "yahoo"}] * 3
    assert len(fifteen) == 3 and fifteen.count(fifteen[0]) == 3 and len(fifteen[0]) == 15
    assert len({tuple(tasks) for tasks in orders.values()}) == 6


# The sequence


@pytest.mark.slow
def test_the_example_of_the_whole_path(tmp_path):
    """It ends in a page, and replay forgets less of the general text than the plain trainer."""
    script = ROOT / "examples" / "whole_path.py"
    done = subprocess.run(
        [sys.executable, str(script), "--out", "out"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("|")]
    column = [cell.strip() for cell in rows[0]].index("general loss")
    loss = {row[1].strip(): float(row[column].split()[0]) for row in rows[2:]}
    assert loss["gere"] < loss["before training"] + 1 < loss["plain"]
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()


def test_a_folder_in_use_is_refused(settings):
    given = settings()
    Path(given.out).mkdir()
    with FileLock(Path(given.out) / ".lock"), pytest.raises(ConfigError, match="in use"):
        run(given)


def test_matrix_of_two_tasks_and_its_files(settings, folder):
    seen = []

    def measure(model, tokenizer):
        seen.append(not any(module.training for module in model.modules()))
        return {"general/own": float(len(seen))}

    given = settings(general=str(folder / "general.jsonl"), general_rows=6, dev_rows=None, name="short")
    matrix = run(given, measure=measure)
    assert [len(row) for row in (*matrix.accuracy, *matrix.invalid, matrix.before)] == [2] * 5
    assert [entry["general/own"] for entry in matrix.general] == [1.0, 2.0, 3.0]
    assert all(entry["general/loss"] > 0 for entry in matrix.general)
    out = Path(given.out)
    written = json.loads((out / "matrix.json").read_text())
    assert written["format"] == 1 and written["tasks"] == ["one", "two"] and written["accuracy"] == matrix.accuracy
    sequence = json.loads((out / "sequence.json").read_text())
    assert (sequence["name"], sequence["seed"], sequence["tasks"]) == ("short", 0, ["one", "two"])
    logs = [json.loads(line) for line in (out / "logs.jsonl").read_text().splitlines()]
    assert [(log["task"], log["step"]) for log in logs if "loss" in log] == [
        (t, s) for t in (0, 1) for s in range(1, 5)
    ]
    assert sorted(path.parent.name for path in out.glob("task-*/model")) == ["task-02-two"]
    assert not list(out.glob("task-*/checkpoint-*"))
    assert run(given, measure=measure) == matrix and len(seen) == 3, "a finished sequence computes nothing"
    with pytest.raises(ConfigError, match=r"training.max_steps 4 \(the folder\)[\s\S]*training.max_steps 5 \(now\)"):
        run(settings(**{**vars(given), "training": {**given.training, "max_steps": 5}}))


def test_general_ability_of_a_sequence_stands_in_its_report(settings, tmp_path, tokenizer):
    """From the questions to the F1 of the table, with the score of the untouched model by `choice_accuracy`."""
    questions = [Question("Night comes after", ("day", "salt"), 0), Question("Two and two are", ("nine", "four"), 1)]
    file = tmp_path / "quiz.jsonl"
    records = [{"query": q.context, "choices": q.options, "gold": q.answer} for q in questions]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    given = settings(ability={"tasks": [str(file)], "normalization": "none"})
    matrix = run(given)
    score = choice_accuracy(AutoModelForCausalLM.from_pretrained(TINY), tokenizer, questions, normalization="none")
    assert [set(entry) for entry in matrix.general] == [{"general/quiz", "general/quiz_se"}] * 3
    assert matrix.general[0]["general/quiz"] == score.accuracy
    table = make_report([Path(given.out)]).markdown.splitlines()
    head, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line.startswith("|")]
    last = dict(zip(head, rows[-1], strict=True))
    task = sum(matrix.accuracy[-1]) / 2
    assert last["AP"] == f"{task:.3f}" and last["quiz"] == f"{matrix.general[-1]['general/quiz']:.3f}"


def test_a_model_that_learns_fills_the_diagonal(settings):
    training = {"per_device_train_batch_size": 8, "max_steps": 100, "learning_rate": 3e-3, "use_cpu": True}
    matrix = run(settings(training=training, before=False, dev_rows=20))
    assert matrix.before == [None, None]
    (one, early), (late, two) = matrix.accuracy
    assert one > 0.8 and two > 0.8 and early == late == 0.0
    assert matrix.invalid[0][1] == 1.0 == matrix.invalid[1][0], "an answer of the other task is no answer"


def test_multitask_trains_on_all_rows_at_once(settings):
    rows = []

    def make(model, tokenizer, train_rows, args, **extra):
        rows.append(len(train_rows))
        return plain_trainer(model, tokenizer, train_rows, args, **extra)

    matrix = run(settings(mode="multitask", rows=10, answers="likelihood"), make_trainer=make)
    assert rows == [20] and len(matrix.accuracy) == 1 and len(matrix.accuracy[0]) == 2
    assert matrix.invalid == [[0.0, 0.0]] and len(matrix.general) == 2


@pytest.mark.parametrize("lora", [None, {"r": 4, "target_modules": "all-linear"}])
def test_every_task_has_the_anchor_of_the_base(settings, folder, lora):
    keys, moved = [], []

    def make(model, tokenizer, train_rows, args, **extra):
        moved.append(any((tensor != base[name]).any() for name, tensor in model.state_dict().items()))
        trainer = gere_trainer(model, tokenizer, train_rows, args, **extra)
        end = trainer.save_model
        trainer.save_model = lambda *given: (keys.append(trainer.replay.anchor.key), end(*given))
        return trainer

    given = settings(trainer="gere", gere=replay(folder), lora=lora, dev_rows=1)
    set_seed(given.seed)
    base = load_model(given, None).state_dict()
    run(given, make_trainer=make)
    assert moved == [False, True]
    assert len(keys) == 2 and len({*keys}) == 1
    named = json.loads((Path(given.out) / "task-02-two" / "model" / "gere_anchor.json").read_text())
    assert named["anchor"] == keys[0]
    assert [path.name for path in (Path(given.out) / "gere_saving").glob("anchor-*")] == [f"anchor-{keys[0]}"]


def test_each_task_replays_other_rows(settings, folder):
    """One order for all tasks would replay the same first rows in each, which the model would learn by heart."""
    replayed = []

    def make(model, tokenizer, train_rows, args, **extra):
        texts = [row["text"] for row in read_jsonl(folder / "general.jsonl", 24)]
        replay_set = {tuple(tokenizer(text)["input_ids"][:40]) for text in texts}
        seen = []

        def watch(module, given, named):
            if torch.is_grad_enabled():  # and neither the anchor nor the evaluation
                for row, mask in zip(named["input_ids"], named["attention_mask"].bool(), strict=True):
                    seen.extend({tuple(row[mask].tolist())} & replay_set)

        model.get_decoder().register_forward_pre_hook(watch, with_kwargs=True)
        replayed.append(seen)
        return gere_trainer(model, tokenizer, train_rows, args, **extra)

    run(settings(trainer="gere", gere=replay(folder), dev_rows=1), make_trainer=make)
    first, second = replayed
    assert len(first) == len(second) == 4 and first != second
    assert order_seed(3, 0) == order_seed(3, 0) != order_seed(2, 1)


# Kills

STARTER = """
import os, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {folder!r}]
import killer
from gere.cli.main import main

for file, kill in {starts!r}:
    process = os.fork()  # each start is a process of its own; the imports are made once
    if not process:
        os.environ["KILL"] = kill
        os._exit(main(["sequence", "--config", file]))
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    checkpoints = sorted(path.name for path in Path(file).with_suffix("").glob("task-02-two/checkpoint-*"))
    print("ENDED", code, *checkpoints, flush=True)
"""


def start(folder: Path, *starts: tuple[Path, str]) -> list[str]:
    """Exit codes and checkpoints of task 2 after each start of the command, killed at a task and step, or not."""
    script = STARTER.format(root=str(ROOT), folder=str(folder), starts=[(str(file), kill) for file, kill in starts])
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=250)
    ends = [line.removeprefix("ENDED ") for line in done.stdout.splitlines() if line.startswith("ENDED ")]
    assert len(ends) == len(starts) and not any(end.startswith("1") for end in ends), done.stderr
    return ends


def same_runs(first: Path, second: Path) -> None:
    assert (first / "matrix.json").read_bytes() == (second / "matrix.json").read_bytes()
    logs = []
    for out in (first, second):
        lines = [json.loads(line) for line in (out / "logs.jsonl").read_text().splitlines()]
        logs.append([log for log in lines if "train_runtime" not in log])  # sums since the last start
    assert logs[0] == logs[1] and len(logs[0]) > 2
    weights = [load_file(next(out.glob("task-02-two/model/*model.safetensors"))) for out in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def config_file(given: SequenceSettings, out: Path) -> Path:
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({**vars(given), "out": str(out), "name": "same"}))
    return file


@pytest.mark.slow
def test_killed_twice_in_task_two_gives_the_same_matrix(settings, folder, tmp_path):
    training = {**settings().training, "max_steps": 8, "save_steps": 3}
    given = settings(trainer="killer:make", gere=replay(folder), training=training, general=f"{folder}/general.jsonl")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    file = config_file(given, broken)
    ends = start(folder, (config_file(given, whole), ""), (file, "02 4"), (file, "02 7"), (file, ""))
    assert ends == ["0", "-9 checkpoint-3", "-9 checkpoint-3 checkpoint-6", "0"]
    same_runs(whole, broken)


class Stop(TrainerCallback):
    """Ends a training as a kill does, in one process: after a step, or at the end and before its model is kept."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt

    def on_train_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("kind", "step", "left"), [("gere", 3, ["checkpoint-2"]), ("plain", None, ["checkpoint-4", "checkpoint-5"])]
)
def test_stop_in_task_two_resumes_bit_for_bit(settings, folder, tmp_path, kind, step, left):
    """With replay in the middle; without at the end, where the last checkpoint would train a step too many."""
    training = {**settings().training, "max_steps": 5, "save_steps": 2}
    extra = {"trainer": kind, "gere": replay(folder) if kind == "gere" else {}, "training": training, "name": "same"}
    whole, broken = (settings(**extra, before=False, dev_rows=2, out=f"{tmp_path}/{name}") for name in "ab")
    run(whole)

    def make(model, tokenizer, train_rows, args, **extra):
        trainer = {"gere": gere_trainer, "plain": plain_trainer}[kind](model, tokenizer, train_rows, args, **extra)
        if "task-02" in args.output_dir:
            trainer.add_callback(Stop(step))
        return trainer

    with pytest.raises(KeyboardInterrupt):
        run(broken, make_trainer=make)
    task = Path(broken.out) / "task-02-two"
    assert sorted(path.name for path in task.glob("checkpoint-*")) == left and not (task / "model").exists()
    run(broken)
    same_runs(Path(whole.out), Path(broken.out))


def test_half_written_files_are_not_used(tmp_path):
    out = RunFolder(tmp_path, ["one", "two"])
    for step, state in ((9, "{}x"), (10, '{"global_step": 10, "max_steps": 30}'), (20, None)):
        (out.task(0) / f"checkpoint-{step}").mkdir(parents=True)
        if state is not None:
            (out.task(0) / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
        save_file({"weight": torch.zeros(1)}, out.task(0) / f"checkpoint-{step}" / "model.safetensors")
    assert out.checkpoint(0) == out.task(0) / "checkpoint-10"
    assert not (out.task(0) / "checkpoint-20").exists()
    with pytest.raises(RuntimeError, match="disk"):
        out.keep(0, _fail)
    assert out.model(0) is None
    (tmp_path / "matrix.json").write_text('{"format": 1, "tas')
    with pytest.raises(ConfigError, match=r"matrix\.json"):
        read_matrix(tmp_path)


def _fail(folder: str) -> None:
    Path(folder).mkdir()
    raise RuntimeError("disk")


def test_command(settings, tmp_path, capsys, folder):
    """Prints accuracy and general change after each task, and that it resumes."""
    given = settings(rows=8, dev_rows=2, general=f"{folder}/general.jsonl", general_rows=4)
    words = ["sequence", "--config", str(config_file(given, tmp_path / "out")), "--set", "training.max_steps=1"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "resumes" not in out and "one: trains 8 rows from the start" in out
    matrix = read_matrix(tmp_path / "out")
    assert isinstance(matrix, Matrix)
    losses = [entry["general/loss"] for entry in matrix.general]
    head, *rows = [line.split() for line in out.splitlines()[-5:-1]]
    assert head == ["after", "one", "two", "general", "change"]
    accuracies = [matrix.before, *matrix.accuracy]
    for name, row, accuracy, loss in zip(("before", "one", "two"), rows, accuracies, losses, strict=True):
        assert row == [name, *(f"{share:.4f}" for share in accuracy), f"{loss - losses[0]:+.4f}"]
    assert losses[0] != losses[2]
    (tmp_path / "out" / "matrix.json").write_text(
        json.dumps(
            {
                **json.loads((tmp_path / "out" / "matrix.json").read_text()),
                "accuracy": matrix.accuracy[:1],
                "invalid": matrix.invalid[:1],
                "general": matrix.general[:2],
            }
        )
    )
    assert main(words) == 0
    again = capsys.readouterr().out
    assert f"{tmp_path / 'out'} resumes: 1 of 2 trainings are done\n" in again
    assert again.splitlines()[-5:] == out.splitlines()[-5:]
    assert main(["sequence", "--config", str(tmp_path / "nothing.yaml")]) == 1
    script = "import sys; from gere.cli.main import make_parser; make_parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_command_without_general_texts(settings, tmp_path, capsys):
    given = settings(mode="multitask", rows=8, dev_rows=2, before=False)
    words = ["sequence", "--config", str(config_file(given, tmp_path / "out")), "--set", "training.max_steps=1"]
    assert main(words) == 0
    before, after = [line.split() for line in capsys.readouterr().out.splitlines()[-3:-1]]
    assert before == ["before", "-", "-", "-"] and after[:2] == ["all", "tasks"] and after[-1] == "-"


def test_seeds_of_the_command_are_one_group_of_the_report(settings, tmp_path, capsys):
    """As `--set seed=1 --set out=...` makes them, with their mean."""
    file = tmp_path / "seq.yaml"
    file.write_text(yaml.safe_dump(vars(settings(rows=8, dev_rows=2, mode="multitask"))))
    outs = [tmp_path / f"run-{seed}" for seed in (1, 2)]
    for seed, out in enumerate(outs, 1):
        more = ["--set", "training.max_steps=1", "--set", f"seed={seed}", "--set", f"out={out}"]
        assert main(["sequence", "--config", str(file), *more]) == 0
    capsys.readouterr()
    assert main(["report", *map(str, outs), "--out", str(tmp_path / "page.html")]) == 0
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    (row,) = [dict(zip(table[0], line, strict=True)) for line in table if line[0] == "run"]
    scores = [sum(read_matrix(out).accuracy[0]) / 2 for out in outs]
    assert row["seeds"] == "1, 2" and row["AP"].startswith(f"{sum(scores) / 2:.3f} ± ")
