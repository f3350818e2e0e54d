"""A training resumes from a whole checkpoint, with all of its weights, and not past its end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import load_tiny
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
)
from watching import Watch

from gere.errors import CheckpointError
from gere.ranks import ALONE
from gere.session.resume import last_whole, require_whole

FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 768,
}


def saving(arguments, **changes):
    return arguments(**{"save_strategy": "steps", "save_steps": 1, **changes})


def spoil(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "removed":
        file.unlink()
    else:
        file.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "zeros": bytes(len(content))}[how])


def test_the_last_whole_checkpoint_is_taken(make_trainer, arguments, tmp_path):
    out = tmp_path / "out"
    make_trainer(args=saving(arguments)).train()
    assert last_whole(out, ALONE) == out / "checkpoint-3"
    for name in [*FILES, "config.json", "gere_anchor.json"]:
        for how in ("removed", "cut", "empty", "zeros"):
            if how == "removed" and name not in FILES:
                continue
            copy = tmp_path / "copy"
            shutil.copytree(out, copy)
            spoil(copy / "checkpoint-3" / name, how)
            assert last_whole(copy, ALONE) == copy / "checkpoint-2", (name, how)
            with pytest.raises(CheckpointError, match=f"weights|{name.partition(chr(46))[0].partition(chr(95))[0]}"):
                require_whole(copy / "checkpoint-3")
            shutil.rmtree(copy)
    # Files that no training reads may look as they like.
    for name, content in {"log.json": "{}\n{}\n", "notes.bin": "x", "README.md": ""}.items():
        (out / "checkpoint-3" / name).write_text(content)
    assert last_whole(out, ALONE) == out / "checkpoint-3"
    spoil(out / "checkpoint-3" / "optimizer.pt", "cut")
    resumed = make_trainer(args=saving(arguments))
    resumed.train(resume_from_checkpoint=True)
    assert resumed._gere_checkpoint == out / "checkpoint-2" and resumed.state.global_step == 3
    with pytest.raises(CheckpointError, match=r"scheduler[\s\S]*earlier one"):
        spoil(out / "checkpoint-2" / "scheduler.pt", "zeros")
        make_trainer(args=saving(arguments)).train(resume_from_checkpoint=str(out / "checkpoint-2"))
    for number in (1, 2, 3):
        spoil(out / f"checkpoint-{number}" / "trainer_state.json", "removed")
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole[\s\S]*checkpoint-1: trainer_state.json"):
        make_trainer(args=saving(arguments)).train(resume_from_checkpoint=True)


def test_other_kinds_of_checkpoints_are_whole(make_trainer, arguments, tmp_path):
    make_trainer(args=saving(arguments, max_steps=1)).train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    alone, sharded, deepspeed, fsdp = (tmp_path / name for name in ("alone", "sharded", "deepspeed", "fsdp"))
    for folder in (alone, sharded, deepspeed, fsdp):
        shutil.copytree(checkpoint, folder)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (alone / name).unlink()
    load_tiny().save_pretrained(sharded, max_shard_size="100KB")
    (sharded / "model.safetensors").unlink()
    for name in ("model.safetensors", "optimizer.pt"):
        (deepspeed / name).unlink()
        (fsdp / name).unlink()
    (deepspeed / "global_step1").mkdir()
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (fsdp / name).mkdir()
    for folder in (alone, sharded, deepspeed, fsdp):
        require_whole(folder)
    shard = next(sharded.glob("model-00002*"))
    spoil(shard, "removed")
    with pytest.raises(CheckpointError, match=shard.name):
        require_whole(sharded)


KILLED = """
import os, signal, sys
import torch
save, name = torch.save, sys.argv.pop()

def torn(content, file, *args, **kwargs):
    save(content, file, *args, **kwargs)
    if str(file).endswith(f"checkpoint-14/{name}"):
        with open(file, "r+b") as stream:
            stream.truncate(os.path.getsize(file) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = torn
"""


@pytest.mark.slow
@pytest.mark.parametrize("file", ["optimizer.pt", "rng_state.pth"])
def test_a_kill_while_a_checkpoint_is_written_loses_nothing(tmp_path, file):
    import test_resume

    script = test_resume.SCRIPT.format(tests=str(Path(__file__).parent), root=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", KILLED + script, "killed", "full", "0", "start", file],
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "killed" / "checkpoint-14" / file).is_file()
    assert test_resume.run(tmp_path, "killed", "full", "0", "resume") == 0
    assert test_resume.run(tmp_path, "whole", "full", "0", "start") == 0
    (logs, weights), (expected_logs, expected) = (test_resume.result(tmp_path, name) for name in ("killed", "whole"))
    assert len(logs) == 20 and logs == expected_logs
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("which", [True, "last"])
def test_resuming_from_the_last_step_trains_nothing(make_trainer, arguments, general, tmp_path, which):
    first = make_trainer(args=saving(arguments))
    first.train()
    expected = {name: tensor.clone() for name, tensor in first.model.state_dict().items()}
    resumed = make_trainer(args=saving(arguments))
    seen = Watch(resumed, general)
    resumed.train(resume_from_checkpoint=which if which is True else str(tmp_path / "out" / "checkpoint-3"))
    assert resumed.state.global_step == 3 and not seen.steps
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.model.state_dict().items())
    longer = make_trainer(args=saving(arguments, max_steps=5))
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 5


def mixture():
    torch.manual_seed(0)
    heads = {"num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 512}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **heads))


def llava():
    torch.manual_seed(0)
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    text = LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=512)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=767))


def renames(model, tmp_path) -> bool:
    """Tell whether this version of transformers writes a tensor of the model by another name."""
    from safetensors import safe_open

    model.save_pretrained(tmp_path / "renames")
    with safe_open(tmp_path / "renames" / "model.safetensors", "pt") as file:
        return not {*file.keys()} <= {*model.state_dict()}


@pytest.mark.parametrize(("make", "auto"), [(mixture, MixtralForCausalLM), (llava, AutoModelForImageTextToText)])
def test_tensors_that_resuming_drops_are_named(make_trainer, arguments, tmp_path, make, auto):
    if not renames(make(), tmp_path):
        pytest.skip("this version of transformers renames nothing here")
    first = make_trainer(model=make(), args=saving(arguments), w=0.1)
    first.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    expected = [log["loss"] for log in first.state.log_history if log.get("step") == 3 and "loss" in log]
    with pytest.raises(CheckpointError, match=r"did not arrive[\s\S]*the model does not have[\s\S]*from_pretrained"):
        make_trainer(model=make(), args=saving(arguments), w=0.1).train(resume_from_checkpoint=str(checkpoint))
    # The way on that the message names, by which the training goes on as if nothing had happened.
    resumed = make_trainer(model=auto.from_pretrained(checkpoint), args=saving(arguments), w=0.1)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert [log["loss"] for log in resumed.state.log_history if log.get("step") == 3 and "loss" in log] == expected
    # Another model of the same names is none that was made from the checkpoint.
    other = auto.from_pretrained(tmp_path / "out" / "checkpoint-1")
    with pytest.raises(CheckpointError, match="did not arrive"):
        make_trainer(model=other, args=saving(arguments), w=0.1).train(resume_from_checkpoint=str(checkpoint))


def test_a_best_checkpoint_that_does_not_arrive_is_named(make_trainer, arguments, task, tmp_path):
    if not renames(mixture(), tmp_path):
        pytest.skip("this version of transformers renames nothing here")
    args = saving(arguments, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
    args.greater_is_better = True  # so that the first checkpoint is the best
    trainer = make_trainer(model=mixture(), args=args, w=0.1, eval_dataset=task[:4])
    with pytest.raises(CheckpointError, match="did not arrive"):
        trainer.train()


def with_lora(targets):
    torch.manual_seed(0)
    return get_peft_model(load_tiny(), LoraConfig(r=2, target_modules=targets, modules_to_save=["lm_head"]))


def test_an_adapter_arrives_whole_or_is_named(make_trainer, arguments, tmp_path):
    make_trainer(model=with_lora(["q_proj"]), args=saving(arguments)).train()
    make_trainer(model=with_lora(["q_proj"]), args=saving(arguments)).train(
        resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2")
    )
    for targets in (["q_proj", "v_proj"], ["v_proj"]):
        with pytest.raises(CheckpointError, match=r"did not arrive[\s\S]*lora_A"):
            make_trainer(model=with_lora(targets), args=saving(arguments)).train(
                resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2")
            )


@pytest.mark.parametrize("kind", ["tied", "frozen", "sharded"])
def test_ordinary_checkpoints_arrive(make_trainer, arguments, tmp_path, kind):
    def model():
        torch.manual_seed(0)
        sizes = {"num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": kind == "tied"}
        made = LlamaForCausalLM(LlamaConfig(**SIZES, **sizes))
        made.model.embed_tokens.weight.requires_grad_(kind != "frozen")
        return made

    make_trainer(model=model(), args=saving(arguments), w=0.1).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    if kind == "sharded":
        LlamaForCausalLM.from_pretrained(checkpoint).save_pretrained(checkpoint, max_shard_size="50KB")
        (checkpoint / "model.safetensors").unlink()
    resumed = make_trainer(model=model(), args=saving(arguments), w=0.1)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 3


def test_a_trained_tensor_that_the_checkpoint_lacks_is_named(make_trainer, arguments, tmp_path):
    from safetensors.torch import load_file, save_file

    make_trainer(args=saving(arguments)).train()
    file = tmp_path / "out" / "checkpoint-2" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 trained ones[\s\S]*model\.norm\.weight"):
        make_trainer(args=saving(arguments)).train(resume_from_checkpoint=str(file.parent))
