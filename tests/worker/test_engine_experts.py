"""Experts on several ranks: what is sent, who computes it, and that experts really move."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.worker.driver_fixtures import drivers
from tests.worker.engine_fixtures import GREEDY, NEW_TOKENS, greedy, load_engine, make_model, make_reference
from warmroute_worker.executor import expert_balancing
from warmroute_worker.executor.trace import BACKGROUND
from warmroute_worker.layers.experts import Experts
from warmroute_worker.layers.router import Router
from warmroute_worker.messages import CountExperts, Generate, Profile

if TYPE_CHECKING:
    from tests.worker.engine_fixtures import Reference
    from warmroute_worker.offline_drivers import Drivers

SENT: dict[str, Any] = {"tp_size": 2, "moe_a2a_backend": "deepep"}
DP: dict[str, Any] = {"dp_size": 2, "enable_dp_attention": True}
BALANCED: dict[str, Any] = {
    "enable_eplb": True,
    "eplb_rebalance_num_iterations": 30,
    "eplb_min_rebalancing_utilization_threshold": 0.9,
}
TWO_BATCHES = {"enable_two_batch_overlap": True}

EXPERTS, PER_TOKEN, MOE_LAYERS, HIDDEN = 8, 2, 2, 64
"""Of the fixtures' DeepSeek-V3, whose first layer of three is dense."""


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(tmp_path_factory.mktemp("deepseek"), family="DeepseekV3")


def requests(reference: Reference, dp_size: int) -> list[tuple[int, Generate]]:
    return [
        (n % dp_size, Generate(str(n), prompt, NEW_TOKENS, sampling=GREEDY))
        for n, prompt in enumerate(reference.prompts)
    ]


def computed_tokens(reference: Reference) -> int:
    """Of one pass over the prompts, cold: the last new token of each is not computed."""
    return sum(map(len, reference.prompts)) + len(reference.prompts) * (NEW_TOKENS - 1)


def total(worker: Drivers, name: str) -> int:
    return sum(status[name] for status in worker.statuses())


@pytest.mark.parametrize("changes", [SENT, SENT | DP], ids=["tp", "dp attention"])
def test_rows_and_bytes_on_the_way(deepseek: Reference, changes: dict[str, Any]) -> None:
    """A row for each of a token's experts: tokens x top_k x layers. Otherwise a row for each rank that has some."""
    pairs = computed_tokens(deepseek) * PER_TOKEN * MOE_LAYERS
    sent = {}
    for rows in ("expert", "rank"):
        with drivers(deepseek.folder, ep_rows=rows, **changes) as worker:
            assert worker.answers(requests(deepseek, worker.args.dp_size)) == deepseek.answers
            sent[rows] = total(worker, "sent_rows")
            assert total(worker, "expert_rows") == pairs, "nothing is dropped, nothing is computed twice"
            # There: numbers, and slot and weight of each expert; back: numbers.
            experts = 1 if rows == "expert" else PER_TOKEN
            of_row = HIDDEN * 4 + experts * 8 + HIDDEN * 4
            assert total(worker, "all_to_all_bytes") == sent[rows] * of_row
    assert sent["expert"] == pairs
    assert pairs / 2 < sent["rank"] < pairs


def _all_to_two() -> None:
    """Every token wants the same two experts."""

    def chosen(self: Router, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        del self
        weights = torch.tensor([[0.75, 0.5]]).repeat(len(x), 1)
        return weights, torch.tensor([[0, 1]]).repeat(len(x), 1)

    Router.__call__ = chosen  # type: ignore[method-assign]


@pytest.mark.parametrize("changes", [SENT | DP, SENT | DP | TWO_BATCHES, DP | {"tp_size": 2, "ep_size": 2}])
def test_all_rows_to_one_rank(deepseek: Reference, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Router, "__call__", Router.__call__)  # put back afterwards
        _all_to_two()
        alone = [row.token_ids for row in greedy(load_engine(deepseek.folder), deepseek.prompts)]
    with drivers(deepseek.folder, _all_to_two, **changes) as worker:
        assert worker.answers(requests(deepseek, 2)) == alone
        first, second = worker.statuses()
        assert first["expert_rows"] == computed_tokens(deepseek) * PER_TOKEN * MOE_LAYERS
        assert second["expert_rows"] == 0


def _broken_expert(number: int) -> None:
    """Whoever owns this expert of the last layer has it wrong; `Experts` are made in the order of layers."""
    real = Experts.__init__

    def made(self: Experts, source: Any, name: str, *rest: Any) -> None:
        real(self, source, name, *rest)
        if ".layers.0." in name and number in self.slots and source.device.type != "meta":
            up, down = self._products[number - self.slots.start]
            self._products[number - self.slots.start] = up, lambda x: -down(x)

    Experts.__init__ = made  # type: ignore[assignment,method-assign]


@pytest.mark.parametrize(
    "changes",
    [SENT, {"tp_size": 2, "ep_size": 2}, pytest.param(SENT | DP, marks=pytest.mark.slow)],
    ids=["sent", "none", "dp"],
)
def test_an_expert_is_on_its_rank_only(
    tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken there, it changes the logits of those whose last token goes through it, and nobody else's. One layer, so
    that no other token has a say."""
    make_model(tmp_path, "Qwen3Moe", num_hidden_layers=1)
    prompts = [[(31 * n + 7 * k) % 320 for k in range(5 + n)] for n in range(24)]
    broken = 5
    through = _through(tmp_path, prompts, monkeypatch)
    expected = {n for n, experts in enumerate(through) if broken in experts}
    assert 0 < len(expected) < len(prompts)
    said = []
    for prepare in (None, functools.partial(_broken_expert, broken)):
        with drivers(tmp_path, prepare, **changes) as worker:
            dp = worker.args.dp_size
            asked = [
                (n % dp, Generate(str(n), prompt, 1, sampling=GREEDY.__class__(temperature=0, logprobs=5)))
                for n, prompt in enumerate(prompts)
            ]
            worker.answers(asked)
            said.append([worker.rows[str(n)][-1].logprobs for n in range(len(prompts))])
    changed = set()
    for n, (whole, bad) in enumerate(zip(*said, strict=True)):
        assert whole is not None
        assert bad is not None
        if abs(whole.own - bad.own) > 1e-3 or [t for t, _ in whole.top] != [t for t, _ in bad.top]:
            changed.add(n)
    assert changed == expected


def _through(folder: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The experts of each prompt's last token."""
    seen: list[list[int]] = []
    real = Router.__call__

    def watched(self: Router, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, chosen = real(self, x)
        seen.append(chosen[-1].tolist())
        return weights, chosen

    with monkeypatch.context() as patched:
        patched.setattr(Router, "__call__", watched)
        engine = load_engine(folder)
        for prompt in prompts:
            greedy(engine, [prompt], 1)
    return seen


def _zipf(seed: int = 0) -> None:
    """Experts are chosen as if by chance, but by the row alone: the n-th as often as 1/n.

    Sums in another order move a row by some 1e-6, which must hardly ever be enough for another expert.
    """
    popularity = 1 / torch.arange(1, EXPERTS + 1).double()
    borders = (popularity / popularity.sum()).cumsum(0)

    def chosen(self: Router, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        del self
        numbers = (x[:, :2].double().abs() * 7 + seed / 8) % 1
        first = torch.searchsorted(borders, numbers[:, 0].contiguous()).clamp(max=EXPERTS - 1)
        second = torch.searchsorted(borders, numbers[:, 1].contiguous()).clamp(max=EXPERTS - 1)
        second = torch.where(second == first, (first + 1) % EXPERTS, second)
        return torch.full((len(x), 2), 0.5), torch.stack((first, second), dim=1)

    Router.__call__ = chosen  # type: ignore[method-assign]


def _zipf_and_hashes(folder: str) -> None:
    """The same, and each rank writes down what its weights are before and after they move."""
    _zipf()
    real = expert_balancing.ExpertBalancer._move

    def moved(self: expert_balancing.ExpertBalancer, layer: Any, placed: list[int]) -> None:
        before = _hashes(layer)
        real(self, layer, placed)
        line = {"layer": layer.number, "before": before, "after": _hashes(layer), "placed": placed}
        with (Path(folder) / f"moves-{self._stage.rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    expert_balancing.ExpertBalancer._move = moved  # type: ignore[method-assign]


def _hashes(layer: Any) -> dict[int, str]:
    """Of the weights in each slot of this rank."""
    up, down = layer.experts.weights
    return {
        slot: hashlib.sha256(up[n].numpy().tobytes() + down[n].numpy().tobytes()).hexdigest()
        for n, slot in enumerate(layer.experts.slots)
    }


@pytest.mark.parametrize(
    "changes",
    [
        SENT | {"tp_size": 4, "ep_num_redundant_experts": 4},
        pytest.param(
            {"tp_size": 4, "ep_size": 4, "ep_num_redundant_experts": 4, "eplb_rebalance_layers_per_chunk": 1},
            marks=pytest.mark.slow,
        ),
        pytest.param(SENT | DP | {"tp_size": 4, "ep_num_redundant_experts": 4}, marks=pytest.mark.slow),
        pytest.param(
            {"tp_size": 4, "ep_size": 2, "moe_runner_backend": "grouped_mm"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["sent", "none", "dp attention", "halves of experts"],
)
def test_experts_move_to_where_there_is_least_to_do(
    deepseek: Reference, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """8 experts wanted as 1, 1/2, 1/3 ...: the ranks have very different loads before, and equal ones after."""
    plain = {name: value for name, value in changes.items() if not name.startswith(("eplb", "ep_num"))}
    with drivers(deepseek.folder, _zipf, **plain) as worker:
        answers = worker.answers(requests(deepseek, worker.args.dp_size))
        rows = [rank["expert_rows"] for rank in worker.statuses()]
        before = sum(rows) / len(rows) / max(rows)
    changes = changes | BALANCED | {"ep_dispatch_algorithm": "dynamic"}
    with drivers(deepseek.folder, functools.partial(_zipf_and_hashes, str(tmp_path)), **changes) as worker:
        for _ in range(3):  # before, during and after it moves
            assert worker.answers(requests(deepseek, worker.args.dp_size)) == answers
        assert total(worker, "moved_experts") > 0
        start = [rank["expert_rows"] for rank in worker.statuses()]
        assert worker.answers(requests(deepseek, worker.args.dp_size)) == answers
        rows = [rank["expert_rows"] - old for rank, old in zip(worker.statuses(), start, strict=True)]
        after = sum(rows) / len(rows) / max(rows)
    ep = worker.args.layout.ep_size
    print(f"balancedness of computed rows over {ep} parts: {before:.2f} before, {after:.2f} after")
    assert before <= (0.6 if ep == 4 else 0.75)
    assert after >= 0.9
    _check_moves(tmp_path, worker)


def _check_moves(folder: Path, worker: Drivers) -> None:
    """Whatever a slot is said to hold afterwards has the weights that expert had before, wherever it was."""
    by_rank = [
        [json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.glob("moves-*.jsonl"))
    ]
    size = worker.args.layout.expert_tp_size
    assert len(by_rank) == worker.args.tp_size
    moved = 0
    for share in range(size):
        first = list(range(EXPERTS)) + list(range(worker.args.ep_num_redundant_experts))
        maps: dict[int, list[int]] = {}
        for lines in zip(*by_rank[share::size], strict=True):
            layer = lines[0]["layer"]  # one that has nothing to gain does not move
            now = maps.get(layer, first)
            weights = {now[int(slot)]: digest for line in lines for slot, digest in line["before"].items()}
            assert len(set(weights.values())) == EXPERTS
            for line in lines:
                assert (line["layer"], line["placed"]) == (layer, lines[0]["placed"])
                for slot, digest in line["after"].items():
                    assert digest == weights[line["placed"][int(slot)]]
                    moved += digest != line["before"][slot]
            maps[layer] = lines[0]["placed"]
    assert moved > 0


@pytest.mark.parametrize("changes", [pytest.param(SENT, marks=pytest.mark.slow), SENT | DP], ids=["tp", "dp attention"])
def test_two_batches_overlap(deepseek: Reference, tmp_path: Path, changes: dict[str, Any]) -> None:
    """The same tokens; and while rows of one half are on their way, something of the other is computed."""
    for overlap in (False, True):
        folder = tmp_path / str(overlap)
        with drivers(deepseek.folder, chunked_prefill_size=64, enable_two_batch_overlap=overlap, **changes) as worker:
            dp = worker.args.dp_size
            for rank in range(dp):
                worker.send(rank, Profile(1, str(folder)))
            worker.until(lambda worker=worker, dp=dp: len(worker.replies) == dp)  # type: ignore[misc]
            assert worker.answers(requests(deepseek, dp)) == deepseek.answers
            for rank in range(dp):
                worker.send(rank, Profile(2, None))
            worker.until(lambda worker=worker, dp=dp: len(worker.replies) == 2 * dp)  # type: ignore[misc]
            assert (total(worker, "overlap_ns") > 0) is overlap
        overlapping = [_overlapping(path) for path in sorted(folder.glob("rank*.trace.json"))]
        assert len(overlapping) == 2
        assert all(names["experts of the other half"] > 0 for names in overlapping) is overlap


def _overlapping(path: Path) -> Counter[str]:
    """How many of the collectives that bring rows back have operations of the same rank in their time. Without halves a
    rank waits for them."""
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]
    operations = [
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "cpu_op" and event["tid"] != BACKGROUND
    ]
    assert operations
    found: Counter[str] = Counter()
    for event in events:
        if event.get("tid") == BACKGROUND and event["name"] == "combine":
            low, high = event["ts"], event["ts"] + event["dur"]
            found["experts of the other half"] += any(low < begin and end < high for begin, end in operations)
    return found


def test_the_distribution_is_recorded(deepseek: Reference, tmp_path: Path) -> None:
    with drivers(deepseek.folder, **SENT) as worker:

        def ask(order: str) -> Any:
            worker.send(0, CountExperts(len(worker.replies), order))
            wanted = len(worker.replies) + 1
            worker.until(lambda: len(worker.replies) == wanted)
            return worker.replies[-1][1]

        refused = ask(f"dump experts:{tmp_path}")
        assert (refused.ok, "start_expert_distribution_record" in refused.message) == (False, True)
        assert ask("start experts").ok
        assert worker.answers(requests(deepseek, 1)) == deepseek.answers
        assert ask(f"dump experts:{tmp_path}").ok
        files = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("experts-rank*.json"))]
        counted = sum(sum(layer["rows_by_expert"]) for of_rank in files for layer in of_rank)
        assert counted == computed_tokens(deepseek) * PER_TOKEN * MOE_LAYERS
        assert ask("stop experts").ok
        assert not ask(f"dump experts:{tmp_path}").ok
