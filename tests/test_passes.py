"""Replay rows that go along in the parent's call: the same losses and gradients as by a call of their own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import load_tiny
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from test_lora import with_lora
from test_objective import anchored, drifted, rows_of_a_step, step_gradient
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, Trainer
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer_pt_utils import LabelSmoother

from gere.session import checks
from gere.model import forward as passes
from gere.replay.batch import REPLAY, TASK
from gere.model.forward import ReplayPass
from gere.ranks import Ranks
from gere.model.states import StateReader, decoder_of, depth_of

TOGETHER, APART = 1e9, -1.0
INNER = {"layers": [1, 2]}


def batch_of(lengths, left=False, seed=0):
    """Rows of random tokens, padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 200, (len(lengths), max(lengths)), generator=generator)
    place = torch.arange(max(lengths))[None]
    mask = (place < torch.tensor(lengths)[:, None]).long()
    mask = mask.flip(1) if left else mask
    return {"input_ids": ids * mask, "attention_mask": mask}


def labelled(batch):
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


class Watched:
    """The rows of each call of a decoder."""

    def __init__(self, model):
        self.rows = []
        decoder_of(model).register_forward_hook(lambda module, args, out: self.rows.append(out[0].shape[0]))


def make_pass(model, head="own", layers=None):
    head = model.get_output_embeddings() if head == "own" else head
    layers = [depth_of(model)] if layers is None else layers
    return ReplayPass(model, StateReader(model, layers), head, torch.enable_grad)


def along(model, task, replay, **changes):
    """What a model gives for both, the replay rows in the call for the task rows; and the rows of each call."""
    watched, replay_pass = Watched(model), make_pass(model, **changes)
    with replay_pass.along(replay):
        outputs = model(**task)
    return outputs, replay_pass(model, replay), watched.rows


def assert_same_numbers(seen, other, mask):
    real = mask.bool()
    for one, two in zip([*seen.states, seen.logits], [*other.states, other.logits], strict=True):
        assert one.shape == two.shape
        torch.testing.assert_close(one[real], two[real], rtol=1e-9, atol=1e-10)


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=1000, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    return GPT2LMHeadModel(config)


def mistral():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return MistralForCausalLM(MistralConfig(vocab_size=1000, num_hidden_layers=2, sliding_window=4, **sizes))


lengths = st.lists(st.integers(2, 12), min_size=1, max_size=4)


@pytest.mark.parametrize("make", [load_tiny, gpt2, mistral])
@given(task=lengths, replay=lengths, left=st.booleans())
def test_rows_of_any_length_give_what_they_give_alone(make, task, replay, left):
    model = make().double()
    own, general = labelled(batch_of(task, left)), batch_of(replay, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "MOST_PADDING", TOGETHER)
        outputs, seen, rows = along(model, own, general, layers=[1, 2])
    assert rows == [len(task) + len(replay)]
    plain = model(**own)
    assert outputs.loss.item() == pytest.approx(plain.loss.item(), rel=1e-9)
    real = own["attention_mask"].bool()
    assert outputs.logits.shape == plain.logits.shape
    torch.testing.assert_close(outputs.logits[real], plain.logits[real], rtol=1e-9, atol=1e-10)
    assert_same_numbers(seen, make_pass(model, None, [1, 2])(model, general), general["attention_mask"])


@pytest.mark.parametrize(
    ("strategy", "w", "config"),
    [("tm", "dy", {}), ("tm", 3.0, INNER), ("tm", 3.0, {}), ("kl", 3.0, {}), ("l2", 3.0, {}), ("ce", "dy", {})],
)
@pytest.mark.parametrize("left", [False, True])
def test_a_step_has_the_same_loss_and_gradient(make_trainer, task, tokenizer, strategy, w, config, left, monkeypatch):
    monkeypatch.setattr(tokenizer, "padding_side", "left" if left else "right")
    trainer = anchored(make_trainer, w=w, replay=5, config={"replay_strategy": strategy, **config})
    rows = rows_of_a_step(task)
    results = []
    for padding in (TOGETHER, APART):
        monkeypatch.setattr(passes, "MOST_PADDING", padding)
        model = drifted()
        watched = Watched(model)
        batches = [trainer._gere._collator(rows[i::2]) for i in range(2)]  # both kinds in both
        assert all(TASK in batch and REPLAY in batch for batch in batches)
        results.append(step_gradient(trainer, model, batches))
        assert len(watched.rows) - 2 == (2 if padding == TOGETHER else 4)  # 2 by the look at the head
    (loss, gradient), (expected, expected_gradient) = results
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


@pytest.mark.parametrize("kind", ["lora", "head", "reentrant", "smoothed"])
def test_other_trainings_have_the_same_gradient_too(make_trainer, task, kind, monkeypatch, arguments):
    settings = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    if kind == "reentrant":
        settings |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    results = []
    for padding in (TOGETHER, APART):
        monkeypatch.setattr(passes, "MOST_PADDING", padding)
        model = drifted()
        if kind in ("lora", "head"):
            adapted = with_lora(modules_to_save=["lm_head"] if kind == "head" else None)
            model = get_peft_model(load_tiny(), adapted.peft_config["default"])
            torch.manual_seed(1)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and ("lora_B" in name or "modules_to_save" in name):
                    nn.init.normal_(parameter, std=0.1)
        trainer = anchored(make_trainer, w=3.0, replay=5, args=arguments(**settings))
        if kind == "smoothed":
            trainer.label_smoother = LabelSmoother(0.1)
        if kind == "reentrant":
            model.gradient_checkpointing_enable({"use_reentrant": True})
        results.append(step_gradient(trainer, model, [trainer._gere._collator(rows_of_a_step(task))]))
    (loss, gradient), (expected, expected_gradient) = results
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


def test_the_parent_sees_its_own_rows_alone(make_trainer, task, monkeypatch):
    monkeypatch.setattr(passes, "MOST_PADDING", TOGETHER)
    trainer = anchored(make_trainer, replay=5)
    batch = trainer._gere._collator(rows_of_a_step(task))
    watched = Watched(trainer.model)
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert watched.rows == [16]
    expected = trainer.model(**batch[TASK]).logits
    assert outputs.logits.shape == expected.shape
    torch.testing.assert_close(outputs.logits, expected, rtol=1e-4, atol=1e-5)


def test_the_head_computes_in_the_precision_of_the_call(make_trainer, task, arguments, monkeypatch):
    """In mixed precision the logits have 16 bits, along as alone, and what went along has not drifted."""
    monkeypatch.setattr(passes, "MOST_PADDING", TOGETHER)
    trainer = anchored(make_trainer, replay=5, args=arguments(bf16=True))
    model = trainer.accelerator.prepare_model(trainer.model)
    batch = trainer._gere._collator(rows_of_a_step(task))
    seen = []
    for part in (batch[REPLAY], None):
        with trainer._gere.along(part):
            model(**batch[TASK])
        seen.append(trainer._gere._pass(model, batch[REPLAY]))
    for one in seen:
        assert torch.equal(one.logits.float(), one.logits.bfloat16().float())
    real = batch[REPLAY]["attention_mask"].bool()
    assert (seen[0].logits[real].float() - seen[1].logits[real].float()).abs().max() < 0.02 * seen[
        1
    ].logits.abs().max()
    loss, sums = trainer._gere._objective(seen[0], batch[REPLAY])
    assert loss.requires_grad and sums["distance"] < 1e-3


def with_positions(model, task):
    return {**task, "position_ids": torch.arange(task["input_ids"].shape[1])[None].expand_as(task["input_ids"])}


def with_embeddings(model, task):
    return {"inputs_embeds": model.get_input_embeddings()(task["input_ids"]), "attention_mask": task["attention_mask"]}


def with_mask_of_pairs(model, task):
    width = task["input_ids"].shape[1]
    return {**task, "attention_mask": torch.ones(width, width).tril().expand(len(task["input_ids"]), 1, -1, -1).bool()}


def with_states(model, task):
    return {**task, "output_hidden_states": True}


@pytest.mark.parametrize("change", [with_positions, with_embeddings, with_mask_of_pairs, with_states])
def test_a_call_that_says_more_of_its_rows_is_left_as_it_is(change):
    model, replay = load_tiny().double(), batch_of([9, 8])
    task = change(model, batch_of([9, 9], seed=2))
    if "inputs_embeds" in task:
        task["inputs_embeds"] = task["inputs_embeds"].detach()
    outputs, seen, rows = along(model, task, replay)
    assert rows == [2, 2] and len(outputs.logits) == 2
    assert_same_numbers(seen, make_pass(model, None)(model, replay), replay["attention_mask"])


def test_states_that_the_config_asks_for_are_the_parents_alone():
    model = load_tiny()
    model.config.output_hidden_states = True
    outputs, _, rows = along(model, batch_of([9, 9]), batch_of([9]))
    assert rows == [2, 1] and all(len(state) == 2 for state in outputs.hidden_states)


@pytest.mark.parametrize(
    ("task", "replay", "calls"), [([20] * 12, [20] * 4, 1), ([20] * 12, [22] * 4, 2), ([5], [90], 2)]
)
def test_rows_go_along_where_that_pads_little(task, replay, calls):
    _, _, rows = along(load_tiny(), batch_of(task), batch_of(replay))
    assert len(rows) == calls and sum(rows) == len(task) + len(replay)


def test_rows_go_along_once_and_in_a_call_with_a_gradient():
    """A parent that asks a reference first, and calls the model twice."""
    model, task, replay = load_tiny(), batch_of([9, 9]), batch_of([9])
    watched, replay_pass = Watched(model), make_pass(model)
    with replay_pass.along(replay):
        with torch.no_grad():
            model(**task)
        model(**task)
        model(**task)
    assert watched.rows == [2, 3, 2]
    replay_pass(model, replay)
    assert watched.rows == [2, 3, 2]
    replay_pass(model, replay)  # what went along is used up
    assert watched.rows == [2, 3, 2, 1]


def test_a_reference_with_its_adapter_disabled_is_not_the_first_call():
    model, task, replay = with_lora(), batch_of([9, 9]), batch_of([9])
    watched, replay_pass = Watched(model), make_pass(model)
    with replay_pass.along(replay):
        with model.disable_adapter():
            model(**task).logits.detach()
        model(**task)
    assert watched.rows == [2, 3] and replay_pass(model, replay).logits.requires_grad


@pytest.mark.parametrize("longer", ["task", "replay"])
def test_a_parent_may_take_views_of_the_state(longer, monkeypatch):
    """As Liger's loss does."""
    monkeypatch.setattr(passes, "MOST_PADDING", TOGETHER)
    model, seen = load_tiny(), []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: seen.append(args[0].view(-1, 64)))
    along(model, batch_of([9, 9] if longer == "replay" else [12, 9]), batch_of([11]))
    assert [len(view) for view in seen] == [18 if longer == "replay" else 24, 11]


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(300, 8)

    def forward(self, input_ids, attention_mask=None, **kwargs):
        return (self.embed(input_ids),)


class Plain(nn.Module):
    """A model whose body has no config and gives a tuple."""

    def __init__(self):
        super().__init__()
        self.base_model, self.head = Body(), nn.Linear(8, 300)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return CausalLMOutput(logits=self.head(self.base_model(input_ids, attention_mask)[0]))


def test_a_body_without_a_config_called_by_position():
    outputs, seen, rows = along(Plain(), batch_of([9, 9]), batch_of([9]), layers=[])
    assert rows == [2, 1] and len(outputs.logits) == 2  # two arguments by position are not taken apart
    assert seen.logits.shape == (1, 9, 300)


def test_a_parent_that_never_calls_the_model_leaves_the_rows_to_themselves():
    model, replay = load_tiny(), batch_of([9])
    watched, replay_pass = Watched(model), make_pass(model)
    with replay_pass.along(replay):
        pass
    assert replay_pass(model, replay).logits.shape[:2] == (1, 9) and watched.rows == [1]


def test_nothing_is_left_behind_by_an_error():
    model, replay = load_tiny(), batch_of([9])
    replay_pass = make_pass(model)
    with pytest.raises(RuntimeError, match="of the parent"), replay_pass.along(replay):
        model(**batch_of([9]))
        raise RuntimeError("of the parent")
    decoder = decoder_of(model)
    assert not decoder._forward_hooks and not decoder._forward_pre_hooks
    assert replay_pass._call is None
    other = batch_of([9], seed=5)  # a caller that goes on, with a micro-step of replay rows alone
    assert_same_numbers(replay_pass(model, other), make_pass(model, None)(model, other), other["attention_mask"])
    with replay_pass.along(None):
        outputs = model(**batch_of([9, 9]))
    assert len(outputs.logits) == 2
    watched = Watched(model)
    replay_pass(model, replay)
    assert watched.rows == [1]


class Capped(type(load_tiny())):
    """Logits that are not the output of the head alone."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits.tanh()
        return outputs


@pytest.mark.parametrize("kind", ["capped", "compiled", "reads rows", "whole micro-steps"])
def test_a_run_whose_rows_cannot_or_need_not_go_along(make_trainer, kind, monkeypatch):
    monkeypatch.setattr(passes, "MOST_PADDING", TOGETHER)
    model = load_tiny()
    if kind == "capped":
        model.__class__ = Capped
    trainer = make_trainer(model=model, replay=4 if kind == "whole micro-steps" else 3)
    if kind == "reads rows":
        model.peft_config = {"default": SimpleNamespace(alora_invocation_tokens=[1, 2])}
    if kind == "compiled":
        model.model.layers[0].compile(backend="eager")
    trainer.get_train_dataloader()
    trainer._gere_prepare(False)
    assert trainer._gere._pass._head is None


@pytest.mark.parametrize(("kind", "joins"), [("NO", True), ("MULTI_GPU", True), ("DEEPSPEED", False), ("FSDP", False)])
def test_processes_that_hold_a_part_of_the_weights_do_not_join(make_trainer, kind, joins, monkeypatch):
    """They would have to agree on the number of calls before each; DDP waits for its wrapper alone."""
    trainer = make_trainer(replay=3)
    monkeypatch.setattr(
        type(trainer.accelerator), "distributed_type", property(lambda self: f"DistributedType.{kind}")
    )
    assert checks.may_join(trainer, trainer.model) is joins
    monkeypatch.setattr(checks, "is_sharded", lambda model: True)
    assert not checks.may_join(trainer, trainer.model)


def test_a_head_that_one_process_does_not_find_is_used_by_none(make_trainer):
    trainer = make_trainer(replay=3)
    trainer.get_train_dataloader()
    ready, prepare = [], trainer._gere.prepare
    trainer._gere.prepare = lambda model, *args, **kwargs: ready.append(model) or prepare(model, *args, **kwargs)
    trainer._gere_prepare(False)
    assert trainer._gere._pass.joins and not trainer._gere._collator.spares_replay

    def other_says_no(item):
        return [item, False if item is True else item]

    two = Ranks(0, 2, gather=other_says_no)
    prepare(ready[0]._replace(ranks=two), trainer.processing_class, resumed=False, progress=False)
    assert not trainer._gere._pass.joins and trainer._gere._collator.spares_replay


def test_training_ends_where_two_calls_end(make_trainer, monkeypatch):
    """All of a training, against the other way, and it is not the plain one."""
    ends = []
    for padding in (TOGETHER, APART):
        monkeypatch.setattr(passes, "MOST_PADDING", padding)
        trainer = make_trainer(replay=3, w="auto")
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert (ends[0] - ends[1]).norm() < 1e-4 * (
        ends[1] - torch.cat([p.flatten() for p in load_tiny().parameters()])
    ).norm()
    plain = make_trainer(Trainer)
    plain.train()
    assert (ends[0] - torch.cat([p.detach().flatten() for p in plain.model.parameters()])).norm() > 1e-3
