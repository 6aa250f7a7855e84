"""Model folders without weights for tests: the demo model's tokenizer and chat template, made here."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import tokenizers

if TYPE_CHECKING:
    from pathlib import Path

BOS, END, SYSTEM, USER, ASSISTANT = range(256, 261)
SPECIAL_TOKENS = ["<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCAB_SIZE = 320

CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {% if message['role'] not in ['system', 'user', 'assistant'] %}
        {{ raise_exception('unknown role ' + message['role']) }}
    {% endif %}
    {{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Token id == byte value below 256."""
    alphabet = _byte_alphabet()
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={character: byte for byte, character in alphabet.items()}, merges=[])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def byte_fallback_tokenizer() -> tokenizers.Tokenizer:
    """In the manner of Llama 2: pieces with a leading space mark, bytes for everything else."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for token in ("\u2581", "a", "b", "\u2581a", "\u2581b"):
        vocab[token] = len(vocab)
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=[("\u2581", "a"), ("\u2581", "b")], byte_fallback=True)
    )
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|bos|>", "eos_token": {"content": "<|end|>"}, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_config(folder: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 320, **sizes}
    (folder / "config.json").write_text(json.dumps(config))


def write_folder(folder: Path) -> Path:
    """A folder that passes for a model as long as nobody asks for its weights."""
    write_config(folder)
    write_tokenizer(folder)
    return folder


def chat_ids(*messages: tuple[int, str]) -> list[int]:
    """What the template and tokenizer make of (role id, text) pairs, written down independently of both."""
    ids = [BOS]
    for role, text in messages:
        ids += [role, *text.encode(), END]
    return [*ids, ASSISTANT]


def _byte_alphabet() -> dict[int, str]:
    decoded = {}
    unused = 256
    for byte in range(256):
        if chr(byte).isprintable() and byte not in (0x20, 0xA0, 0xAD):
            decoded[byte] = chr(byte)
        else:
            decoded[byte] = chr(unused)
            unused += 1
    return decoded
