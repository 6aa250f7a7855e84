"""`make demo`: five conversations through the router, then the same load with round robin, and what that costs.

Exits 1 when the cache stayed cold where it should be warm: the demo is also a test.
"""

import shutil
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import openai

from bench.conversations import CONVERSATIONS, TURNS, Conversation
from bench.stack import LOGS, Router, Worker, flush, start_router, start_workers
from tests.processes import REPOSITORY, ProcessError, Processes, request_json

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam

MAX_TOKENS = 64
WANTED_RATIO = 1.5
ANSWER_COLUMNS = 48

COLUMNS = ("conversation", "turn", "worker", "prompt tokens", "cached tokens", "first token", "answer")
WIDTHS = (12, 4, 8, 13, 13, 11, ANSWER_COLUMNS)


@dataclass(frozen=True)
class Turn:
    conversation: str
    turn: int
    worker: str
    prompt_tokens: int
    cached_tokens: int
    first_token_seconds: float
    seconds: float
    answer: str


@dataclass(frozen=True)
class Result:
    """One pass over all conversations."""

    turns: list[Turn]

    @property
    def hit_rate(self) -> float:
        return sum(turn.cached_tokens for turn in self.turns) / sum(turn.prompt_tokens for turn in self.turns)

    def mean_first_token_seconds(self) -> float:
        """Over the turns after the first: only there can a cache help."""
        later = [turn.first_token_seconds for turn in self.turns if turn.turn > 1]
        return sum(later) / len(later)

    def seconds(self) -> float:
        return sum(turn.seconds for turn in self.turns)


class DemoError(Exception):
    """The demo ran, and did not show what it is for."""


def main() -> None:
    shutil.rmtree(LOGS, ignore_errors=True)
    step = "starting"
    try:
        with Processes(LOGS) as processes:
            step = "starting two workers on the demo model"
            say(f"{step} (logs: {LOGS.relative_to(REPOSITORY)}/)")
            workers = start_workers(processes)
            results = {}
            for policy in ("cache_aware", "round_robin"):
                step = f"running the conversations with --policy {policy}"
                flush(workers)
                router = start_router(processes, workers, policy)
                say(f"\n{policy}: {len(CONVERSATIONS)} conversations of {TURNS} turns through {router.url}\n")
                results[policy] = converse_all(router, workers)
                processes.stop(router.process)
            step = "stopping"
        judge(results["cache_aware"], results["round_robin"])
    except (ProcessError, openai.OpenAIError, OSError, DemoError) as error:
        sys.exit(f"\ndemo: failed while {step}: {error}\ndemo: the logs are in {LOGS}")
    except KeyboardInterrupt:
        sys.exit("\ndemo: interrupted")


def converse_all(router: Router, workers: list[Worker]) -> Result:
    """All first turns, then all second turns, and so on; prints a row as each ends."""
    names = worker_names(router, workers)
    histories: dict[str, list[ChatCompletionMessageParam]] = {
        conversation.name: [{"role": "system", "content": conversation.system}] for conversation in CONVERSATIONS
    }
    print_row(COLUMNS)
    print_row(tuple("─" * width for width in WIDTHS))
    turns = []
    with openai.OpenAI(base_url=router.url + "/v1", api_key="unused", max_retries=0, timeout=60) as client:
        for number in range(1, TURNS + 1):
            for conversation in CONVERSATIONS:
                turn = converse(client, conversation, number, histories[conversation.name], names)
                turns.append(turn)
                print_turn(turn)
    return Result(turns)


def converse(
    client: openai.OpenAI,
    conversation: Conversation,
    number: int,
    history: "list[ChatCompletionMessageParam]",
    names: dict[str, str],
) -> Turn:
    """Ask the question of turn `number`, stream the answer, append both to `history`."""
    history.append({"role": "user", "content": conversation.questions[number - 1]})
    start = time.perf_counter()
    first_token = -1.0
    pieces = []
    usage = None
    response = client.chat.completions.with_raw_response.create(
        model="demo",
        messages=history,
        max_tokens=MAX_TOKENS,
        temperature=0.7,
        seed=number,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in response.parse():
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            first_token = time.perf_counter() - start if first_token < 0 else first_token
            pieces.append(piece)
        usage = chunk.usage or usage
    if usage is None or usage.prompt_tokens_details is None:
        raise DemoError(f"{conversation.name}, turn {number}: the answer carries no usage")
    answer = "".join(pieces)
    history.append({"role": "assistant", "content": answer})
    worker_id = response.headers.get("x-warmroute-worker", "")
    return Turn(
        conversation=conversation.name,
        turn=number,
        worker=names.get(worker_id, worker_id or "?"),
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.prompt_tokens_details.cached_tokens or 0,
        first_token_seconds=first_token,
        seconds=time.perf_counter() - start,
        answer=answer,
    )


def worker_names(router: Router, workers: list[Worker]) -> dict[str, str]:
    """Worker id, as in the response header, to the name of our process."""
    _, answer = request_json("GET", router.url + "/workers")
    assert isinstance(answer, dict)
    by_url = {worker.url: worker.name for worker in workers}
    return {entry["id"]: by_url.get(entry["url"], entry["url"]) for entry in answer["workers"]}


def judge(warm: Result, cold: Result) -> None:
    """Print the comparison. Raises DemoError when the router did not do its job."""
    ratio = warm.hit_rate / cold.hit_rate if cold.hit_rate else float("inf")
    say(
        f"\nhit rate: cache_aware {warm.hit_rate:.0%}, round_robin {cold.hit_rate:.0%} ({ratio:.1f}x); "
        f"first token after turn 1: {warm.mean_first_token_seconds() * 1000:.0f} ms against "
        f"{cold.mean_first_token_seconds() * 1000:.0f} ms; "
        f"all turns: {warm.seconds():.1f} s against {cold.seconds():.1f} s"
    )
    silent = [turn for turn in warm.turns + cold.turns if not turn.answer.strip()]
    if silent:
        raise DemoError(f"{silent[0].conversation}, turn {silent[0].turn}: the answer is empty")
    for turn in warm.turns:
        if turn.turn > 1 and turn.cached_tokens == 0:
            raise DemoError(f"cache_aware: {turn.conversation}, turn {turn.turn} found nothing in the cache")
    if ratio < WANTED_RATIO:
        raise DemoError(
            f"the hit rate of cache_aware is {ratio:.2f}x that of round_robin; {WANTED_RATIO}x was expected"
        )


def print_turn(turn: Turn) -> None:
    answer = " ".join(turn.answer.split())
    shortened = answer if len(answer) <= ANSWER_COLUMNS else answer[: ANSWER_COLUMNS - 1] + "…"
    print_row(
        (
            turn.conversation,
            str(turn.turn),
            turn.worker,
            str(turn.prompt_tokens),
            str(turn.cached_tokens),
            f"{turn.first_token_seconds * 1000:.0f} ms",
            shortened,
        )
    )


def print_row(cells: tuple[str, ...]) -> None:
    """Numbers to the right, words to the left."""
    aligned = [
        cell.rjust(width) if 3 <= position <= 5 else cell.ljust(width)
        for position, (cell, width) in enumerate(zip(cells, WIDTHS, strict=True))
    ]
    say(" │ ".join(aligned).rstrip())


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
