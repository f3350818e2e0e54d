"""The base model writes its own replay texts: the same ones always, once, from the base alone, changing nothing."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random

import numpy as np
import pytest
import torch
from conftest import load_tiny
from peft import LoraConfig, get_peft_model
from test_ranks import on_all, thread_ranks

from gere import GeReConfig
from gere.cache.fingerprint import text_digest
from gere.cache.gc import collect
from gere.errors import (
    CacheCorruptError,
    CacheMissingError,
    RankFailedError,
    ReplaySetError,
    TokenizerError,
    UnsupportedModelError,
    UnsupportedSettingError,
)
from gere.replay.rows import tokenize
from gere.replay.sampling import TextSampler, prompt_of, split_chat_template
from gere.replay.sieve import Sample, Sieve, draw, is_loop
from gere.replay.texts import load_texts
from gere.replay.written import own_texts

SMALL = {"replay_dataset": "self", "replay_size": 12, "max_length": 32, "self_batch_size": 8}
CHAT = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PLAIN_END = (
    "{% for m in messages %}{% if m.role == 'user' %}[ASK]{{ m.content }} [END]{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def small(**changes):
    return GeReConfig(**{**SMALL, **changes})


def files_in(folder):
    return sorted(path.name for path in folder.glob("replay-*"))


def with_lora():
    return get_peft_model(load_tiny(), LORA)


def with_own_adapter():
    model = load_tiny()
    try:
        model.add_adapter(LORA)
    except ValueError as error:  # this version of transformers wants a newer PEFT for it
        pytest.skip(str(error))
    return model


@pytest.fixture
def chat_tokenizer(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = CHAT
    return own


@pytest.fixture
def no_sampling(monkeypatch):
    """Call it, and no model can be sampled any more."""

    def refuse(*args, **kwargs):
        raise AssertionError("the model was sampled again")

    return lambda: monkeypatch.setattr("transformers.GenerationMixin.generate", refuse)


def say(model, *rows):
    """Let a model give these tokens, row by row and call by call of its head, whatever it is asked."""
    calls = iter(range(10**6))

    def forward(module, args, logits):
        call = next(calls)
        logits[:] = -1e4
        for place, tokens in enumerate(rows):
            logits[place, -1, tokens[min(call, len(tokens) - 1)]] = 1e4
        return logits

    model.lm_head.register_forward_hook(forward)


def state_of_the_world():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


# Sampling


def test_the_same_texts_for_the_same_seed_alone(model, tokenizer):
    first, again = (TextSampler(model, tokenizer, small()) for _ in range(2))
    later = [again.batch(1), again.batch(0)][::-1]
    torch.manual_seed(99)
    assert [first.batch(0), first.batch(1)] == later and first.batch(0) != first.batch(1)
    assert TextSampler(model, tokenizer, small(self_seed=1)).batch(0) != first.batch(0)
    assert all(len(sample.parts[0]) <= 31 for sample in first.batch(0))


def test_nothing_else_is_touched(model, tokenizer, tmp_path):
    model.train()
    model.model.layers[0].eval()
    model.generation_config.repetition_penalty = 50.0
    settings, content = model.generation_config, model.generation_config.to_dict()
    modes = [module.training for module in model.modules()]
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    vocabulary, backend = tokenizer.get_vocab(), tokenizer.backend_tokenizer.to_str()
    before = state_of_the_world()
    strange = own_texts(model, tokenizer, small(), tmp_path / "strange")
    assert state_of_the_world() == before
    assert model.generation_config is settings and settings.to_dict() == content
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert tokenizer.get_vocab() == vocabulary and tokenizer.backend_tokenizer.to_str() == backend
    assert strange == own_texts(load_tiny(), tokenizer, small(), tmp_path / "plain"), "its own settings leaked in"


def test_all_is_restored_when_sampling_fails(model, tokenizer, tmp_path, monkeypatch):
    model.train()
    settings, before = model.generation_config, state_of_the_world()
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        own_texts(model, tokenizer, small(), tmp_path)
    assert model.generation_config is settings and model.training and state_of_the_world() == before
    assert not files_in(tmp_path)


@pytest.mark.parametrize("make", [with_lora, with_own_adapter])
def test_the_adapter_is_disabled(make, tokenizer, tmp_path):
    adapted = make()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=5.0)
    settings, flags = adapted.generation_config, [weight.requires_grad for weight in adapted.parameters()]
    ours, bare = tmp_path / "ours", tmp_path / "bare"
    assert own_texts(adapted, tokenizer, small(), ours) == own_texts(load_tiny(), tokenizer, small(), bare)
    assert files_in(ours) == files_in(bare), "the base has one key, with an adapter and without"
    assert adapted.generation_config is settings
    assert [weight.requires_grad for weight in adapted.parameters()] == flags
    ids = torch.tensor([[0, 5, 6]])
    with torch.no_grad():
        assert not torch.equal(adapted(input_ids=ids).logits, load_tiny()(input_ids=ids).logits), "no adapter any more"


def test_sieve_drops_what_is_short_twice_or_a_loop():
    def sample(text, *parts):
        return Sample(text, parts or [list(range(10))])

    sieve = Sieve(3)
    sieve.add([sample("  One text. "), sample("one   TEXT."), sample("short", list(range(7))), sample(" \n")])
    sieve.add([sample("la la", [1, 2] * 10), sample("no answer", list(range(10)), []), sample("two"), sample("three")])
    sieve.add([sample("not looked at")])
    assert sieve.texts == ["One text.", "two", "three"] and sieve.full
    assert sieve.counts == {"asked": 3, "drawn": 8, "too_short": 3, "duplicates": 1, "loops": 1}
    assert "3 kept of 8 drawn; dropped: 3 too short, 1 duplicates, 1 loops" in str(sieve)
    # 40 tokens of which the last half repeats a run of five: 25 of 37 runs of four differ, a song with a refrain
    assert not is_loop([*range(20), *[1, 2, 3, 4, 5] * 4]) and is_loop([*range(5), *[1, 2, 3, 4, 5] * 4])
    assert not is_loop([1, 2, 3]) and not is_loop([])


def test_too_few_usable_texts_stop_with_the_reasons():
    asked = []

    def loops(number):
        asked.append(number)
        return [Sample("la la", [[1, 2] * 10])] * 4

    with pytest.raises(ReplaySetError, match=r"5 texts[\s\S]*0 kept of 20 drawn[\s\S]*20 loops[\s\S]*temperature"):
        draw(loops, 5)
    assert asked == [0, 1, 2, 3, 4], "at most four samples for a text"


def test_the_number_of_processes_does_not_matter():
    def batch(number):
        return [Sample(f"text {number} {row}", [list(range(10))]) for row in range(3)]

    alone = draw(batch, 10)
    for sieve in on_all([lambda r=r: draw(batch, 10, r) for r in thread_ranks(3)]):
        assert sieve.texts == alone.texts and sieve.counts == alone.counts


def test_a_process_that_fails_stops_all():
    def batch(rank, number):
        return 1 / 0 if rank == 1 else [Sample(f"{number}", [list(range(10))])]

    found = on_all([lambda r=r: draw(lambda number: batch(r.index, number), 10, r) for r in thread_ranks(2)])
    assert isinstance(found[0], RankFailedError) and isinstance(found[1], ZeroDivisionError)


# The file


def test_texts_are_made_once(model, tokenizer, tmp_path, caplog, no_sampling):
    caplog.set_level("INFO", logger="gere")
    texts = own_texts(model, tokenizer, small(), tmp_path)
    assert len(texts) == 12 and "12 kept of" in caplog.text
    (file,) = tmp_path.iterdir()
    assert file.match("replay-self-????????????????.jsonl")
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    assert records[0].pop("sha256") == text_digest(texts)
    assert records == [{"text": text, "source": "self"} for text in texts]
    for changes in ({"self_seed": 1}, {"max_length": 30}, {"self_temperature": 0.9}, {"self_top_p": 0.5}):
        own_texts(model, tokenizer, small(**changes), tmp_path)
    assert len(files_in(tmp_path)) == 5
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert own_texts(model, tokenizer, small(), tmp_path) and len(files_in(tmp_path)) == 6
    model.config.rms_norm_eps = 0.1  # the weights alone do not make a model
    assert own_texts(model, tokenizer, small(), tmp_path) and len(files_in(tmp_path)) == 7
    no_sampling()
    assert own_texts(load_tiny(), tokenizer, small(), tmp_path) == texts, "the second start samples nothing"


def test_texts_on_the_disk_of_one_machine_reach_the_others(model, tokenizer, tmp_path, no_sampling):
    texts = own_texts(model, tokenizer, small(), tmp_path / "1")
    no_sampling()
    ranks = [dataclasses.replace(rank, first_here=True) for rank in thread_ranks(2)]
    found = on_all([lambda r=r: own_texts(model, tokenizer, small(), tmp_path / str(r.index), ranks=r) for r in ranks])
    assert found == [texts, texts]


def test_a_damaged_file_is_refused(model, tokenizer, tmp_path):
    texts = own_texts(model, tokenizer, small(), tmp_path)
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    lines = good.splitlines(keepends=True)
    for bad in (b"", b"".join(lines[:-1]), good[:-5], good + lines[0], good.replace(b'"text"', b'"tex"', 1), b"\xff"):
        file.write_bytes(bad)
        with pytest.raises(CacheCorruptError, match=f"{file.name}[\\s\\S]*12 lines"):
            own_texts(model, tokenizer, small(), tmp_path)
    for place in range(0, len(good), 7):
        file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        try:
            found = load_texts(small(), tmp_path, own_texts(model, tokenizer, small(), tmp_path))
        except (CacheCorruptError, ReplaySetError):
            continue
        # What reads as a text is found by the digest that an anchor has of its texts; a source is no part of a text.
        assert text_digest(found) != text_digest(texts) or b'"source"' in good[max(0, place - 20) : place + 10]


# Conversations


def test_a_conversation_is_kept_as_the_model_saw_it(model, chat_tokenizer):
    assert split_chat_template(chat_tokenizer) == ("<s>[user]", "</s>[assistant]", "</s>")
    assert prompt_of(chat_tokenizer, small()) == "chat" != prompt_of(chat_tokenizer, small(self_prompt="bos"))
    config = small(max_length=64, replay_dataset=None)
    adds = chat_tokenizer("a")["input_ids"][0] == chat_tokenizer.bos_token_id
    samples = TextSampler(model, chat_tokenizer, config).batch(0)
    rows = tokenize([sample.text for sample in samples], chat_tokenizer, config)
    for sample, row in zip(samples, rows, strict=True):
        assert sample.text.startswith("[user]" if adds else "<s>[user]") and "</s>[assistant]" in sample.text
        assert row.count(chat_tokenizer.bos_token_id) == 1 and row[0] == chat_tokenizer.bos_token_id
        user, answer = sample.parts
        assert len(user) <= 24 and not {0, 1} & {*user, *answer}
        turn = chat_tokenizer("</s>[assistant]", add_special_tokens=False)["input_ids"]
        message = sample.text.split("[user]", 1)[1].split("</s>")[0]
        assert chat_tokenizer.decode(row[: row.index(1)]) == "<s>[user]" + message
        assert message == chat_tokenizer.decode(user).rstrip("\ufffd")
        assert row[row.index(1) :][: len(turn)] == turn


def test_an_answer_that_ended_is_closed(model, chat_tokenizer):
    word = chat_tokenizer("Why not", add_special_tokens=False)["input_ids"]
    message = [*word, chat_tokenizer.eos_token_id]
    say(model, message * 2, message + word)
    config = small(self_batch_size=2, max_length=64)
    first, second = TextSampler(model, chat_tokenizer, config).batch(0)
    assert first.text.endswith("[user]Why not</s>[assistant]Why not</s>")
    assert "[user]Why not</s>[assistant]Why not" in second.text and not second.text.endswith("</s>")
    assert len(tokenize([second.text], chat_tokenizer, config)[0]) == 64, "it was cut at max_length"


def test_template_that_ends_a_turn_by_plain_words(model, chat_tokenizer):
    chat_tokenizer.chat_template = PLAIN_END
    message, answer = chat_tokenizer(["Why so? [END] and more", "No."], add_special_tokens=False)["input_ids"]
    end = [chat_tokenizer.eos_token_id]
    say(model, message + end + answer + end)
    sample = TextSampler(model, chat_tokenizer, small(self_batch_size=1, max_length=96)).batch(0)[0]
    assert sample.text == "[ASK]Why so?  [END]No."


@pytest.mark.parametrize("template", ["{{ messages[0].content | upper }}", "{{ nothing.at.all }}", "no message"])
def test_unusable_template(model, chat_tokenizer, tmp_path, template):
    chat_tokenizer.chat_template = template
    with pytest.raises(TokenizerError, match=r"chat template[\s\S]*--set self_prompt=bos"):
        own_texts(model, chat_tokenizer, small(), tmp_path)


# Models and tokenizers that cannot write


def test_eos_where_there_is_no_bos_and_neither(model, tokenizer, tmp_path):
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    assert own_texts(model, bare, small(), tmp_path)
    bare.eos_token = None
    with pytest.raises(TokenizerError, match=r"bos_token[\s\S]*neither"):
        own_texts(model, bare, small(), tmp_path)


def test_lengths_without_room(model, tokenizer, chat_tokenizer, tmp_path):
    with pytest.raises(ReplaySetError, match=r"max_length[\s\S]*to 1024[\s\S]*1025"):
        own_texts(model, tokenizer, small(max_length=1025), tmp_path)
    with pytest.raises(ReplaySetError, match="max_length"):
        own_texts(model, chat_tokenizer, small(max_length=8), tmp_path)


def test_models_that_cannot_write(model, tokenizer, tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"generate\(\)"):
        own_texts(model.model, tokenizer, small(), tmp_path)
    model.lm_head.weight.ds_shape = model.lm_head.weight.shape
    with pytest.raises(UnsupportedSettingError, match=r"spread over processes[\s\S]*gere replay --source self"):
        own_texts(model, tokenizer, small(), tmp_path)


def test_texts_without_a_model(tmp_path):
    with pytest.raises(ReplaySetError, match="gere replay --source self"):
        load_texts(small(), tmp_path)


# Training


def saving(arguments):
    return arguments(save_strategy="steps", save_steps=2, max_steps=4)


def trained(make_trainer, arguments, checkpoint=None, **changes):
    trainer = make_trainer(args=saving(arguments), **{"config": SMALL, **changes})
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def test_training_resume_and_second_task_use_the_first_texts(make_trainer, arguments, tmp_path, no_sampling):
    first = trained(make_trainer, arguments)
    anchor, folder, checkpoint = first.replay.anchor, tmp_path / "gere_saving", str(tmp_path / "out" / "checkpoint-2")
    (file,) = folder.glob("replay-*")
    assert first.replay.texts == 12 and first.state.log_history[0]["gere/tm"] == 0.0
    assert anchor.fields["texts"] == text_digest(json.loads(line)["text"] for line in file.open(encoding="utf-8"))
    first.save_model(str(tmp_path / "tuned"))
    tuned = type(load_tiny()).from_pretrained(tmp_path / "tuned")
    moved = copy.deepcopy(first.model)
    runs = [
        {"checkpoint": checkpoint},  # resumed
        {"model": tuned},  # its folder names the anchor
        {"model": moved, "config": {**SMALL, "anchor": anchor.key}},  # named by the user
        {"model": copy.deepcopy(moved)},  # remembers its anchor
        {},  # the base again
    ]
    no_sampling()
    for changes in runs:
        again = trained(make_trainer, arguments, **changes)
        assert again.replay.anchor.key == anchor.key and again.replay.texts == 12
    with pytest.raises(CacheMissingError, match=rf"must not write them again[\s\S]*{file.name}[\s\S]*the settings"):
        trained(make_trainer, arguments, checkpoint, config={**SMALL, "self_seed": 3})
    good = file.read_text(encoding="utf-8")
    file.write_text(good.replace('{"text": "', '{"text": "Other ', 1), encoding="utf-8")
    for changes in ({"checkpoint": checkpoint}, {}):
        with pytest.raises(CacheCorruptError, match="kept replay texts are damaged"):
            trained(make_trainer, arguments, **changes)
    file.unlink()
    with pytest.raises(CacheMissingError, match=r"must not write them again[\s\S]*replay-self-\w{16}\.jsonl"):
        trained(make_trainer, arguments, checkpoint)


def test_gc_removes_texts_without_an_anchor_and_the_base_writes_them_again(
    make_trainer, arguments, tokenizer, tmp_path
):
    folder, first = tmp_path / "gere_saving", trained(make_trainer, arguments)
    (file,) = folder.glob("replay-*")
    good = file.read_bytes()
    own_texts(load_tiny(), tokenizer, small(self_seed=5), folder)
    (other,) = set(folder.glob("replay-*")) - {file}
    for path in (file, other):
        os.utime(path, (0, 0))  # what was written just now stays
    assert [item.path for item in collect(folder, lambda: {first.replay.anchor.key}, delete=True)] == [other]
    assert {item.path for item in collect(folder, set, delete=True)} == {file, first.replay.anchor.folder}
    again = trained(make_trainer, arguments)
    assert file.read_bytes() == good and again.replay.anchor.key == first.replay.anchor.key


@pytest.mark.slow
def test_two_processes_train_on_the_texts_of_one(tmp_path):
    from processes import run

    config = {**SMALL, "max_length": 40, "normalization": "elements"}
    two = run(tmp_path / "two", 2, steps=2, config=config, folders="own")
    one = run(tmp_path / "one", 1, steps=2, config=config)
    assert two.results[0]["anchor"] == two.results[1]["anchor"] == one.results[0]["anchor"]
    assert two.logs[0]["gere/tm"] == 0.0
