"""The base model writes its own replay texts: the same ones always, once, from the base alone, changing nothing."""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import pytest
import torch
from conftest import load_tiny
from gere.cache.replay_files import find_texts, keep_texts, open_texts
from gere.writing import base_texts
from gere.writing.dialogue import take_apart
from gere.writing.drawing import draw
from gere.writing.sampling import TextSampler, prompt_of
from gere.writing.sieve import Sample, Sieve, is_loop
from test_lora import with_lora, with_own_adapter
from test_ranks import on_all, thread_ranks

from gere import GeReConfig
from gere.cache.fingerprint import text_digest
from gere.cache.gc import collect
from gere.errors import (
    CacheCorruptError,
    CacheMismatchError,
    CacheMissingError,
    RankFailedError,
    ReplaySetError,
    TokenizerError,
    UnsupportedModelError,
    UnsupportedSettingError,
)
from gere.model.generate import Writer
from gere.replay.rows import tokenize
from gere.replay.texts import load_texts

SMALL = {"replay_dataset": "self", "replay_size": 12, "max_length": 32, "self_batch_size": 8}
CHAT = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def small(**changes):
    return GeReConfig(**{**SMALL, **changes})


@pytest.fixture
def chat_tokenizer(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = CHAT
    return own


@pytest.fixture
def no_sampling(monkeypatch):
    def refuse(self, number):
        raise AssertionError("the model was sampled again")

    monkeypatch.setattr(TextSampler, "batch", refuse)


def state_of_the_world():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def test_texts_that_gc_removes_are_written_again(model, tokenizer, tmp_path):
    """Their manifest goes with them: on its own it would be damage."""
    first = base_texts(model, tokenizer, small(), tmp_path)
    gone = collect(tmp_path, set(), delete=True)
    assert {path.suffix for path, *_ in gone} == {".json", ".jsonl"} and not list(tmp_path.glob("replay-*"))
    assert base_texts(model, tokenizer, small(), tmp_path) == first


def test_the_same_texts_for_the_same_seed_alone(model, tokenizer):
    first, again = (TextSampler(model, tokenizer, small()) for _ in range(2))
    later = [again.batch(1), again.batch(0)][::-1]
    torch.manual_seed(99)
    assert [first.batch(0), first.batch(1)] == later and first.batch(0) != first.batch(1)
    assert TextSampler(model, tokenizer, small(self_seed=1)).batch(0) != first.batch(0)
    assert all(len(sample.parts[0]) <= 31 for sample in first.batch(0))


def test_nothing_else_is_touched(model, tokenizer):
    model.train()
    model.model.layers[0].eval()
    model.generation_config.repetition_penalty = 50.0
    settings, content = model.generation_config, model.generation_config.to_dict()
    modes = [module.training for module in model.modules()]
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    vocabulary, backend = tokenizer.get_vocab(), tokenizer.backend_tokenizer.to_str()
    before = state_of_the_world()
    strange = TextSampler(model, tokenizer, small()).batch(0)
    assert state_of_the_world() == before
    assert model.generation_config is settings and settings.to_dict() == content
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert tokenizer.get_vocab() == vocabulary and tokenizer.backend_tokenizer.to_str() == backend
    assert strange == TextSampler(load_tiny(), tokenizer, small()).batch(0), "its own settings leaked in"


def test_all_is_given_back_when_sampling_fails(model, tokenizer, monkeypatch):
    model.train()
    settings, before = model.generation_config, state_of_the_world()
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        TextSampler(model, tokenizer, small()).batch(0)
    assert model.generation_config is settings and model.training and state_of_the_world() == before


@pytest.mark.parametrize("make", [with_lora, with_own_adapter])
def test_the_adapter_is_disabled(make, tokenizer):
    adapted = make()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=5.0)
    settings = adapted.generation_config
    ours = TextSampler(adapted, tokenizer, small()).batch(0)
    assert ours == TextSampler(load_tiny(), tokenizer, small()).batch(0)
    assert adapted.generation_config is settings
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


def test_texts_are_made_once(model, tokenizer, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", logger="gere")
    texts = base_texts(model, tokenizer, small(), tmp_path)
    assert len(texts) == 12 and "12 kept of" in caplog.text
    lines, manifest = next(tmp_path.glob("replay-*.jsonl")), next(tmp_path.glob("replay-*.json"))
    assert [json.loads(line) for line in lines.read_text().splitlines()] == [
        {"text": text, "source": "self"} for text in texts
    ]
    kept = json.loads(manifest.read_text())
    assert kept["counts"]["asked"] == 12 and kept["counts"]["drawn"] >= 12 and kept["texts"] == text_digest(texts)
    for changes in ({"self_seed": 1}, {"max_length": 30}, {"self_temperature": 0.9}, {"self_top_p": 0.5}):
        base_texts(model, tokenizer, small(**changes), tmp_path)
    assert len(list(tmp_path.glob("replay-*.jsonl"))) == 5
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert base_texts(model, tokenizer, small(), tmp_path) and len(list(tmp_path.glob("replay-*.jsonl"))) == 6
    monkeypatch.setattr(TextSampler, "batch", None)
    assert base_texts(load_tiny(), tokenizer, small(), tmp_path) == texts, "the second start samples nothing"


def test_a_flipped_byte_is_refused(tmp_path):
    fields, texts = {"seed": "0"}, ["a text", "caf\u00e9\u2028 one\nmore", "\ud800"]
    lines = keep_texts(tmp_path, fields, texts, {"drawn": 3})
    assert open_texts(tmp_path, fields).texts == find_texts(tmp_path, text_digest(texts)).texts == texts
    assert open_texts(tmp_path, {"seed": "1"}) is None and find_texts(tmp_path, "0") is None
    for path in (lines, lines.with_suffix(".json")):
        good = path.read_bytes()
        for place in range(0, len(good), 7):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            with pytest.raises((CacheCorruptError, CacheMismatchError)):
                open_texts(tmp_path, fields)
        path.write_bytes(good)
    lines.unlink()
    with pytest.raises(CacheCorruptError, match=r"replay-\w{16}.jsonl[\s\S]*FileNotFound"):
        find_texts(tmp_path, text_digest(texts))


def test_a_conversation_is_kept_as_the_model_saw_it(model, chat_tokenizer):
    assert take_apart(chat_tokenizer) == ("<s>[user]", "</s>[assistant]", "</s>")
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


def test_an_answer_that_ended_is_closed(model, chat_tokenizer, monkeypatch):
    def go_on(self, contexts, most, stops):
        assert stops >= {chat_tokenizer.eos_token_id}
        word = chat_tokenizer("Why not", add_special_tokens=False)["input_ids"]
        from gere.model.generate import Continuation

        return [Continuation(word, row == 0) for row in range(len(contexts))]

    monkeypatch.setattr(Writer, "go_on", go_on)
    first, second = TextSampler(model, chat_tokenizer, small(self_batch_size=2)).batch(0)
    assert first.text.endswith("[assistant]Why not</s>") and second.text.endswith("[assistant]Why not")


def test_template_that_ends_a_turn_by_plain_words(model, chat_tokenizer, monkeypatch):
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[ASK]{{ m.content }} [END]{% else %}{{ m.content }}"
        "{% endif %}{% endfor %}"
    )
    answers = iter(["Why so? [END] and more", "No."])

    def go_on(self, contexts, most, stops):
        from gere.model.generate import Continuation

        ids = chat_tokenizer(next(answers), add_special_tokens=False)["input_ids"]
        return [Continuation(ids, False) for _ in contexts]

    monkeypatch.setattr(Writer, "go_on", go_on)
    sample = TextSampler(model, chat_tokenizer, small(self_batch_size=1, max_length=64)).batch(0)[0]
    assert sample.text == "[ASK]Why so?  [END]No." or sample.text == "[ASK]Why so? [END]No."


@pytest.mark.parametrize("template", ["{{ messages[0].content | upper }}", "{{ nothing.at.all }}", "no message"])
def test_unusable_template(chat_tokenizer, template):
    chat_tokenizer.chat_template = template
    with pytest.raises(TokenizerError, match=r"chat template[\s\S]*--prompt bos"):
        take_apart(chat_tokenizer)


def test_eos_where_there_is_no_bos_and_neither(model, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    assert TextSampler(model, bare, small()).batch(0)
    bare.eos_token = None
    with pytest.raises(TokenizerError, match=r"bos_token[\s\S]*neither"):
        TextSampler(model, bare, small())


def test_lengths_without_room(model, tokenizer, chat_tokenizer):
    with pytest.raises(ReplaySetError, match=r"max_length[\s\S]*to 1024 tokens[\s\S]*1025"):
        TextSampler(model, tokenizer, small(max_length=1025))
    with pytest.raises(ReplaySetError, match="max_length"):
        TextSampler(model, chat_tokenizer, small(max_length=8))


def test_models_that_cannot_write(model, tokenizer, tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"generate\(\)"):
        TextSampler(model.model, tokenizer, small())
    model.lm_head.weight.ds_shape = model.lm_head.weight.shape
    with pytest.raises(UnsupportedSettingError, match=r"spread over processes[\s\S]*gere replay --source self"):
        base_texts(model, tokenizer, small(), tmp_path)


def test_texts_without_a_model(tmp_path):
    with pytest.raises(ReplaySetError, match="gere replay --source self"):
        load_texts(small(), tmp_path)


def saving(arguments, **changes):
    return arguments(save_strategy="steps", save_steps=2, max_steps=4, **changes)


def trained(make_trainer, arguments, **changes):
    trainer = make_trainer(args=saving(arguments), config=SMALL, **changes)
    trainer.train()
    return trainer


def test_training_resume_and_second_task_use_the_first_texts(make_trainer, arguments, tmp_path):
    first = trained(make_trainer, arguments)
    rows, key = first._gere.replay_set(None).rows, first._gere.anchor.key
    assert len(rows) == 12 and first.state.log_history[0]["gere/tm"] == 0.0
    first.save_model(str(tmp_path / "tuned"))
    tuned = type(load_tiny()).from_pretrained(tmp_path / "tuned")
    moved = copy.deepcopy(first.model)
    runs = [
        ({}, str(tmp_path / "out" / "checkpoint-2")),  # resumed
        ({"model": tuned}, None),  # its folder names the anchor
        ({"model": moved, "config": {**SMALL, "anchor": key}}, None),  # named by the user
        ({}, None),  # the base again
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextSampler, "batch", None)
        for changes, checkpoint in runs:
            trainer = make_trainer(args=saving(arguments), **{"config": SMALL, **changes})
            trainer.train(resume_from_checkpoint=checkpoint)
            assert trainer._gere.replay_set(None).rows == rows and trainer._gere.anchor.key == key
    with pytest.raises(CacheMismatchError, match="weights"):  # trained, in the same process, and naming nothing
        trained(make_trainer, arguments, model=moved)
    assert len(list((tmp_path / "gere_saving").glob("replay-*.jsonl"))) == 1, "a trained model was sampled"
    other = make_trainer(args=saving(arguments), config={**SMALL, "self_seed": 3})
    with pytest.raises(CacheMismatchError, match=r"seed 3 \(this run\)[\s\S]*seed 0 \(the texts\)"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for path in (tmp_path / "gere_saving").glob("replay-*"):
        path.unlink()
    lost = make_trainer(args=saving(arguments), config=SMALL)
    with pytest.raises(CacheMissingError, match=r"must not write them again[\s\S]*digest \w{64}"):
        lost.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    again = trained(make_trainer, arguments)  # from the base: the same texts, the same anchor
    assert again._gere.replay_set(None).rows == rows and again._gere.anchor.key == key


def test_two_processes_train_on_the_texts_of_one(tmp_path):
    from processes import run

    config = {**SMALL, "max_length": 40, "normalization": "elements"}
    two = run(tmp_path / "two", 2, steps=2, config=config, folders="own")
    one = run(tmp_path / "one", 1, steps=2, config=config)
    assert two.results[0]["anchor"] == two.results[1]["anchor"] == one.results[0]["anchor"]
    assert two.logs[0]["gere/tm"] == 0.0
