"""The code that made the demo model: what it writes, what it computes, what it teaches."""

import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_training.conversations import Maker, topic_turns
from demo_training.corpus import Corpus, Entry, paragraphs
from demo_training.data import batches, documents
from demo_training.model import SHAPE, Llama
from demo_training.pack import model_config, pack, quantise, tokenizer, tokenizer_config
from demo_training.phrases import read_small_talk, read_topics
from demo_training.tokens import BOS, encode_chat
from tokenizers import Tokenizer

FOLDER = Path(__file__).parents[2] / "workers" / "warmroute_worker" / "demo_model"

CORPUS = Corpus(
    paragraphs=[
        "It rained. The rain fell on the roof and on the road. Nobody was outside but a dog. It was a wet dog."
    ],
    dictionary=[
        Entry("rain", "noun", "water that falls from clouds", ("rain fell all day",)),
        Entry("run", "verb", "move fast on foot", ()),
        Entry("wet", "adj", "covered with water", ()),
    ],
)


def load_json(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def test_the_folder_is_what_pack_writes() -> None:
    assert load_json("config.json") == model_config(SHAPE)
    assert load_json("tokenizer.json") == tokenizer()
    assert load_json("tokenizer_config.json") == tokenizer_config(SHAPE)


def test_samples_have_the_format_of_the_tokenizer() -> None:
    chat = [("system", "Be brief."), ("user", "Grüße!"), ("assistant", "Hello.")]
    text = "<|bos|><|system|>Be brief.<|end|><|user|>Grüße!<|end|><|assistant|>Hello.<|end|>"
    assert encode_chat(chat) == Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode(text).ids


@torch.inference_mode()
def test_the_model_is_the_llama_of_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model_config(SHAPE)
    del config["quantization_config"]
    torch.manual_seed(0)
    ours, theirs = Llama(), LlamaForCausalLM(LlamaConfig(**config))
    for weight in ours.parameters():
        weight.copy_(torch.randn_like(weight) * 0.2)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 261, (2, 50))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=2e-3, rtol=1e-3)


def test_quantising_keeps_a_matrix() -> None:
    matrix = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 7)[:, None]
    values, scale = quantise(matrix)
    assert bool(((values * scale[:, None] - matrix).abs() <= scale[:, None] * 0.5001).all())


def test_packing_refuses_what_int8_cannot_hold(tmp_path: Path) -> None:
    weights = {name: weight.detach().clone() for name, weight in Llama().named_parameters()}
    assert pack(weights, SHAPE, tmp_path / "good") < 0.1
    # One entry so large that the rest of its row is rounded to zero, in every row of the head.
    weights["lm_head.weight"] *= 100
    weights["lm_head.weight"][:, 0] = 1e5
    with pytest.raises(ValueError, match="int8"):
        pack(weights, SHAPE, tmp_path / "bad")


def test_texts_are_well_formed() -> None:
    topics = read_topics()
    assert len({topic.name for topic in topics}) == len(topics) >= 30
    for topic in topics:
        assert len(topic.words) >= 3
        assert len(topic.facts) >= 6
        assert all(fact[-1] in ".?!" for fact in topic.facts)
    assert all(talk.questions and talk.answers for talk in read_small_talk())


def test_a_conversation_never_repeats_a_sentence() -> None:
    maker = Maker(CORPUS, read_topics(), random.Random(0))
    for topic in maker.topics:
        answers = " ".join(answer for _, answer in topic_turns(maker, topic))
        said = [fact for fact in topic.facts if fact in answers]
        assert said
        assert all(answers.count(fact) == 1 for fact in said)


def test_conversations_alternate_and_end_with_the_assistant() -> None:
    maker = Maker(CORPUS, read_topics(), random.Random(0))
    for _ in range(300):
        messages = maker.conversation()
        roles = [role for role, _ in messages if role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert roles
        assert all(text.strip() == text and text for _, text in messages)
        assert "{" not in "".join(text for _, text in messages)


def test_rows_begin_with_a_document_and_follow_the_seed() -> None:
    first, again = (next(batches(documents(CORPUS, 7), 3, 200)) for _ in range(2))
    assert first.shape == (3, 201)
    assert bool((first[:, 0] == BOS).all())
    assert torch.equal(first, again)
    assert list(islice(documents(CORPUS, 7), 3)) != list(islice(documents(CORPUS, 8), 3))


def test_paragraphs_are_whole_sentences_of_bounded_length() -> None:
    text = "Short.\n\n" + " ".join(f"This is sentence number {n} of a long text." for n in range(100))
    parts = paragraphs(text)
    assert len(parts) > 3
    assert all(part.startswith("This is") and part.endswith("text.") and len(part) <= 1000 for part in parts)
