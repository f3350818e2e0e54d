"""`torch_compile=True`: the task rows run compiled; the replay rows run as the base model did when it was anchored."""

from __future__ import annotations

import pytest
import torch
from conftest import load_tiny
from test_lora import with_lora
from test_trainer import KEYS, train_logs
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from transformers import Trainer

from gere import GeReTrainer

EAGER = {"torch_compile": True, "torch_compile_backend": "eager"}

pytestmark = pytest.mark.slow


class OwnLoss(GeReTrainer):
    """Calls the model just as replay does, so that a compiler takes both calls for one."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        outputs = model(input_ids=ids, attention_mask=mask, use_cache=False)
        loss = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    """`TrainingArguments` of transformers 4 leaves its compiler in the environment of later tests."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    torch._dynamo.reset()
    counters.clear()


def curve(trainer):
    names = ("loss", *sorted(KEYS))
    return torch.tensor([[log[name] for name in names] for log in train_logs(trainer)])


KINDS = [({}, load_tiny), ({"bf16": True}, load_tiny), ({}, with_lora)]


@pytest.mark.parametrize(("settings", "load"), KINDS, ids=["float32", "bf16", "lora"])
def test_compiled_training_follows_the_plain_one(make_trainer, arguments, settings, load):
    settings = {"max_steps": 4, "learning_rate": 1e-2, **settings}
    plain = make_trainer(model=load(), args=arguments(**settings))
    plain.train()
    assert not counters["stats"]
    compiled = make_trainer(model=load(), args=arguments(**settings, **EAGER))
    compiled.train()
    assert train_logs(compiled)[0]["gere/tm"] == 0.0 < train_logs(compiled)[-1]["gere/tm"]
    tolerance = 1e-2 if "bf16" in settings else 1e-4
    torch.testing.assert_close(curve(compiled), curve(plain), rtol=tolerance, atol=1e-5)


def test_replay_adds_no_graph_and_no_recompilation(make_trainer, arguments):
    settings = {"max_steps": 6, **EAGER}
    make_trainer(Trainer, args=arguments(**settings)).train()
    plain = dict(counters["stats"])
    torch._dynamo.reset()
    counters.clear()
    trainer = make_trainer(args=arguments(**settings))
    trainer.train()
    assert plain["unique_graphs"] >= 1 and dict(counters["stats"]) == plain
    trainer.train()
    assert dict(counters["stats"]) == plain


def test_a_loss_that_calls_the_model_as_replay_does(make_trainer, arguments):
    curves = []
    for settings in ({}, EAGER):
        trainer = make_trainer(OwnLoss, args=arguments(**settings))
        trainer.train()
        curves.append(curve(trainer))
    torch.testing.assert_close(*curves, rtol=1e-4, atol=1e-5)


def test_a_model_that_was_compiled_in_place(make_trainer):
    model = load_tiny()
    model.compile(backend="eager")
    trainer, plain = make_trainer(model=model), make_trainer()
    trainer.train()
    plain.train()
    assert counters["stats"]["unique_graphs"] >= 1
    assert trainer.replay.anchor.key == plain.replay.anchor.key
    torch.testing.assert_close(curve(trainer), curve(plain), rtol=1e-4, atol=1e-5)
