"""Held-out texts, the line at the start and the answer at the end: what is said of forgetting without being asked."""

from __future__ import annotations

import json
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_tiny
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import default_compute_objective

from gere import GeneralAbilityCallback, GeReConfig, GeReTrainer, gere_trainer
from gere.cache.heldout import held_out
from gere.errors import ConfigError, ReplaySetError
from gere.evaluation.general import change_of, general_loss
from gere.metrics import student_t
from gere.replay import load_replay_set, load_texts

HALF = {"replay_heldout": 2}  # of 24 texts
NAMES = ["general/loss", "general/change", "general/change_interval"]


def entries(trainer, name):
    return [log for log in trainer.state.log_history if name in log]


# Which texts are held out


@given(st.lists(st.text(st.characters(categories=["L"]), min_size=1, max_size=2), max_size=200), st.integers(0, 80))
def test_held_out_texts_come_once_and_are_at_most_a_tenth(texts, most):
    places = held_out(texts, most)
    assert places == sorted(set(places))
    assert len(places) <= min(most, len(texts) // 10)
    assert all(texts.count(texts[place]) == 1 for place in places)


def test_held_out_texts_are_never_among_the_replayed(tokenizer, tmp_path):
    texts = [f"Text number {number} of the set." for number in range(1000)]
    replay = load_replay_set(GeReConfig(replay_dataset=texts), tokenizer, tmp_path)
    assert (len(replay.rows), len(replay.heldout)) == (936, 64)
    assert not {*map(tuple, replay.rows)} & {*map(tuple, replay.heldout)}
    ids = tokenizer(texts)["input_ids"]
    assert sorted(replay.rows + replay.heldout) == sorted(ids)
    places = sorted(ids.index(row) for row in replay.heldout)
    assert max(np.diff(places)) <= 16, "spread over the whole set"


def test_texts_of_the_user_are_measured_in_place_of_a_part(tokenizer, tmp_path, general, caplog):
    file = tmp_path / "mine.jsonl"
    mine = [*general[:3], "A text that nobody replays.", "Another one of that kind.", "Another one of that kind."]
    file.write_text("\n".join(json.dumps({"text": text}) for text in mine))
    config = GeReConfig(replay_dataset=general, heldout_dataset=str(file))
    replay = load_replay_set(config, tokenizer, tmp_path)
    assert len(replay.rows) == len(general)
    assert replay.heldout == tokenizer(mine[3:5])["input_ids"]
    assert "heldout_dataset: 4 of 6 texts are replayed or come twice" in caplog.text
    with pytest.raises(ReplaySetError, match=r"heldout_dataset[\s\S]*Leave heldout_dataset out"):
        load_replay_set(GeReConfig(replay_dataset=general, heldout_dataset=general), tokenizer, tmp_path)
    with pytest.raises(ReplaySetError, match=r"gere_config\.heldout_dataset"):
        load_replay_set(GeReConfig(replay_dataset=general, heldout_dataset=[None, ""]), tokenizer, tmp_path)
    with pytest.raises(ConfigError, match="heldout_dataset"):
        GeReConfig(heldout_dataset="self")
    with pytest.raises(ConfigError, match="replay_heldout"):
        GeReConfig(heldout_dataset=general, replay_heldout=0)


# What is measured


def by_hand(model, tokenizer, texts, length=48):
    """Mean over the texts of the loss that transformers computes, a text at a time."""
    losses = []
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"][:length]])
            losses.append(model.eval()(input_ids=ids, labels=ids).loss.item())
    return losses


def test_change_is_that_of_the_held_out_texts(measuring_trainer, tokenizer, general):
    held = [general[place] for place in held_out(general, 64)]
    before = by_hand(load_tiny(), tokenizer, held)
    trainer = measuring_trainer()
    trainer.train()
    after = by_hand(trainer.model, tokenizer, held)
    (log,) = entries(trainer, "general/change")
    changes = np.array(after) - np.array(before)
    half = student_t(0.95, 1) * changes.std(ddof=1) / math.sqrt(2)
    expected = [np.mean(after), changes.mean(), half]
    np.testing.assert_allclose([log[name] for name in NAMES], expected, rtol=1e-4, atol=1e-5)


def test_an_untouched_model_has_not_changed_by_a_bit(measuring_trainer, arguments):
    trainer = measuring_trainer(args=arguments(learning_rate=0.0, max_steps=1))
    trainer.train()
    (log,) = entries(trainer, "general/change")
    assert log["general/change"] == log["general/change_interval"] == 0.0


def test_a_set_that_is_too_small_says_that_nothing_is_known(measuring_trainer, general):
    trainer = measuring_trainer(config={"replay_dataset": general[:9]})
    trainer.train()
    assert not entries(trainer, "general/change")
    assert "not known, since no texts were held out" in trainer.replay.summary()


def test_interval_of_one_text_is_nan_and_of_many_is_paired():
    assert math.isnan(change_of([2.0], [1.0]).interval)
    found = change_of([1.0, 5.0, 9.0], [0.5, 4.5, 8.5])
    assert found == (5.0, 0.5, 0.0, 3)


def test_general_loss_is_a_mean_over_texts(model, tokenizer, general):
    expected = np.mean(by_hand(model, tokenizer, general, 48))
    assert general_loss(model, tokenizer, general, max_length=48) == pytest.approx(expected, abs=1e-5)


# The contract of Trainer


def test_metrics_of_an_evaluation_choose_the_best_model(measuring_trainer, arguments, task):
    args = arguments(
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_general/change",  # of which less is better, unlike transformers takes it
    )
    trainer = measuring_trainer(args=args, eval_dataset=task[:4])
    trainer.train()
    evaluated = entries(trainer, "eval_general/change")
    assert all(log["general/change"] == log["eval_general/change"] for log in evaluated), "in one entry"
    assert [log["step"] for log in evaluated] == [2, 4, 6]
    assert trainer.state.best_metric == min(log["eval_general/change"] for log in evaluated)
    # The answer at the end is of the model that was loaded.
    assert entries(trainer, "general/change")[-1]["general/change"] == trainer.state.best_metric
    metrics = trainer.evaluate()
    assert metrics["eval_general/change"] == trainer.state.best_metric
    assert not [name for name in trainer.predict(task[:4]).metrics if "general" in name]


def test_a_search_looks_at_the_evaluation_loss_alone(measuring_trainer, task):
    trainer = measuring_trainer(
        eval_dataset=task[:4], callbacks=[GeneralAbilityCallback(texts=["A text.", "Another."])]
    )
    trainer.train()
    trainer.hp_search_backend = "optuna"
    metrics = trainer.evaluate()
    assert default_compute_objective(dict(metrics)) == metrics["eval_loss"]


def test_metrics_of_trl_stay_in_its_evaluation(measuring_trainer, general, tmp_path, tokenizer):
    trl = pytest.importorskip("trl")
    args = trl.SFTConfig(
        str(tmp_path / "out"),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_mean_token_accuracy",
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    rows = Dataset.from_dict({"text": general})
    trainer = gere_trainer(trl.SFTTrainer)(
        model=load_tiny(),
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        gere_hidden_state_saving_dir=tmp_path / "gere_saving",
        gere_config=GeReConfig(replay_dataset=general, max_length=48),
    )
    trainer.train()
    logs = entries(trainer, "eval_mean_token_accuracy")
    assert len(logs) == 2 and all("general/change" in log for log in logs)


def test_early_stopping_by_what_is_forgotten(measuring_trainer, arguments, task):
    args = arguments(
        max_steps=8,
        learning_rate=0.0,  # nothing gets better
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_general/change",
    )
    trainer = measuring_trainer(args=args, eval_dataset=task[:4], callbacks=[EarlyStoppingCallback(2)])
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("cls", [Trainer, GeReTrainer])
def test_a_callback_gives_its_values_to_the_metrics_too(measuring_trainer, arguments, task, general, cls):
    args = arguments(
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_general/change",
    )
    ability = GeneralAbilityCallback(texts=general[:3])
    trainer = measuring_trainer(cls, args=args, eval_dataset={"one": task[:4], "two": task[4:6]}, callbacks=[ability])
    trainer.train()
    assert trainer.state.best_metric is not None
    measured = entries(trainer, "general/change")
    assert [log["step"] for log in measured] == [0, 2, 4, 4][1:], "once for both sets, and again for the best model"
    assert measured[0]["general/change"] == pytest.approx(measured[0]["general/loss_change"])
    assert measured[0]["general/change_interval"] > 0


def test_several_evaluation_sets_are_measured_once(measuring_trainer, arguments, task):
    trainer = measuring_trainer(
        args=arguments(max_steps=1, eval_strategy="steps", eval_steps=1),
        eval_dataset={"one": task[:4], "two": task[4:8]},
    )
    calls = count_calls(trainer)
    trainer.train()
    logs = entries(trainer, "eval_general/change")
    assert len(logs) == 2 and logs[0]["eval_general/change"] == logs[1]["eval_general/change"]
    # Two batches of the evaluation sets; 2 texts in one batch, after three calls on one row that check the model.
    assert calls["eval"] - calls["build"] <= 2 + 1 + 3


def count_calls(trainer):
    """Count forward passes of the decoder with gradients, without, and without before the first step."""
    counts = {"train": 0, "eval": 0, "build": 0}

    def count(*_):
        counts["train" if torch.is_grad_enabled() else "eval"] += 1

    class AtStart(TrainerCallback):
        def on_train_begin(self, *args, **keywords):
            counts["build"] = counts["eval"]

    trainer.model.model.register_forward_hook(count)
    trainer.add_callback(AtStart())
    return counts


def test_cost_is_one_pass_over_the_texts_at_the_end(measuring_trainer, arguments):
    texts = [f"{'A text that is held out or replayed. ' * 3}{number}" for number in range(200)]
    trainer = measuring_trainer(args=arguments(max_steps=5), config={"replay_dataset": texts})
    calls = count_calls(trainer)
    trainer.train()
    rows = 20
    per_batch = 512 // 48  # a CPU takes 512 padded tokens at a time
    look = 2  # at where the states come out of the model
    assert calls["eval"] - calls["build"] <= math.ceil(rows / per_batch) + 3
    again = measuring_trainer(args=arguments(max_steps=5), config={"replay_dataset": texts})
    calls = count_calls(again)
    again.train()
    assert calls["build"] == look, "the losses of the base model are in the anchor"


def test_a_resumed_training_measures_the_same(measuring_trainer, arguments, tmp_path):
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = measuring_trainer(args=arguments(**args))
    whole.train()
    resumed = measuring_trainer(args=arguments(**args))
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    found = [[entries(one, "general/change")[-1][name] for name in NAMES] for one in (whole, resumed)]
    assert found[0] == found[1]
    assert whole.replay.summary() == resumed.replay.summary()


# What is said


def test_start_and_end_say_it_once(measuring_trainer, caplog):
    caplog.set_level(logging.INFO, "gere")
    trainer = measuring_trainer(replay="auto")
    trainer.train()
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("gere:")]
    key, folder = trainer.replay.anchor.key, trainer.replay.folder
    assert said[0] == (
        f"gere: anchor {key} built in {folder}; 1 of 8 rows in each step is a replay row (12.5 %), from 22 texts; "
        "2 texts are held out; 3 steps."
    )
    assert said[1] == f"gere: {trainer.replay.summary()}" and len(said) == 2
    assert trainer.state.log_history[-1]["gere/summary"] == trainer.replay.summary()
    caplog.clear()
    measuring_trainer(replay="auto").train()
    assert f"anchor {key} opened in" in caplog.text


def test_steps_of_an_epoch_are_compared_to_those_of_the_plain_trainer(measuring_trainer, arguments, caplog, task):
    caplog.set_level(logging.INFO, "gere")
    trainer = measuring_trainer(args=arguments(max_steps=-1, num_train_epochs=1), replay=2)
    trainer.train()
    plain = measuring_trainer(Trainer, args=arguments(max_steps=-1, num_train_epochs=1))
    plain.train()
    assert f"{trainer.state.global_step} steps ({plain.state.global_step} without replay)" in caplog.text


SENTENCES = {
    0.5: "Forgot: general loss 3.000 -> 3.500, +0.500 nats (95 % interval +0.400 to +0.600)",
    0.05: "Unclear: general loss 3.000 -> 3.050, +0.050 nats (95 % interval -0.050 to +0.150)",
    -0.2: "Kept: general loss 3.000 -> 2.800, -0.200 nats (95 % interval -0.300 to -0.100)",
}


@pytest.mark.parametrize(("change", "words"), SENTENCES.items())
def test_summary_is_a_sentence(measuring_trainer, arguments, change, words):
    trainer = measuring_trainer(args=arguments(logging_steps=3))
    trainer.train()
    first = entries(trainer, "gere/first_task_loss")[0]
    assert first["gere/first_task_loss"] > first["gere/task_loss"] > 0
    trainer.state.log_history += [
        dict(zip(NAMES, (3.0 + change, change, 0.1), strict=True)),
        {"general/sciq": 0.7, "general/sciq_se": 0.03},
        {"general/sciq": 0.6, "general/sciq_se": 0.04},
    ]
    summary = trainer.replay.summary()
    assert f"{words} on 2 texts that were never replayed." in summary
    assert ("Try gere_config.base_decay=0.7, or a lower learning_rate than 0.001." in summary) == (change > 0.1)
    assert f"Task loss {first['gere/first_task_loss']:.3f} in the first step" in summary
    assert "sciq                 0.700 -> 0.600 ± 0.040" in summary


def test_task_loss_of_the_first_step_is_that_of_a_log_at_each_step(measuring_trainer, arguments):
    each, once = (measuring_trainer(args=arguments(logging_steps=steps)) for steps in (1, 3))
    each.train()
    once.train()
    assert entries(once, "gere/first_task_loss")[0]["gere/first_task_loss"] == pytest.approx(
        entries(each, "gere/task_loss")[0]["gere/task_loss"]
    )
    assert len(entries(each, "gere/first_task_loss")) == 1


def test_lines_are_seen_where_nobody_configured_logging(monkeypatch, capsys, measuring_trainer):
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.getLogger("gere"), "handlers", [])
    measuring_trainer().train()
    assert capsys.readouterr().err.count("gere: ") == 2
    logging.root.addHandler(logging.NullHandler())
    measuring_trainer().train()
    assert "gere: " not in capsys.readouterr().err, "who has configured logging decides"


def test_model_card_says_what_was_kept(measuring_trainer, tmp_path):
    trainer = measuring_trainer()
    trainer.train()
    trainer.create_model_card()
    assert trainer.replay.summary() in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_trackers_get_the_settings(measuring_trainer):
    seen = {}

    class WandbCallback(TrainerCallback):
        _wandb = SimpleNamespace(
            run=1, config=SimpleNamespace(update=lambda values, allow_val_change: seen.update(wandb=values))
        )

    class TensorBoardCallback(TrainerCallback):
        tb_writer = SimpleNamespace(add_text=lambda name, text: seen.update(board={name: json.loads(text)}))

    class MLflowCallback(TrainerCallback):
        _initialized = True
        _ml_flow = SimpleNamespace(log_params=lambda values: seen.update(mlflow=values))

    callbacks = [WandbCallback(), TensorBoardCallback(), MLflowCallback(), PrinterCallback()]
    trainer = measuring_trainer(callbacks=callbacks)
    trainer.train()
    assert seen["wandb"]["gere"] == seen["board"]["gere"]
    assert seen["wandb"]["gere"]["anchor"] == trainer.replay.anchor.key
    assert seen["wandb"]["gere"]["replay_dataset"] == "list of 24"
    assert seen["mlflow"]["gere/max_length"] == "48"


def test_old_names_stay_for_one_release(measuring_trainer, caplog):
    caplog.set_level(logging.INFO, "gere")
    trainer = measuring_trainer()
    trainer.train()
    assert caplog.text.count("gere/forgetting is now gere/replay_change") == 1
    for log in entries(trainer, "gere/replay_change"):
        assert log["gere/replay_change"] == log["gere/forgetting"]


# Rows of a step


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [("auto", 1), (0.5, 4), ("0.25", 2), ("3", 3), (np.int64(2), 2), (np.float32(0.25), 2), (None, 0), ("none", 0)],
)
def test_replay_rows_of_a_step(measuring_trainer, wanted, rows):
    assert measuring_trainer(replay=wanted).replay.rows_per_step == rows


@pytest.mark.parametrize("wanted", [1.5, -1, "many", True, math.nan, "1.5"])
def test_other_numbers_of_rows_are_refused(measuring_trainer, wanted):
    with pytest.raises(ConfigError, match="num_interpolate_per_batch"):
        measuring_trainer(replay=wanted)


def test_a_share_is_that_of_the_paper_in_a_step_of_64(measuring_trainer, arguments):
    trainer = measuring_trainer(replay="auto", args=arguments(per_device_train_batch_size=32))
    assert trainer.replay.rows_per_step == 4


def test_a_step_of_one_row_gets_a_replay_row_beside_it(measuring_trainer, arguments, caplog):
    args = arguments(per_device_train_batch_size=1, gradient_accumulation_steps=1)
    trainer = measuring_trainer(replay="auto", args=args)
    trainer.train()
    assert "gets 1 replay rows beside its task rows" in caplog.text
    assert all("gere/ce" in log and "gere/task_loss" in log for log in entries(trainer, "loss"))


def test_more_than_half_is_warned_of(measuring_trainer, caplog):
    measuring_trainer(replay=0.5).get_train_dataloader()
    assert "more than half" not in caplog.text
    measuring_trainer(replay=5).get_train_dataloader()
    assert "5 of the 8 rows of each step are replay rows, more than half" in caplog.text


# Texts from the hub


def test_without_a_network_the_error_comes_at_once_and_names_self_first(tmp_path, monkeypatch):
    import datasets

    def never(*args, **keywords):
        raise AssertionError("the library tries for half a minute")

    monkeypatch.setattr(datasets, "load_dataset", never)
    with pytest.raises(ReplaySetError, match=r'next: [\s\S]*"self"') as caught:
        load_texts(GeReConfig(), tmp_path)
    assert str(caught.value).index('"self"') < str(caught.value).index("connect to the network")
