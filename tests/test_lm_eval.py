"""Tasks of lm-eval: what is asked of it, by a stand-in; and, where it is installed, that it finds what we find."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import re
import sys

import lm_eval_stand_in as stand_in
import numpy as np
import pytest
import torch
from conftest import load_tiny
from processes import run
from transformers import Trainer

from gere import GeneralAbilityCallback, GeReTrainer
from gere.errors import ConfigError, MissingPackageError, QuestionError
from gere.evaluation import Question, choice_accuracy, option_scores, read_questions
from gere.evaluation.lm_eval import load_tasks
from gere.ranks import Ranks

WORDS = "the room was dirty and badly made, but they served roasted seeds"
QUESTION = Question("Is it good?\nAnswer:", ("yes", "no"), 0)
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")


@pytest.fixture
def package(tmp_path, monkeypatch):
    with stand_in.installed(tmp_path / "packages", monkeypatch):
        yield


def evaluations():
    return [call for call in stand_in.CALLS if "samples" in call]


def luck():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_names_and_values(package, model, tokenizer, tmp_path):
    (tmp_path / "mine.yaml").write_text("task: mine")
    tasks = ["lm-eval:arc_easy", f"lm-eval:{tmp_path}/mine.yaml"]
    found = GeneralAbilityCallback(tasks=tasks).measure(model, tokenizer)
    # Of 9 rows, 0, 3 and 6 are wrong by acc_norm, and 7 has no likelihood.
    error = math.sqrt(5 / 9 * 4 / 9 / 9)
    assert found == pytest.approx({f"general/{n}{end}": v for n in ("arc_easy", "mine") for end, v in
                                   (("", 5 / 9), ("_se", error))})  # fmt: skip
    both = GeneralAbilityCallback(tasks={"ours": [QUESTION], "theirs": "lm-eval:winogrande"},
                                  normalization={"theirs": "none"}).measure(model, tokenizer)  # fmt: skip
    assert list(both) == ["general/ours", "general/ours_se", "general/theirs", "general/theirs_se"]
    assert both["general/theirs"] == 0.5 and both["general/ours"] in (0, 1)


def test_what_lm_eval_is_given(package, model, tokenizer):
    ability = GeneralAbilityCallback(tasks=["lm-eval:arc_easy"], limit=4, batch_size=3, max_length=50)
    ability.measure(model, tokenizer)
    ability.measure(model, tokenizer)
    first, second = evaluations()
    assert first["samples"] == second["samples"] == {"arc_easy": [0, 2, 4, 6]}, "evenly spread"
    assert first["iterations"] == 0 and first["seeds"] == second["seeds"] == [1234], "the same examples each time"
    with torch.no_grad():
        assert torch.equal(first["logits"], model.eval()(torch.tensor([[5, 6, 7]])).logits)
    wanted = {"batch_size": 3, "max_length": 49, "softmax_dtype": "float32", "backend": "causal"}
    assert wanted.items() <= first.items()
    assert first["tokenizer"] is not tokenizer and tokenizer.pad_token != "changed"


@pytest.mark.parametrize("fails", [False, True])
def test_everything_stays_as_it_was(package, model, tokenizer, fails):
    model.train()
    model.model.norm.eval()
    model.config.use_cache = True
    model.tie_weights = lambda: pytest.fail("the weights must not be tied")
    before = luck()
    ability = GeneralAbilityCallback(tasks=["lm-eval:arc_easy"])
    assert luck() == before, "loading draws no numbers"
    if fails:
        stand_in.FAIL.append(MemoryError("no room"))
        with pytest.raises(MemoryError):
            ability.measure(model, tokenizer)
    else:
        ability.measure(model, tokenizer)
    (call,) = evaluations()
    assert call["modes"] == {False} and not call["grad"] and call["cache"] is None
    assert model.training and not model.model.norm.training and model.config.use_cache is True
    assert luck() == before


def test_a_group_is_one_task_of_all_its_rows(package, model, tokenizer):
    ability = GeneralAbilityCallback(tasks=["lm-eval:group"], normalization="none")
    assert ability.measure(model, tokenizer)["general/group"] == pytest.approx(4 / 12)
    GeneralAbilityCallback(tasks=["lm-eval:group"], limit=2).measure(model, tokenizer)
    assert evaluations()[-1]["samples"] == {"one": [0], "two": [3]}
    GeneralAbilityCallback(tasks=["lm-eval:group"], limit=1).measure(model, tokenizer)
    assert evaluations()[-1]["samples"] == {"one": [0]}, "no part without a row"


def test_processes_share_the_rows_unless_they_share_the_weights(package, model, tokenizer):
    task = load_tasks({"a": "lm-eval:group"}, {"a": "none"})["a"]
    alone = task.score(model, tokenizer)
    parts: list[dict] = []

    def gather(item):
        if item is None:  # no process has failed
            return [None] * 3
        parts.append(item)
        return list(parts)

    scores = []
    for index in range(3):
        try:
            scores.append(task.score(model, tokenizer, ranks=Ranks(index, 3, gather=gather)))
        except KeyError:
            assert index < 2, "the first processes know only a part of the rows"
    assert scores == [alone] and [sum(map(len, call["samples"].values())) for call in evaluations()[1:]] == [4, 4, 4]
    model.lm_head.weight.ds_shape = model.lm_head.weight.shape  # as DeepSpeed marks a sharded weight
    assert task.score(model, tokenizer, ranks=Ranks(1, 3, gather=lambda item: [item] * 3)) == alone
    assert evaluations()[-1]["samples"] == evaluations()[0]["samples"]


@pytest.mark.slow
def test_two_processes(package, tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "log"))
    job = {"texts": 4, "replay": 2, "accumulation": 1, "steps": 1, "config": {"replay_strategy": "ce"}}
    done = run(tmp_path / "two", 2, ability={"tasks": ["lm-eval:arc_easy"], "texts": ["A text."]}, **job)
    assert [log["general/arc_easy"] for log in done.results[0]["ability"]] == pytest.approx([5 / 9] * 2)
    assert done.results[1]["ability"] == done.results[0]["ability"]
    rows = [json.loads((tmp_path / f"log-{rank}").read_text().splitlines()[0])["arc_easy"] for rank in (0, 1)]
    assert rows == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 8]]


@pytest.mark.parametrize("cls", [Trainer, GeReTrainer])
def test_in_a_training(package, make_trainer, cls):
    curves = []
    for callbacks in ([], [GeneralAbilityCallback(tasks=["lm-eval:arc_easy"], limit=3)]):
        trainer = make_trainer(cls, callbacks=callbacks)
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    logs = [{k: v for k, v in entry.items() if k.startswith("general/")} for entry in trainer.state.log_history]
    start, end = [log for log in logs if log]
    assert set(start) == {"general/arc_easy", "general/arc_easy_se"}
    assert end == {**start, "general/arc_easy_change": 0.0} and curves[0] == curves[1]


def test_where_tasks_are_looked_for(package, tmp_path):
    GeneralAbilityCallback(tasks=["lm-eval:arc_easy"], lm_eval_path=str(tmp_path))
    assert stand_in.CALLS.pop() == {"include_path": [str(tmp_path)], "include_defaults": True}
    (tmp_path / "mine.yaml").write_text("task: mine")
    GeneralAbilityCallback(tasks=[f"lm-eval:{tmp_path}/mine.yaml"])
    assert stand_in.CALLS.pop() == {"include_path": None, "include_defaults": False}, "files need no index"
    GeneralAbilityCallback(tasks=["lm-eval:arc_easy"], lm_eval_path=stand_in.TaskManager())
    assert len(stand_in.CALLS) == 1, "the manager of the user, and no other"


@pytest.mark.parametrize(
    ("task", "changes", "error", "match"),
    [
        ("hellaswig", {}, QuestionError, "KeyError"),
        ("gone", {}, QuestionError, "the hub is not there"),
        ("empty", {}, QuestionError, "no questions"),
        ("lambada", {}, ConfigError, "perplexity"),
        ("best", {}, ConfigError, "a mean over rows"),
        ("winogrande", {}, ConfigError, "normalization={'winogrande': 'none'}"),
        ("arc_easy", {"normalization": "tokens"}, ConfigError, "normalization of arc_easy"),
        ("arc_easy", {"lm_eval_path": "nowhere"}, ConfigError, "lm_eval_path"),
        ("arc_easy", {"limit": 0}, ConfigError, "limit"),
    ],
)
def test_what_cannot_be_measured(package, task, changes, error, match):
    with pytest.raises(error, match=match):
        GeneralAbilityCallback(tasks=[f"lm-eval:{task}"], **changes)


def test_sizes_and_names_that_cannot_be_used(package, model, tokenizer):
    for wrong in ({"batch_size": 0}, {"max_length": 1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            GeneralAbilityCallback(tasks=["lm-eval:arc_easy"], **wrong).measure(model, tokenizer)
    with pytest.raises(ConfigError, match="each name once"):
        GeneralAbilityCallback(tasks=["lm-eval:arc_easy", "arc_easy.jsonl"])
    with pytest.raises(ConfigError, match="lm_eval_path"):
        GeneralAbilityCallback(tasks={"a": [QUESTION]}, lm_eval_path=".")


@pytest.mark.parametrize("missing", ["lm_eval", "lm_eval.tasks"])
def test_without_the_package(package, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingPackageError, match=r"gere\[lm-eval\]"):
        GeneralAbilityCallback(tasks=["lm-eval:arc_easy"])
    GeneralAbilityCallback(tasks={"a": [QUESTION]})


YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
num_fewshot: {shots}
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def task_files(tmp_path):
    """Tasks of lm-eval whose rows are on this machine."""
    draw, words = random.Random(0), WORDS.split()
    rows = [
        {
            "query": f"Question: {' '.join(draw.choices(words, k=draw.randint(2, 12)))}?\nAnswer:",
            "choices": [" ".join(draw.choices(words, k=draw.randint(1, 5))) + str(option) for option in range(4)],
            "gold": draw.randrange(4),
            "ending": " ".join(draw.choices(words, k=3)),
        }
        for _ in range(20)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, shots in (("zero", 0), ("two", 2)):
        text = YAML.format(name=name, data=data, cache=tmp_path / "cache", shots=shots)
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "pair.yaml").write_text("group: pair\ntask: [zero, two]\n")
    return tmp_path


@needs_lm_eval
@pytest.mark.parametrize(("rule", "length"), [("none", 1024), ("characters", 1024), ("none", 24)])
def test_both_backends_find_the_same(task_files, model, tokenizer, monkeypatch, rule, length):
    """The answers, and behind them the log-likelihood of each option."""
    import lm_eval

    seen, evaluate = [], lm_eval.evaluate

    def watched(**settings):
        seen.append(evaluate(**settings))
        return seen[-1]

    monkeypatch.setattr(lm_eval, "evaluate", watched)
    tasks = {"theirs": f"lm-eval:{task_files}/zero.yaml", "ours": task_files / "rows.jsonl"}
    ability = GeneralAbilityCallback(tasks=tasks, normalization=rule, batch_size=7, max_length=length)
    found = ability.measure(model.train(), tokenizer)
    assert found["general/theirs"] == found["general/ours"] and model.training
    assert found["general/theirs_se"] == pytest.approx(found["general/ours_se"])
    questions = read_questions(task_files / "rows.jsonl")
    ours = option_scores(model, tokenizer, questions, normalization="none", max_length=length)
    rows = {sample["doc_id"]: sample for sample in seen[0]["samples"]["zero"]}
    for number, wanted in enumerate(ours):
        theirs = [answer[0] for answer in rows[number]["filtered_resps"]]
        np.testing.assert_allclose(theirs, wanted, rtol=1e-5)


@needs_lm_eval
def test_one_ending_after_two_contexts(task_files, model, tokenizer):
    """The form of WinoGrande."""
    data = task_files / "endings.jsonl"
    lines = [
        {**row, "query": row["choices"], "choices": [row["ending"]] * 4}
        for row in map(json.loads, open_rows(task_files))
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = (
        (task_files / "zero.yaml")
        .read_text()
        .replace("rows.jsonl", "endings.jsonl")
        .replace("task: zero", "task: end")
    )
    for key, value in (("text", "gold"), ("target", "ending"), ("choice", "query")):
        text = re.sub(f"(doc_to_{key}): .*", rf"\1: {value}", text)
    (task_files / "end.yaml").write_text(text)
    tasks = {"theirs": f"lm-eval:{task_files}/end.yaml", "ours": data}
    found = GeneralAbilityCallback(tasks=tasks, normalization="none").measure(model, tokenizer)
    assert found["general/theirs"] == found["general/ours"]


def open_rows(folder):
    return (folder / "rows.jsonl").read_text().splitlines()


@needs_lm_eval
def test_a_group_with_examples_and_a_limit(task_files, model, tokenizer):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task_files), include_defaults=False)
    ability = GeneralAbilityCallback(tasks=["lm-eval:pair"], limit=30, normalization="none", lm_eval_path=manager)
    first = ability.measure(model, tokenizer)
    assert ability.measure(model, tokenizer) == first
    task = load_tasks({"a": "lm-eval:pair"}, {"a": "none"}, 30, manager)["a"]
    assert set(task.parts) == {"zero", "two"} and len(task.rows) == 30
    zero = [row for part, row in task.rows if part == "zero"]
    questions = read_questions(task_files / "rows.jsonl")
    ours = choice_accuracy(model, tokenizer, [questions[row] for row in zero], normalization="none")
    alone = task._replace(rows=[("zero", row) for row in zero]).score(model, tokenizer)
    assert alone == pytest.approx(ours)
    model.model.norm.weight.data.fill_(math.nan)
    assert ability.measure(model, tokenizer)["general/pair"] == 0


@needs_lm_eval
def test_a_head_that_is_trained_apart_stays_so(task_files, model, tokenizer):
    """The configuration still says that the head is tied."""
    model.config.tie_word_embeddings = True
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach() + 0.1)
    GeneralAbilityCallback(tasks=[f"lm-eval:{task_files}/zero.yaml"]).measure(model, tokenizer)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight, "tying is there to be avoided"


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_find_what_one_does(task_files, tokenizer, strategy):
    job = {"texts": 4, "replay": 2, "accumulation": 1, "steps": 1, "config": {"replay_strategy": "ce"}}
    tasks = {"theirs": f"lm-eval:{task_files}/zero.yaml", "ours": str(task_files / "rows.jsonl")}
    done = run(task_files / "two", 2, strategy=strategy, ability={"texts": ["A text."], "tasks": tasks}, **job)
    wanted = choice_accuracy(load_tiny(), tokenizer, read_questions(task_files / "rows.jsonl")).accuracy
    for result in done.results:
        first, last = result["ability"]
        assert first["general/theirs"] == first["general/ours"] == wanted
        assert last["general/theirs"] == last["general/ours"]
