"""The demo model's alphabet and chat format. The samples and the model folder share them.

A token is a byte. The five tokens above the bytes mark where a text, a message and a role begin or end.
"""

from typing import Final

VOCAB_SIZE: Final = 320
"""261 would do; a round number keeps matrix rows aligned. The model learns never to say the other 59."""

BOS: Final = 256
END: Final = 257
SPECIAL_TOKENS: Final = {"<|bos|>": BOS, "<|end|>": END, "<|system|>": 258, "<|user|>": 259, "<|assistant|>": 260}

CHAT_TEMPLATE: Final = (
    "<|bos|>{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

Message = tuple[str, str]
"""Role (system, user or assistant) and text."""


def encode_text(text: str) -> list[int]:
    """A plain document: `<|bos|>`, its bytes, `<|end|>`."""
    return [BOS, *text.encode(), END]


def encode_chat(messages: list[Message]) -> list[int]:
    """The same ids as the chat template gives, without the generation prompt."""
    ids = [BOS]
    for role, text in messages:
        ids += [SPECIAL_TOKENS[f"<|{role}|>"], *text.encode(), END]
    return ids
