"""The embedded demo model: its folder, its alphabet, its chat format, and that its weights have learned English."""

import json
import math
from pathlib import Path
from typing import Any

import jinja2.sandbox
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

FOLDER = Path(__file__).parents[2] / "workers" / "warmroute_worker" / "demo_model"
LARGEST_FOLDER_BYTES = 4 * 1024 * 1024

SPECIAL_TOKENS = {"<|bos|>": 256, "<|end|>": 257, "<|system|>": 258, "<|user|>": 259, "<|assistant|>": 260}

HELD_OUT = (
    "The old man opened the window and looked out at the rain. He had not seen his brother for years, and now that "
    "the letter was there he did not know what to do with it. He read it again, slowly, and put it back on the table."
)
"""Written for this test, so that no training run can have seen it."""

LARGEST_BITS_PER_BYTE = 3.0
"""Guessing gives 8.3, letter frequencies 4.2, pairs of letters 3.4: below 3 a model must know words."""


def load_json(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def model(stored: dict[str, Tensor]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = load_json("config.json")
    del config["quantization_config"]
    reference = LlamaForCausalLM(LlamaConfig(**config))
    reference.load_state_dict(dequantised(stored))
    return reference.eval()  # type: ignore[no-untyped-call]


def dequantised(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {}
    for name, tensor in stored.items():
        if tensor.dtype == torch.int8:
            weights[name] = tensor * stored[f"{name}_scale"][:, None]
        elif not name.endswith("_scale"):
            weights[name] = tensor
    return weights


def test_folder_is_small_and_complete() -> None:
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names == {file.name for file in FOLDER.iterdir()}
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= LARGEST_FOLDER_BYTES


def test_configuration_is_a_llama_of_the_promised_shape() -> None:
    config = load_json("config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"] == {"quant_method": "int8_per_channel"}
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (256, 4, 320)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (8, 4)
    assert config["max_position_embeddings"] >= 8192
    assert load_json("generation_config.json")["eos_token_id"] == SPECIAL_TOKENS["<|end|>"]


def test_every_matrix_is_int8_with_a_scale_per_row(stored: dict[str, Tensor]) -> None:
    matrices = [name for name, tensor in stored.items() if tensor.ndim == 2]
    assert len(matrices) == 4 * 7 + 2
    for name in matrices:
        scale = stored[f"{name}_scale"]
        assert stored[name].dtype == torch.int8
        assert scale.dtype == torch.float32
        assert scale.shape == (stored[name].shape[0],)
        assert bool((scale > 0).all())
        # The whole range is used in each row; if it were not, int8 would be coarser than it has to be.
        assert bool((stored[name].abs().amax(dim=1) == 127).all())
    assert all(tensor.dtype == torch.float32 for tensor in stored.values() if tensor.ndim == 1)
    assert 2_500_000 < sum(stored[name].numel() for name in matrices) < 3_500_000


@given(st.text())
def test_tokens_are_the_bytes_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    if not any(token in text for token in SPECIAL_TOKENS):
        assert ids == list(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_each_byte_is_the_token_of_its_value(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 256 + len(SPECIAL_TOKENS)
    for letter in (chr(code) for code in range(256)):
        assert tokenizer.encode(letter).ids == list(letter.encode())
    assert tokenizer.decode(list("é€🙂".encode())) == "é€🙂"


def test_special_tokens(tokenizer: Tokenizer) -> None:
    for token, id_ in SPECIAL_TOKENS.items():
        assert tokenizer.token_to_id(token) == id_
    ids = tokenizer.encode("<|bos|><|user|>Hi<|end|><|assistant|>").ids
    assert ids == [256, 259, *b"Hi", 257, 260]
    assert tokenizer.decode(ids) == "Hi"
    config = load_json("tokenizer_config.json")
    assert (config["bos_token"], config["eos_token"]) == ("<|bos|>", "<|end|>")


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "<b>&'"},
]
RENDERED = "<|bos|><|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Hello!<|end|><|user|><b>&'<|end|>"


@pytest.mark.parametrize(("prompt", "expected"), [(True, RENDERED + "<|assistant|>"), (False, RENDERED)])
def test_chat_template(prompt: bool, expected: str) -> None:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(load_json("tokenizer_config.json")["chat_template"])
    assert template.render(messages=MESSAGES, add_generation_prompt=prompt) == expected


def test_a_turn_only_appends_to_the_prompt_before_it() -> None:
    """Otherwise no prefix cache could help a conversation."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment()
    template = environment.from_string(load_json("tokenizer_config.json")["chat_template"])
    before = template.render(messages=MESSAGES[:2], add_generation_prompt=True)
    after = template.render(messages=MESSAGES, add_generation_prompt=True)
    assert after.startswith(before + "Hello!<|end|>")


@torch.inference_mode()
def test_the_packed_weights_have_learned_english(model: Any) -> None:
    text = list(HELD_OUT.encode())
    logits = model(torch.tensor([[SPECIAL_TOKENS["<|bos|>"], *text]])).logits[0, :-1]
    nats = torch.nn.functional.cross_entropy(logits.float(), torch.tensor(text))
    assert nats.item() / math.log(2) < LARGEST_BITS_PER_BYTE


@torch.inference_mode()
def test_an_answer_ends_by_itself_and_is_readable(model: Any) -> None:
    ids = [256, 259, *b"Hello!", 257, 260]
    prompt = len(ids)
    while ids[-1] != SPECIAL_TOKENS["<|end|>"] and len(ids) < prompt + 200:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert ids[-1] == SPECIAL_TOKENS["<|end|>"]
    answer = bytes(ids[prompt:-1]).decode()
    assert len(answer.split()) >= 3
    assert answer.isprintable()
