"""Base decay: what training moved fades back to the base weights, by the schedule, by files, bit for bit on resume."""

from __future__ import annotations

import copy
import json
import logging
import math

import pytest
import torch
from conftest import DATA, TINY, load_tiny, read_jsonl
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from gere import GeneralAbilityCallback, GeReConfig, GeReTrainer
from gere.ability import Question
from gere.blend import find_base, pulls
from gere.blend.decay import rounded
from gere.blend.trained import TrainedWeights, go_to
from gere.cache.fingerprint import weights_digest
from gere.errors import CacheMissingError, ConfigError, UnsupportedModelError
from gere.ranks import ALONE

C = 0.7


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


class MoveOnce(TrainerCallback):
    """Moves all trained weights by 1 after the first step; with a learning rate of 0 nothing else moves them."""

    def on_step_end(self, args, state, control, model=None, **keywords):
        if state.global_step == 1:
            with torch.no_grad():
                for tensor in model.parameters():
                    tensor.add_(float(tensor.requires_grad))


# The schedule


@given(st.floats(0.01, 5), st.integers(2, 30_000))
def test_pulls_fade_what_came_first_to_exp_minus_c(decay, steps):
    planned = pulls(decay, steps)
    assert math.prod(1 - part for part in planned.values()) == pytest.approx(math.exp(-decay), rel=1e-9)
    assert len(planned) == min(20, steps - 1) and all(1 <= step < steps for step in planned)
    gaps = [b - a for a, b in zip([0, *planned], [*planned, steps], strict=True)]
    assert max(gaps) - min(gaps) <= 1, "equal stretches"


@pytest.mark.parametrize(("decay", "steps"), [(0.0, 100), (0.7, 1)])
def test_nothing_to_pull(decay, steps):
    assert pulls(decay, steps) == {}


# What a pull does


@pytest.mark.parametrize("strategy", ["tm", "none"])
def test_what_was_moved_first_has_faded_at_the_end(make_trainer, arguments, strategy):
    trainer = make_trainer(
        args=arguments(max_steps=30, learning_rate=0.0),
        config={"base_decay": C, "replay_strategy": strategy},
        callbacks=[MoveOnce()],
    )
    trainer.train()
    base, now = weights(load_tiny()), weights(trainer.model)
    left = math.exp(-C)
    for name, tensor in now.items():
        torch.testing.assert_close(tensor - base[name], torch.full_like(tensor, left), atol=1e-5, rtol=1e-5)


def test_none_is_the_parent_bit_for_bit(make_trainer, arguments):
    plain = make_trainer(Trainer, args=arguments(max_steps=4))
    off = make_trainer(args=arguments(max_steps=4), config={"base_decay": 0.0, "replay_strategy": "none"})
    plain.train()
    off.train()
    theirs = weights(plain.model)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(off.model).items())


def test_a_training_with_pulls_by_hand_is_the_same(make_trainer, arguments):
    """An independent way: plain Trainer, and the base weights in memory."""

    class Pull(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **keywords):
            part = {step: 1 - math.exp(-C / 7) for step in range(1, 8)}.get(state.global_step)
            if part:
                with torch.no_grad():
                    for name, tensor in model.named_parameters():
                        tensor.copy_((1 - part) * tensor + part * base[name])

    base = weights(load_tiny())
    by_hand = make_trainer(Trainer, args=arguments(max_steps=8), callbacks=[Pull()])
    by_hand.train()
    ours = make_trainer(args=arguments(max_steps=8), config={"base_decay": C, "replay_strategy": "none"})
    ours.train()
    theirs = weights(by_hand.model)
    for name, tensor in weights(ours.model).items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=1e-5)


def test_lora_fades_as_its_product_and_modules_to_save_go_back(make_trainer, arguments):
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], bias="all", task_type="CAUSAL_LM")
    model = get_peft_model(load_tiny(), lora)
    before = weights(model)
    trainer = make_trainer(
        model=model,
        args=arguments(max_steps=30, learning_rate=0.0),
        config={"base_decay": C, "replay_strategy": "none"},
        callbacks=[MoveOnce()],
    )
    trainer.train()
    left = math.exp(-C)
    moved = set()
    for name, tensor in weights(trainer.model).items():
        change = tensor - before[name]
        expected = 0.0
        if model.get_parameter(name).requires_grad:
            expected = 1.0 if "lora_A" in name else left
            moved.add(name.split(".")[-3])
        torch.testing.assert_close(change, torch.full_like(tensor, expected), atol=1e-5, rtol=1e-5)
    assert moved == {"lora_A", "lora_B", "modules_to_save"}


def test_an_adapter_without_a_base_is_refused(make_trainer):
    model = get_peft_model(load_tiny(), IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedModelError, match="The base of a weight that is trained is not known"):
        make_trainer(model=model, config={"base_decay": C, "replay_strategy": "none"}).train()


def test_bfloat16_is_rounded_by_chance_and_right_on_average():
    value = 1.0 + 2**-10  # a quarter of a step of bfloat16 above 1
    found = rounded(torch.full((100_000,), value), torch.Generator().manual_seed(0))
    assert set(found.tolist()) == {1.0, 1.0 + 2**-7}
    assert found.float().mean().item() == pytest.approx(value, abs=1e-4)
    exact = torch.tensor([0.5, -3.0, 0.0])
    assert torch.equal(rounded(exact, torch.Generator()).float(), exact)


@pytest.mark.parametrize("decay", [-0.1, math.nan, math.inf, "much", "-1", True, None])
def test_other_values_are_refused(decay):
    with pytest.raises(ConfigError, match="base_decay"):
        GeReConfig(base_decay=decay)


# Where the base comes from


def test_files_of_the_model_are_read_and_not_copied(make_trainer, tmp_path):
    make_trainer(config={"base_decay": C}).train()
    (pointer,) = (tmp_path / "gere_saving").glob("base-*")
    assert json.loads(pointer.read_text())["file"] == str(TINY / "model.safetensors")


def test_a_model_that_comes_from_no_file_is_copied_once(make_trainer, arguments, tmp_path):
    def unnamed():
        model = load_tiny()
        model.config._name_or_path = ""
        return model

    args = {"max_steps": 30, "learning_rate": 0.0}
    for _ in range(2):
        trainer = make_trainer(
            model=unnamed(), args=arguments(**args), config={"base_decay": C}, callbacks=[MoveOnce()]
        )
        trainer.train()
        (copied,) = (tmp_path / "gere_saving").glob("base-*")
        assert copied.suffix == ".safetensors"
    name = "model.norm.weight"
    change = trainer.model.get_parameter(name) - load_tiny().get_parameter(name)
    torch.testing.assert_close(change, torch.full_like(change, math.exp(-C)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wraps", [False, True])
def test_new_rows_for_added_tokens_have_no_base_and_stay(make_trainer, arguments, wraps):
    def grown():
        torch.manual_seed(0)
        model = load_tiny()
        model.resize_token_embeddings(model.config.vocab_size + 5, mean_resizing=False)
        if not wraps:
            return model
        config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
        return get_peft_model(model, config)

    old = load_tiny().config.vocab_size
    for _ in range(2):  # the second one reads the copy that the first one made
        model = grown()
        start = model.get_input_embeddings().weight.detach().clone()
        args = arguments(max_steps=30, learning_rate=0.0)
        make_trainer(model=model, args=args, config={"base_decay": C}, callbacks=[MoveOnce()]).train()
        moved = model.get_input_embeddings().weight.detach() - start
        torch.testing.assert_close(moved[:old], torch.full_like(moved[:old], math.exp(-C)), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(moved[old:], torch.ones_like(moved[old:]))


def test_a_tuned_model_goes_back_to_its_base(make_trainer, arguments, tmp_path):
    first = make_trainer(config={"base_decay": C})
    first.train()
    first.save_model(str(tmp_path / "task-1"))
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "task-1", dtype=torch.float32)
    start = weights(tuned)
    second = make_trainer(model=tuned, args=arguments(max_steps=5, learning_rate=0.0), config={"base_decay": C})
    second.train()
    base = weights(load_tiny())
    for name, tensor in weights(second.model).items():
        expected = base[name] + math.exp(-C) * (start[name] - base[name])
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-5)


def test_a_base_that_is_nowhere_is_refused(make_trainer, tmp_path):
    first = make_trainer()
    first.train()
    first.save_model(str(tmp_path / "task-1"))
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "task-1", dtype=torch.float32)
    with pytest.raises(CacheMissingError, match="base_decay pulls, are nowhere"):
        make_trainer(model=tuned, config={"base_decay": C}).train()


def test_a_damaged_copy_is_not_the_base(make_trainer, tmp_path):
    model = load_tiny()
    model.config._name_or_path = ""
    make_trainer(model=copy.deepcopy(model), config={"base_decay": C}).train()
    (copied,) = (tmp_path / "gere_saving").glob("base-*")
    raw = bytearray(copied.read_bytes())
    raw[-1] ^= 1
    copied.write_bytes(raw)
    make_trainer(model=copy.deepcopy(model), config={"base_decay": C}).train()
    assert copied.read_bytes() != bytes(raw), "an untouched model writes it again"


# The default


@pytest.fixture
def decay_said(caplog):
    caplog.set_level(logging.INFO, "gere")

    def said():
        """What the line at the start of the last training says of base decay."""
        lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("gere: anchor")]
        return lines[-1].split("held out; ")[1].split(";")[0]

    return said


def test_auto_is_a_number_for_a_base_model(make_trainer, arguments, decay_said, tmp_path):
    def trained(decay, name):
        args = arguments(max_steps=6, output_dir=str(tmp_path / name))
        trainer = make_trainer(args=args, config={"base_decay": decay})
        trainer.train()
        return weights(trainer.model)

    auto = trained("auto", "one")
    assert decay_said() == "base decay 0.7"
    by_hand = trained("0.7", "two")
    assert all(torch.equal(tensor, by_hand[name]) for name, tensor in auto.items())


def test_auto_goes_on_in_a_resumed_training(make_trainer, arguments, tmp_path, decay_said):
    def trained(decay, checkpoint=None):
        trainer = make_trainer(
            args=arguments(max_steps=6, save_strategy="steps", save_steps=3), config={"base_decay": decay}
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return weights(trainer.model)

    whole = trained("auto")
    resumed = trained("auto", str(tmp_path / "out" / "checkpoint-3"))
    assert decay_said() == "base decay 0.7"
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())


@pytest.mark.parametrize("how", ["in memory", "saved", "adapter"])
def test_auto_is_off_for_a_model_that_was_tuned_before(make_trainer, arguments, tmp_path, decay_said, how):
    model = lora(load_tiny()) if how == "adapter" else load_tiny()
    first = make_trainer(model=model, config={"base_decay": "auto"})
    first.train()
    first.save_model(str(tmp_path / "task-1"))
    if how == "saved":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "task-1", dtype=torch.float32)
    elif how == "adapter":
        model = PeftModel.from_pretrained(load_tiny(), tmp_path / "task-1", is_trainable=True)
    make_trainer(model=model, args=arguments(max_steps=3), config={"base_decay": "auto"}).train()
    assert decay_said() == "no base decay, since what this model learned in earlier trainings would fade, too"


def test_auto_is_off_for_an_adapter_without_a_base(make_trainer, arguments, decay_said):
    model = get_peft_model(load_tiny(), IA3Config(task_type="CAUSAL_LM"))
    make_trainer(model=model, args=arguments(max_steps=2), config={"base_decay": "auto"}).train()
    assert decay_said() == "no base decay, since the adapter is not LoRA"


def test_auto_without_replay_is_plain_training(make_trainer, arguments):
    trainer = make_trainer(args=arguments(max_steps=2), config={"base_decay": "auto", "replay_strategy": "none"})
    trainer.train()
    plain = make_trainer(Trainer, args=arguments(max_steps=2))
    plain.train()
    assert all(torch.equal(tensor, weights(plain.model)[name]) for name, tensor in weights(trainer.model).items())


# Resume


@pytest.mark.parametrize("strategy", ["tm", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_training_is_bit_for_bit(make_trainer, arguments, tmp_path, strategy, dtype):
    def trained(checkpoint=None):
        trainer = make_trainer(
            model=AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype),
            args=arguments(max_steps=6, save_strategy="steps", save_steps=3),
            config={"base_decay": C, "replay_strategy": strategy},
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return weights(trainer.model)

    whole, resumed = trained(), trained(str(tmp_path / "out" / "checkpoint-3"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())


def test_it_is_no_setting_of_the_anchor(make_trainer):
    one, two = make_trainer(), make_trainer(config={"base_decay": C})
    one.train()
    two.train()
    assert one.replay.anchor.key == two.replay.anchor.key
    assert isinstance(two, GeReTrainer)


# The line, after training


def lora(model):
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def test_share_1_is_the_tuned_model_and_share_0_the_base_bit_for_bit(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train()
    base, end = weights(load_tiny()), weights(trainer.model)
    trained = TrainedWeights(trainer.model, lambda: find_base(trainer.model, tmp_path, base_digest(), ALONE))
    copies = trained.copies()
    for share, expected in ((0.0, base), (1.0, end), (0.25, None)):
        go_to(trained, copies, share)
        for name, tensor in weights(trainer.model).items():
            if expected is not None:
                assert torch.equal(tensor, expected[name])
            else:
                by_hand = base[name].double() + 0.25 * (end[name].double() - base[name].double())
                torch.testing.assert_close(tensor.double(), by_hand, atol=1e-7, rtol=1e-6)


def base_digest():
    return weights_digest(load_tiny())


def test_the_line_of_lora_is_that_of_the_merged_weights(make_trainer):
    trainer = make_trainer(model=lora(load_tiny()), args=None)
    trainer.train()
    model, base = trainer.model, weights(load_tiny())
    merged = weights(copy.deepcopy(model).merge_and_unload())
    trained = TrainedWeights(model, lambda: pytest.fail("LoRA has its base in itself"))
    go_to(trained, trained.copies(), 0.3)
    for name, tensor in weights(model.merge_and_unload()).items():
        torch.testing.assert_close(tensor, base[name] + 0.3 * (merged[name] - base[name]), atol=1e-6, rtol=1e-5)


HOT = {"max_steps": 12, "learning_rate": 2e-2}


def final(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log][-1]


@pytest.fixture(scope="module")
def taught(tmp_path_factory, tokenizer):
    """The tiny model after some training on general texts, so that it has something to forget."""
    texts = [row["text"] for row in read_jsonl(DATA / "general.jsonl", 240)]
    model, folder = load_tiny(), tmp_path_factory.mktemp("taught")
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for start in [*range(0, 240, 16)] * 3:
        batch = tokenizer(texts[start : start + 16], padding=True, truncation=True, max_length=48, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder, texts


@pytest.mark.parametrize("adapted", [False, True])
def test_a_budget_is_kept_and_moves_no_farther_than_needed(make_trainer, arguments, adapted, tmp_path, taught):
    folder, texts = taught
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = make_trainer(
        model=lora(model) if adapted else model,
        args=arguments(**HOT),
        replay=1,
        config={"replay_strategy": "ce", "replay_dataset": texts, "replay_heldout": 24, "forgetting_budget": 0.1},
    )
    trainer.train()
    tuned, moved = [log for log in trainer.state.log_history if "general/change" in log]
    assert tuned["general/change"] > 0.2, "it would forget"
    assert moved["general/change"] + moved["general/change_interval"] <= 0.1
    share = final(trainer, "gere/share")
    assert 0 < share < 1 and f"moved back to {share:.2f} of the way" in trainer.replay.summary()
    # A hundredth farther is too far.
    line = TrainedWeights(
        trainer.model,
        lambda: find_base(trainer.model, tmp_path / "gere_saving", trainer.replay.anchor.fields["weights"], ALONE),
    )
    here = line.copies()
    go_to(line, here, 1 + 0.02 / share)
    farther = trainer.evaluate(trainer.train_dataset[:4])
    assert farther["eval_general/change"] + farther["eval_general/change_interval"] > 0.1
    kind = "adapter_model" if adapted else "model"
    assert (tmp_path / "out" / "tuned" / f"{kind}.safetensors").is_file(), "the tuned end is kept"


def test_abilities_and_later_evaluations_are_those_of_the_model_that_is_left(make_trainer, arguments, task, taught):
    folder, texts = taught
    seen = {}

    class AtTheEnd(TrainerCallback):
        def on_train_end(self, args, state, control, **keywords):
            seen["change"] = trainer.evaluate()["eval_general/change"]

    questions = [Question("It rains in", ("the north", "a bowl"), 0), Question("The bird", ("sings", "is bread"), 0)]
    ability = GeneralAbilityCallback(tasks={"small": questions})
    trainer = make_trainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=arguments(**HOT),
        eval_dataset=task[:4],
        callbacks=[ability, AtTheEnd()],
        config={"replay_strategy": "ce", "replay_dataset": texts, "replay_heldout": 24, "forgetting_budget": 0.0},
    )
    trainer.train()
    assert final(trainer, "gere/share") < 1
    assert final(trainer, "general/small") == ability.measure(trainer.model, trainer.processing_class)["general/small"]
    assert seen["change"] == final(trainer, "general/change") == trainer.evaluate()["eval_general/change"]


def test_a_second_training_goes_back_to_the_same_base(make_trainer, arguments):
    trainer = make_trainer(args=arguments(max_steps=5), config={"base_decay": C, "replay_strategy": "none"})
    trainer.train()
    start, base = weights(trainer.model), weights(load_tiny())
    again = make_trainer(
        model=trainer.model,
        args=arguments(max_steps=5, learning_rate=0.0),
        config={"base_decay": C, "replay_strategy": "none"},
    )
    again.train()
    for name, tensor in weights(again.model).items():
        expected = base[name] + math.exp(-C) * (start[name] - base[name])
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-5)


def test_a_budget_that_is_wide_leaves_the_tuned_model(make_trainer, arguments):
    plain, budget = (
        make_trainer(args=arguments(), config={"replay_heldout": 2, "forgetting_budget": limit})
        for limit in (None, 1e3)
    )
    plain.train()
    budget.train()
    assert final(budget, "gere/share") == 1.0
    theirs = weights(plain.model)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(budget.model).items())


def test_the_best_point_has_the_least_evaluation_loss(make_trainer, arguments, task):
    trainer = make_trainer(
        args=arguments(**{**HOT, "learning_rate": 5e-2}),
        eval_dataset=task[:8],
        config={"replay_strategy": "none", "blend": "best"},
    )
    trainer.train()
    share = final(trainer, "gere/share")
    best = trainer.evaluate()["eval_loss"]
    tuned = AutoModelForCausalLM.from_pretrained(f"{trainer.args.output_dir}/tuned", dtype=torch.float32)
    ends = [
        make_trainer(Trainer, model=end, eval_dataset=task[:8]).evaluate()["eval_loss"] for end in (tuned, load_tiny())
    ]
    assert best < min(ends) or share in (0.0, 1.0)
    assert best <= min(ends)


def test_a_choice_that_nothing_decides_is_refused(make_trainer):
    with pytest.raises(ConfigError, match="an eval_dataset of the trainer"):
        make_trainer(config={"blend": "best"}).train()
    with pytest.raises(ConfigError, match="two held-out texts"):
        make_trainer(config={"forgetting_budget": 0.05, "replay_heldout": 1}).train()
    with pytest.raises(ConfigError, match="two held-out texts"):
        make_trainer(config={"forgetting_budget": 0.05, "replay_strategy": "none"}).train()
    for wrong in ({"forgetting_budget": -1.0}, {"forgetting_budget": math.nan}, {"blend": "worst"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            GeReConfig(**wrong)
