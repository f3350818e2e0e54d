"""Which label an answer stands for: labels are never confused, and no right answer is lost to its form."""

# ruff: noqa: RUF001

from __future__ import annotations

import json
import logging
import math
import unicodedata

import pytest
import torch
from conftest import TINY, load_tiny
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import AutoTokenizer

from gere.continual import SequenceSettings, greedy_answers, likeliest_answers, normalised, read_task, run, score
from gere.errors import ConfigError

RIGHT, WRONG, INVALID = (1.0, 0.0), (0.0, 0.0), (0.0, 1.0)
# Letters of several scripts, digits, signs, marks, spaces, and characters of several Unicode forms.
TEXTS = st.text("aAbßéÉe\u0301ñŉİıΣςк三한１２Ａﬁ½²3.14,-−+%$#<>=!?'\"()[]*`_/\\&:;~°😀😡 \t\u00a0\u3000\n", max_size=6)


def one(answer: str, right: str, labels: list[str]) -> tuple[float, float]:
    return score([answer], [right], labels)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        *[("-5", "5"), ("+5", "5"), ("−5", "5"), ("±5", "5"), ("5 %", "5"), ("$5", "5"), ("5°", "5"), ("~5", "5")],
        *[(".5", "5"), ("5!", "5"), ("(5)", "5"), ("5'", "5"), ("3.14", "314"), ("3.14", "3-14"), ("1/2", "12")],
        *[("1,000", "1000"), ("1,5", "15"), ("10:30", "1030"), ("3²", "32"), ("1½", "11/2"), ("|5|", "5")],
        *[("C#", "C"), ("C++", "C"), (".NET", "NET"), ("not-a", "not a"), ("!p", "p"), ("¬p", "p"), ("<", ">")],
        *[("__init__", "init"), ("f(x)", "fx"), ("a_b", "ab"), ("[a]", "a"), ("😀", "😡"), ("", "...")],
    ],
)
def test_what_a_sign_tells_apart_is_not_equal(answer, right):
    assert one(answer, right, [right, "another"]) == INVALID
    if answer:
        assert one(answer, right, [right, answer]) == WRONG
        assert one(answer, answer, [right, answer]) == RIGHT


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        *[("World.", "World"), ("world", "World"), ("**World**", "World"), ('"World".', "World"), ("great!", "Great")],
        *[("(A)", "A"), ("A.", "A"), ("5.", "5"), (" science or  technology", "Science or Technology")],
        *[("cafe\u0301", "café"), ("café", "cafe\u0301"), ("１２", "12"), ("ＹＥＳ", "yes"), ("STRASSE", "Straße")],
        *[("first\nsecond", "first second"), ("first\r\nsecond", "first\nsecond"), ("是。", "是"), (":)", ":)")],
    ],
)
def test_what_a_form_changes_is_equal(answer, right):
    assert one(answer, right, [right, "another"]) == RIGHT


@given(st.lists(TEXTS, min_size=2, max_size=4))
def test_two_labels_are_never_equal(labels):
    exact = {unicodedata.normalize("NFC", label).strip() for label in labels}
    assume(len(exact) == len(labels) and "" not in exact)
    for answer in labels:
        for right in labels:
            assert one(answer, right, labels) == (RIGHT if answer == right else WRONG)
            # Whatever stands around a label does not make another one of it.
            assert one(f" {answer}\n", right, labels) == (RIGHT if answer == right else WRONG)


@given(st.lists(TEXTS, min_size=2, max_size=4))
def test_a_label_is_equal_to_its_other_forms(labels):
    assume(all(label.strip() for label in labels))
    exact = [unicodedata.normalize("NFC", label).strip() for label in labels]
    assume(len({*exact}) == len(labels))
    caseless = [unicodedata.normalize("NFC", unicodedata.normalize("NFKD", label).casefold()) for label in labels]
    apart = len({" ".join(label.split()) for label in caseless}) == len(labels)
    for label in labels:
        for form in ("NFC", "NFD"):
            assert one(unicodedata.normalize(form, label), label, labels) == RIGHT
        if apart and label.casefold() == label.lower():
            for other in (label.casefold(), label.upper(), label.swapcase()):
                if other.casefold() == label.casefold():
                    assert one(other, label, labels) == RIGHT


@given(TEXTS)
def test_normalised_is_stable(text):
    once = normalised(text)
    assert normalised(once) == once == normalised(f"  {text} ")


def test_labels_that_differ_in_case_alone_need_their_own_case():
    labels = ["Positive", "positive", "negative"]
    assert score(["positive", "POSITIVE", "Negative"], ["Positive", "positive", "negative"], labels) == (1 / 3, 1 / 3)


def test_a_right_answer_that_is_no_label_is_refused():
    with pytest.raises(ConfigError, match=r"right[\s\S]*one of yes, no[\s\S]*maybe"):
        score(["maybe"], ["maybe"], ["yes", "no"])


@pytest.fixture
def task_of(tmp_path):
    def make(outputs, *, dev=None, labels=None, name="own"):
        for part, texts in (("train", outputs), ("dev", dev or outputs)):
            rows = [{"input": f"question {i}:", "output": output} for i, output in enumerate(texts)]
            (tmp_path / f"{name}.{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        entry = {"train": f"{tmp_path}/{name}.train.jsonl", "dev": f"{tmp_path}/{name}.dev.jsonl", "name": name}
        entry |= {"labels": labels} if labels else {}
        return read_task(entry, SequenceSettings(model="m", tasks=[entry], out="o"))

    return make


@pytest.mark.parametrize(
    "labels", [["5", "-5"], ["C", "C#", "C++"], ["<", "=", ">"], ["😀", "😡"], ["yes!", "yes?"], ["a b", "a  b"]]
)
def test_labels_of_marks_can_be_used(task_of, labels):
    assert task_of(labels).labels == tuple(sorted(labels))


def test_labels_that_are_easily_confused_are_named(task_of, caplog):
    with caplog.at_level(logging.WARNING, "gere.continual"):
        assert task_of(["Positive", "positive", "negative"]).labels == ("Positive", "negative", "positive")
    assert "'Positive' and 'positive'" in caplog.text and "list of its labels" in caplog.text
    caplog.clear()
    task = task_of(["Positive", "positive", "negative"], labels=["positive", "negative"])
    assert task.labels == ("positive", "negative") and not caplog.text
    assert score(["positive"] * 2, [row.output for row in task.dev[:2]], task.labels) == RIGHT


def test_spellings_of_a_label_in_space_and_unicode_are_one_label(task_of):
    nfd = unicodedata.normalize("NFD", "café")
    assert task_of(["yes", "yes", "yes ", "no", nfd, nfd, "café"]).labels == (nfd, "no", "yes")


def test_empty_labels_and_strange_outputs_are_refused(task_of):
    with pytest.raises(ConfigError, match="labels with text"):
        task_of(["yes", " "])
    with pytest.raises(ConfigError, match=r"outputs of own[\s\S]*one of 5, 7[\s\S]*-5"):
        task_of(["5", "7"], dev=["-5"], labels=[5, 7])


# Answers of models


def says(model, tokenizer, text):
    """Make a model write a text after any prompt, and the end of text after it."""
    script = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    step = [0]

    def forward(module, args, output):
        output.logits[:] = 0
        output.logits[..., script[min(step[0], len(script) - 1)]] = 1
        step[0] += 1
        return output

    model.register_forward_hook(forward)
    return len(script)


@pytest.mark.parametrize(
    ("text", "lines", "expected"),
    [
        (" one\ntwo\nthree", 1, "one"),
        (" one\ntwo\nthree", 2, "one\ntwo"),
        (" one\n\ntwo\nthree", 3, "one\n\ntwo"),
        (" one", 3, "one"),
        (" a . b , c", 1, "a . b , c"),
    ],
)
def test_an_answer_has_as_many_lines_as_the_longest_label(tokenizer, text, lines, expected):
    model = load_tiny()
    most = says(model, tokenizer, text)
    prompts = [tokenizer("say:")["input_ids"]] * 3
    assert greedy_answers(model, tokenizer, prompts, most, lines=lines) == [expected] * 3


@pytest.mark.slow
@pytest.mark.parametrize("answers", ["greedy", "likelihood"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_task_learned_by_heart_has_no_wrong_answer(tmp_path, answers, form):
    """Answers of two lines, and labels that the tokenizer writes in another Unicode form, as Qwen's does."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    load_tiny().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    outputs = [unicodedata.normalize(form, text) for text in ("café\nnoir", "thé")]
    for part, rows in (("train", 64), ("dev", 6)):
        lines = [{"input": f"say {i % 2}:", "output": outputs[i % 2]} for i in range(rows)]
        (tmp_path / f"t.{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    training = {"per_device_train_batch_size": 8, "num_train_epochs": 6, "learning_rate": 1e-2, "use_cpu": True}
    training |= {"report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    settings = {"model": str(tmp_path / "base"), "tasks": ["t"], "task_dir": str(tmp_path), "before": False}
    matrix = run({**settings, "out": str(tmp_path / "out"), "answers": answers, "training": training})
    assert (matrix.accuracy, matrix.invalid) == ([[1.0]], [[0.0]])


def test_a_label_that_no_answer_can_stand_for_is_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    load_tiny().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for part in ("train", "dev"):
        lines = [{"input": "say:", "output": output} for output in ("Yes", "yes", "No")]
        (tmp_path / f"t.{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for answers in ("greedy", "likelihood"):
        settings = {"model": str(tmp_path / "base"), "tasks": ["t"], "task_dir": str(tmp_path), "answers": answers}
        with pytest.raises(ConfigError, match=r"labels of t[\s\S]*keeps apart[\s\S]*'yes': 'Yes'"):
            run({**settings, "out": str(tmp_path / answers), "training": {"use_cpu": True}})


def test_a_broken_model_chooses_no_label(tokenizer):
    model = load_tiny()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    options = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" good", " bad")]
    assert likeliest_answers(model, tokenizer, [tokenizer("say:")["input_ids"]] * 2, options) == [None, None]
    assert score([None, "bad"], ["good", "bad"], ["good", "bad"]) == (0.5, 0.5)
