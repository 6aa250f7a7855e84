"""Writes a trained checkpoint as the folder that ships with the worker: int8 weights, configuration, tokenizer.

    python -m demo_training.pack CHECKPOINT [--folder FOLDER]

Every matrix is stored as int8 with one float32 scale per output row (`weight = int8 * scale[:, None]`); a byte per
parameter is what makes three million of them small enough to live in the repository.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from demo_training.model import Llama, Shape
from demo_training.tokens import BOS, CHAT_TEMPLATE, END, SPECIAL_TOKENS, encode_chat

MODEL_FOLDER: Final = Path(__file__).parents[1] / "warmroute_worker" / "demo_model"

LARGEST_LOGIT_ERROR: Final = 1.0
"""int8 moves no logit of the probe by more than 0.6 in the shipped model; a broken scale moves them by several."""


def pack(weights: dict[str, Tensor], shape: Shape, folder: Path) -> float:
    """Writes the folder and returns the largest absolute error of a logit that rounding caused.

    Raises ValueError when that error is too large to be rounding.
    """
    stored: dict[str, Tensor] = {}
    restored: dict[str, Tensor] = {}
    for name, weight in weights.items():
        stored[name] = restored[name] = weight.float()
        if weight.ndim == 2:
            stored[name], scale = quantise(weight.float())
            stored[f"{name}_scale"] = scale
            restored[name] = stored[name] * scale[:, None]

    error = largest_logit_difference(weights, restored, shape)
    if error > LARGEST_LOGIT_ERROR:
        raise ValueError(f"int8 moves a logit by {error:.2f}, more than {LARGEST_LOGIT_ERROR}")

    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    files = {
        "config.json": model_config(shape),
        "generation_config.json": {"bos_token_id": BOS, "eos_token_id": END},
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": tokenizer_config(shape),
    }
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return error


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [rows, columns] -> int8 [rows, columns] and float32 scale [rows]; the largest entry of a row is 127."""
    scale = weight.abs().amax(dim=1).clamp(min=1e-8) / 127
    return torch.round(weight / scale[:, None]).to(torch.int8), scale


def largest_logit_difference(weights: dict[str, Tensor], others: dict[str, Tensor], shape: Shape) -> float:
    probe = torch.tensor([encode_chat([("user", "What is a cache?"), ("assistant", "A cache keeps what was costly.")])])
    logits = []
    model = Llama(shape)
    for state in (weights, others):
        model.load_state_dict(state)
        with torch.inference_mode():
            logits.append(model(probe))
    return float((logits[0] - logits[1]).abs().max())


def model_config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(shape),
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": END,
        "torch_dtype": "float32",
        "quantization_config": {"quant_method": "int8_per_channel"},
    }


def tokenizer() -> dict[str, Any]:
    """A byte-level BPE without merges, so that id and byte are the same number."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": id_,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for content, id_ in SPECIAL_TOKENS.items()
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": byte_letters() | SPECIAL_TOKENS,
            "merges": [],
        },
    }


def byte_letters() -> dict[str, int]:
    """The printable letter that byte-level tokenizers write for each byte (GPT-2's `bytes_to_unicode`) -> the byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte if byte in printable else 256 + others.index(byte)): byte for byte in range(256)}


def tokenizer_config(shape: Shape) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "model_max_length": shape.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint as the demo model's folder.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--folder", type=Path, default=MODEL_FOLDER)
    arguments = parser.parse_args()
    checkpoint = torch.load(arguments.checkpoint, weights_only=True)
    error = pack(checkpoint["weights"], Shape(), arguments.folder)
    size = sum(file.stat().st_size for file in arguments.folder.iterdir())
    print(f"{arguments.folder}: {size:,} bytes, int8 moved the probe's logits by at most {error:.3f}")


if __name__ == "__main__":
    main()
