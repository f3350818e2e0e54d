"""What users of `Trainer` rely on, on one process."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from conftest import TINY, load_tiny
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainingArguments, Trainer, TrainerCallback
from watching import Watch, train_logs

from gere import GeReConfig, GeReSeq2SeqTrainer, GeReTrainer, gere_trainer
from gere.cache.base_model import BaseModel
from gere.errors import CacheCorruptError, CacheMismatchError, ConfigError
from gere.losses.strategy import make_strategy
from gere.model.probe import find_layout

KEYS = {"gere/ce", "gere/tm", "gere/weight", "gere/violations", "gere/forgetting", "gere/task_loss"}


class Spy(TrainerCallback):
    """Counts the rows of every optimizer step as the model sees them."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


def test_log_has_every_key_at_every_logging_step(make_trainer):
    trainer = make_trainer()
    trainer.train()
    logs = train_logs(trainer)
    assert len(logs) == 3 and all(set(log) >= KEYS for log in logs)
    others = {key for log in trainer.state.log_history if "loss" not in log for key in log}
    assert {key for key in others if key.startswith("gere/")} == {"gere/summary"}


@pytest.mark.parametrize("replay", [None, 0, 1, 3, 4, 7])
def test_exactly_k_replay_rows_in_every_step(make_trainer, arguments, task, general, replay):
    trainer = make_trainer(args=arguments(max_steps=-1, num_train_epochs=2), replay=replay)
    watch = Watch(trainer, general)
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == len(watch.counts)
    if replay:
        assert watch.counts == [(8 - replay, replay)] * (2 * -(-len(task) // (8 - replay)))
    else:
        assert all(sum(counts) == 8 for counts in watch.counts)
        assert sum(counts[1] for counts in watch.counts) == 2 * len(general)
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-9)


def test_what_is_known_of_the_replay(make_trainer, general):
    trainer = make_trainer(w=2.0, replay=3)
    before = trainer.replay
    assert before.active and before.rows_per_step == 3 and before.anchor is before.texts is before.weight is None
    trainer.train()
    assert trainer.replay.anchor.folder.parent == trainer.replay.folder == before.folder
    assert trainer.replay.texts == len(general) and trainer.replay.weight == 2.0
    assert not make_trainer(config={"replay_strategy": "none"}).replay.active


def test_evaluate_predict_and_metrics(make_trainer, task):
    def metrics(prediction):
        return {"accuracy": float((prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]).mean())}

    trainer = make_trainer(eval_dataset=task[:6], compute_metrics=metrics)
    plain = make_trainer(Trainer, eval_dataset=task[:6], compute_metrics=metrics)
    ours, theirs = trainer.evaluate(), plain.evaluate()
    assert ours["eval_loss"] == theirs["eval_loss"] and ours["eval_accuracy"] == theirs["eval_accuracy"]
    trainer.train()
    predicted = trainer.predict(task[:5])
    assert predicted.predictions.shape[0] == 5 and "test_loss" in predicted.metrics


def test_evaluation_during_training_and_best_model(make_trainer, arguments, task):
    args = arguments(
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, max_steps=6,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", learning_rate=5e-3,
    )  # fmt: skip
    trainer = make_trainer(args=args, eval_dataset=task[:8])
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(losses) == 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("kind", ["datasets", "torch", "list"])
def test_kinds_of_datasets_with_extra_columns(make_trainer, arguments, task, tokenizer, remove, kind):
    rows = [{**row, "note": f"row {index}", "weight": index} for index, row in enumerate(task[:16])]

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            return rows[index]

    dataset = {"datasets": Dataset.from_list(rows), "torch": Rows(), "list": rows}[kind]
    seen = []

    def collate(features):
        seen.extend(set(feature) for feature in features)
        kept = [{key: row[key] for key in ("input_ids", "attention_mask", "labels")} for row in features]
        return DataCollatorForSeq2Seq(tokenizer)(kept)

    trainer = make_trainer(args=arguments(remove_unused_columns=remove), train_dataset=dataset, data_collator=collate)
    trainer.train()
    extra = set() if remove else {"note", "weight"}
    assert all(names == {"input_ids", "attention_mask", "labels"} | extra for names in seen)
    assert trainer.train_dataset is dataset and trainer.data_collator is collate


def test_nothing_of_the_users_is_changed(make_trainer, arguments, tokenizer, task):
    own = copy.deepcopy(tokenizer)
    own.padding_side = "left"
    own(["some text"], truncation=True, max_length=5, padding="max_length")  # leaves its state in the tokenizer
    args, callbacks = arguments(), [Spy()]
    rows = copy.deepcopy(task)
    dataset = Dataset.from_list(rows)

    def looks():
        return args.to_dict(), own.backend_tokenizer.to_str(), own.padding_side, own.pad_token, dataset.column_names

    before = copy.deepcopy(looks())
    make_trainer(args=args, processing_class=own, callbacks=callbacks, train_dataset=dataset).train()
    assert looks() == before and len(callbacks) == 1 and callbacks[0].steps == [1, 2, 3]
    assert dataset.to_list() == Dataset.from_list(task).to_list()


def test_group_by_length(make_trainer, arguments, task):
    try:
        args = arguments(train_sampling_strategy="group_by_length")
    except TypeError:
        args = arguments(group_by_length=True)
    trainer = make_trainer(args=args)
    trainer.train()
    assert trainer.state.global_step == 3
    order = [
        row
        for batch in trainer.get_train_dataloader()
        for row in ([] if batch.task is None else batch.task["attention_mask"])
    ]
    lengths = [int(mask.sum()) for mask in order][: len(task)]
    jumps = sum(abs(a - b) for a, b in itertools.pairwise(lengths))
    plain = [len(row["input_ids"]) for row in task]
    assert sorted(lengths) == sorted(plain)
    assert jumps < sum(abs(a - b) for a, b in itertools.pairwise(plain))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(make_trainer, arguments, reentrant):
    checkpointed = make_trainer(
        args=arguments(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}),
        replay=3,
    )
    plain = make_trainer(args=arguments(), replay=3)
    for trainer in (checkpointed, plain):
        trainer.train()
    for ours, theirs in zip(train_logs(checkpointed), train_logs(plain), strict=True):
        assert ours["gere/tm"] == pytest.approx(theirs["gere/tm"], rel=1e-4, abs=1e-7)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_bf16(make_trainer, arguments):
    trainer = make_trainer(args=arguments(bf16=True))
    trainer.train()
    assert "mixed precision bf16" in trainer.replay.anchor.fields["dtype"]
    assert all(torch.isfinite(torch.tensor(log["loss"])) for log in train_logs(trainer))


def test_model_init(make_trainer, tokenizer, task, general, tmp_path, arguments):
    trainer = GeReTrainer(
        model_init=load_tiny, args=arguments(), train_dataset=task, data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer, gere_hidden_state_saving_dir=tmp_path / "gere_saving", num_interpolate_per_batch=2,
        gere_config=GeReConfig(replay_dataset=general, max_length=48),
    )  # fmt: skip
    for _ in range(2):
        trainer.train()
        assert train_logs(trainer)[0]["gere/tm"] == 0.0


def test_positional_arguments_and_tokenizer(tokenizer, task, general, tmp_path, arguments):
    settings = {
        "gere_hidden_state_saving_dir": tmp_path / "gere_saving",
        "gere_config": GeReConfig(replay_dataset=general, max_length=48),
    }
    collator = DataCollatorForSeq2Seq(tokenizer)
    trainer = GeReTrainer(load_tiny(), arguments(), collator, task, task[:4], tokenizer, **settings)
    trainer.train()
    assert "eval_loss" in trainer.evaluate()
    named = GeReTrainer(load_tiny(), arguments(), collator, task, tokenizer=tokenizer, **settings)
    assert named.processing_class is tokenizer


def test_workers_of_the_data_loader(make_trainer, arguments):
    logs = []
    for workers in (0, 2):
        trainer = make_trainer(args=arguments(dataloader_num_workers=workers))
        trainer.train()
        logs.append([(log["loss"], log["gere/tm"]) for log in train_logs(trainer)])
    assert logs[0] == logs[1]


def test_seq2seq_trainer_and_any_other(make_trainer, tokenizer, task, general, tmp_path):
    class Own(Trainer):
        calls = 0

        def compute_loss(self, model, inputs, *args, **kwargs):
            self.calls += 1
            assert "labels" in inputs
            return super().compute_loss(model, inputs, *args, **kwargs)

    args = Seq2SeqTrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=4, max_steps=2, report_to=[], use_cpu=True,
        save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    for cls in (GeReSeq2SeqTrainer, gere_trainer(Own)):
        trainer = cls(
            model=load_tiny(), args=args, train_dataset=task, data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer, num_interpolate_per_batch=2,
            gere_hidden_state_saving_dir=tmp_path / "gere_saving",
            gere_config=GeReConfig(replay_dataset=general, max_length=48),
        )  # fmt: skip
        trainer.train()
        assert set(train_logs(trainer)[-1]) >= KEYS
    assert cls.__name__ == "GeReOwn" and trainer.calls == 2


def test_tokens_seen_count_task_rows_alone(make_trainer, arguments, general):
    trainer = make_trainer(args=arguments(include_num_input_tokens_seen="all", max_steps=1), replay=3)
    watch = Watch(trainer, general)
    trainer.train()
    calls = [call for call in watch.steps[0] if call.rows[0] not in watch.replay_set]
    assert trainer.state.num_input_tokens_seen == sum(call.padded for call in calls) > 0
    assert trainer.state.total_flos > 0


class OwnLossAndOrder(GeReTrainer):
    """A class derived from ours, whose loss and sampler know task rows alone and never ask the class below."""

    def compute_loss(self, model, inputs, return_outputs=False, **keywords):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        losses = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=-100
        )
        return (losses, outputs) if return_outputs else losses

    def _get_train_sampler(self, *arguments):
        return SequentialSampler(self.train_dataset)


def test_a_loss_and_a_sampler_before_the_replay_see_task_rows_alone(make_trainer, task, monkeypatch):
    trainer = make_trainer(OwnLossAndOrder, replay=3, eval_dataset=task[:4])
    trainer.model_accepts_loss_kwargs = False
    rows, collate = [], trainer.data_collator
    trainer.data_collator = lambda batch: rows.extend(batch) or collate(batch)
    trainer.train()
    assert rows[:15] == task[:15] and trainer.evaluate()["eval_loss"] > 0
    assert set(train_logs(trainer)[-1]) >= KEYS


def test_model_init_that_gives_another_base_is_refused(make_trainer, tokenizer, task, general, tmp_path, arguments):
    made = []

    def other_each_time():
        model = load_tiny()
        if len(made) > 1:  # one call in __init__, one in each train()
            with torch.no_grad():
                next(model.parameters()).add_(1e-3)
        made.append(model)
        return model

    trainer = GeReTrainer(
        model_init=other_each_time, args=arguments(), train_dataset=task, processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer), gere_hidden_state_saving_dir=tmp_path / "gere_saving",
        gere_config=GeReConfig(replay_dataset=general, max_length=48),
    )  # fmt: skip
    trainer.train()
    with pytest.raises(CacheMismatchError, match="weights"):
        trainer.train()


@pytest.mark.parametrize("replay", [2, 0.5])
def test_auto_find_batch_size(make_trainer, arguments, monkeypatch, general, replay):
    trainer = make_trainer(args=arguments(auto_find_batch_size=True), replay=replay)
    watch = Watch(trainer, general)
    compute, tried = Trainer.compute_loss, []

    def too_large(self, model, inputs, *rest, **keywords):
        tried.append(self._train_batch_size)
        if self._train_batch_size > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return compute(self, model, inputs, *rest, **keywords)

    monkeypatch.setattr(Trainer, "compute_loss", too_large)
    trainer.train()
    assert tried[0] == 4 and tried[-1] < 4 and trainer.state.global_step == 3
    rows = 2 if replay == 2 else tried[-1]  # a share follows the batch
    assert watch.counts[-1] == (2 * tried[-1] - rows, rows) and train_logs(trainer)[0]["gere/tm"] == 0.0


def test_second_training_of_one_trainer_keeps_the_anchor(make_trainer):
    trainer = make_trainer()
    trainer.train()
    anchor = trainer.replay.anchor
    trainer.train()
    assert trainer.replay.anchor is anchor
    assert train_logs(trainer)[0]["gere/tm"] > 0, "the model has moved, the anchor has not"


def test_saved_model_names_its_anchor_and_a_later_task_finds_it(make_trainer, tmp_path):
    from transformers import AutoModelForCausalLM

    first = make_trainer()
    first.train()
    first.save_model(str(tmp_path / "task-1"))
    named = json.loads((tmp_path / "task-1" / "gere_anchor.json").read_text())
    assert named["anchor"] == first.replay.anchor.key
    later = make_trainer(model=AutoModelForCausalLM.from_pretrained(tmp_path / "task-1", dtype=torch.float32))
    later.train()
    assert later.replay.anchor.key == first.replay.anchor.key
    assert train_logs(later)[0]["gere/tm"] > 0 and len(list((tmp_path / "gere_saving").glob("anchor-*"))) == 1
    moved = make_trainer(model=first.model, config={"anchor": first.replay.anchor.key})
    moved.train()
    assert moved.replay.anchor.key == first.replay.anchor.key


@pytest.mark.parametrize("key", ["../task-1", "A" * 32, "0" * 31, "0" * 32 + "\n", "", None, 7, ["0" * 32]])
def test_a_file_that_names_no_anchor_is_refused(make_trainer, model, tmp_path, key):
    """A key is a folder's name; one that leads elsewhere must not be followed."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "task-1"
    model.save_pretrained(folder)
    (folder / "gere_anchor.json").write_text(json.dumps({"format_version": 1, "anchor": key}))
    trainer = make_trainer(model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    with pytest.raises(CacheCorruptError, match=r"gere_anchor\.json[\s\S]*(32 hexadecimal digits|a text)[\s\S]*next:"):
        trainer.train()


def test_a_tuned_model_cannot_become_the_base_by_accident(make_trainer, tmp_path):
    from transformers import AutoModelForCausalLM

    first = make_trainer()
    first.train()
    first.save_model(str(tmp_path / "task-1"))

    def tuned(folder):
        return AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)

    anew = make_trainer(model=tuned("task-1"), reuse_gere_hidden_state=False)
    with pytest.raises(ConfigError, match=r"reuse_gere_hidden_state[\s\S]*without gere_anchor.json"):
        anew.train()
    without = make_trainer(model=tuned("task-1"), config={"replay_strategy": "none"})
    without.train()
    without.save_model(str(tmp_path / "task-2"))
    third = make_trainer(model=tuned("task-2"), config={"anchor": f"anchor-{first.replay.anchor.key}"})
    third.train()
    fourth = make_trainer(model=tuned("task-2"))
    fourth.train()
    assert third.replay.anchor.key == fourth.replay.anchor.key == first.replay.anchor.key
    other = make_trainer(model=tuned("task-2"), config={"max_length": 40})
    with pytest.raises(CacheMismatchError, match=r"max_length 40[\s\S]*\(this run\)[\s\S]*from the base model"):
        other.train()


def test_tiny_model_is_the_committed_one():
    assert load_tiny().num_parameters() < 200_000 and (TINY.parent / "make_llama_tiny_random.py").is_file()


def gpt2_with_dropout():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=768, n_positions=256, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.3)
    )


def base_model(model, rows) -> BaseModel:
    cpu = torch.device("cpu")
    layout = find_layout(model, rows, cpu)
    return BaseModel(model, 0, cpu, make_strategy("l2", {}, depth=layout.depth, live=False, half=False), layout)


def test_another_architecture(make_trainer):
    trainer = make_trainer(model=gpt2_with_dropout(), replay=4)
    trainer.train()
    assert trainer.replay.anchor.dim == 32
    assert trainer.replay.anchor.targets(0)["codes"].shape[-1] == 8


def test_base_model_is_evaluated_without_dropout_and_left_in_its_mode():
    model, rows = gpt2_with_dropout().train(), [[5, 6, 7, 8], [9, 10]]
    base = base_model(model, rows)
    first, second = base(rows), base(rows)
    assert model.training and model.transformer.drop.training
    states = [kept["state"] for kept in first.kept]
    assert all(torch.equal(one, two["state"]) for one, two in zip(states, second.kept, strict=True))
    assert torch.equal(first.ce, second.ce) and not states[0].requires_grad
    with torch.no_grad():
        outputs = model.eval()(torch.tensor(rows[:1]), labels=torch.tensor(rows[:1]), output_hidden_states=True)
    torch.testing.assert_close(states[0], outputs.hidden_states[-1][0])
    torch.testing.assert_close(first.ce[0], outputs.loss)


def test_scaled_or_capped_logits_are_not_taken_from_the_head_alone():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=768, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5,
    )  # fmt: skip
    model, row = Gemma2ForCausalLM(config).eval(), [5, 6, 7, 8]
    ce = base_model(model, [row])([row]).ce
    with torch.no_grad():
        expected = model(torch.tensor([row]), labels=torch.tensor([row])).loss
    torch.testing.assert_close(ce[0], expected)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("num_interpolate_per_bach", "Did you mean num_interpolate_per_batch"),
        ("replay_dataset", "belongs in GeReConfig"),
        ("gere_replay_dataset", "belongs in GeReConfig"),
    ],
)
def test_misspelled_and_misplaced_arguments_get_a_way_on(make_trainer, name, advice):
    with pytest.raises(ConfigError, match=advice):
        make_trainer(**{name: 4})


def test_an_argument_that_nobody_knows_is_left_to_the_parent(make_trainer):
    with pytest.raises(TypeError, match="nonsense"):
        make_trainer(nonsense=1)
