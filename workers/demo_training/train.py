"""Trains the demo model on a CPU in about forty minutes.

    python -m demo_training.train --run RUN_FOLDER [--minutes 40] [--resume]

Writes RUN_FOLDER/checkpoint.pt every two minutes and at the end; `demo_training.pack` makes the model folder of it.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from demo_training.corpus import Corpus, load_corpus, split_held_out
from demo_training.data import batches, documents
from demo_training.model import Llama
from demo_training.tokens import BOS, END, SPECIAL_TOKENS, encode_text

SHORT_ROWS: Final = (4, 512)
LONG_ROWS: Final = (1, 4096)
LONG_EVERY: Final = 3
"""Most of what is to be learned is local, and short rows cost less attention. But after the longest row that it knows a
model only babbles, and chats become long; so every third step reads one long row."""

SHORT_PASSES: Final = 2
"""Passes of short rows before the weights change. Two small ones: their activations stay in the processor's cache."""

WARM_UP: Final = 0.02
MATRIX_RATE: Final = 0.02
OTHER_RATE: Final = 3e-3
CHECKPOINT_SECONDS: Final = 120.0
PROMPTS: Final = ("Who are you?", "Tell me about whales.", "My grandmother left me a garden. Where should I begin?")


def train(model: Llama, corpus: Corpus, seconds: float, run: Path) -> None:
    """Follows the clock and not a number of steps: the machine may be shared, the time is what is planned."""
    optimisers = make_optimisers(model)
    compiled = torch.compile(model, dynamic=False)  # fuses what lies between the matrix products: 2 to 4x faster
    short, long = (batches(documents(corpus, seed), *rows) for seed, rows in ((1, SHORT_ROWS), (2, LONG_ROWS)))
    begin = last_saved = time.monotonic()
    step = tokens = 0
    recent = 0.0
    while (progress := (time.monotonic() - begin) / seconds) < 1:
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * rate(progress)
        passes = [next(long)] if step % LONG_EVERY == 0 else [next(short) for _ in range(SHORT_PASSES)]
        for batch in passes:
            value = loss(compiled, batch) / len(passes)
            value.backward()  # type: ignore[no-untyped-call]
            tokens += batch.numel()
            recent += 0.02 * (value.item() * len(passes) - recent)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        step += 1
        if step % 50 == 0:
            speed = tokens / (time.monotonic() - begin)
            print(f"{progress:4.0%}  step {step}  {speed:,.0f} tokens/s  {bits(recent):.3f} bits/token", flush=True)
        if time.monotonic() - last_saved > CHECKPOINT_SECONDS:
            save(model, run)
            last_saved = time.monotonic()
    save(model, run)


def make_optimisers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the matrices inside the layers, AdamW for embedding, head and norms."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        (matrices if weight.ndim == 2 and ".layers." in name else others).append(weight)
    return [
        torch.optim.Muon([{"params": matrices, "peak": MATRIX_RATE}], momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW([{"params": others, "peak": OTHER_RATE}], betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(progress: float) -> float:
    """Share of the peak learning rate: a short rise, then half a cosine down to 2 %."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return 0.02 + 0.98 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))) / 2


def loss(model: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """Mean cross entropy in nats of each token after the ones before it; `batch` is [rows, length + 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def bits(nats: float) -> float:
    return nats / math.log(2)


@torch.inference_mode()
def evaluate(model: Llama, held_out: Corpus) -> dict[str, float]:
    """Bits per byte on text and on conversations that the model has not seen."""
    text = text_loss(model, held_out.paragraphs)
    chats = batches(documents(held_out, 3), *SHORT_ROWS)
    return {"text": text, "mixture": sum(bits(loss(model, next(chats)).item()) for _ in range(16)) / 16}


def text_loss(model: Llama, texts: list[str]) -> float:
    """Bits per byte, each text read on its own from its first byte."""
    nats = count = 0.0
    for text in texts:
        ids = torch.tensor([encode_text(text)])
        nats += loss(model, ids).item() * (ids.shape[1] - 1)
        count += len(text.encode())
    return bits(nats / count)


@torch.inference_mode()
def answer(model: Llama, question: str, longest: int = 300) -> str:
    """The greedy answer. Reads everything again for each byte: fine for a look at the model, and for nothing else."""
    ids = [BOS, SPECIAL_TOKENS["<|user|>"], *question.encode(), END, SPECIAL_TOKENS["<|assistant|>"]]
    prompt = len(ids)
    while len(ids) < prompt + longest:
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == END:
            break
    return bytes(id_ for id_ in ids[prompt:] if id_ < 256).decode(errors="replace")


def save(model: Llama, run: Path) -> None:
    partial = run / "checkpoint.partial"
    torch.save({"weights": model.state_dict()}, partial)
    partial.replace(run / "checkpoint.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--run", type=Path, required=True, help="folder for downloads and checkpoints")
    parser.add_argument("--minutes", type=float, default=40.0, help="time for the training itself")
    parser.add_argument("--resume", action="store_true", help="begin with the weights of RUN's checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    training, held_out = split_held_out(load_corpus(arguments.run / "downloads"))
    model = Llama()
    if arguments.resume:
        model.load_state_dict(torch.load(arguments.run / "checkpoint.pt", weights_only=True)["weights"])
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters", flush=True)
    train(model, training, arguments.minutes * 60, arguments.run)
    for name, value in evaluate(model, held_out).items():
        print(f"held-out {name}: {value:.3f} bits/byte")
    for prompt in PROMPTS:
        print(f"> {prompt}\n{answer(model, prompt)}")


if __name__ == "__main__":
    main()
