"""python -m bench.simulator.compare: one policy against every preset, over several seeds.

A workload counts as won when the medians over the seeds of time to first token, p50 and p99, are at most 1.05 times
those of the best preset (each taken on its own: no preset need have both), and time per token p50 at most that of
round_robin plus 5 %.
"""

import argparse
import statistics
import sys
from collections.abc import Callable

from bench.simulator.__main__ import run
from bench.simulator.presets import PRESETS
from bench.simulator.report import Row
from bench.simulator.workloads import WORKLOADS
from warmroute._core import policy_names

MARGIN = 1.05
# A yardstick for hits, and no router's rule.
RIVALS = [name for name in PRESETS if name != "preset:affinity"]
ELEVEN = [f"W{number}" for number in range(1, 12)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.simulator.compare", description=__doc__)
    parser.add_argument("--policy", choices=policy_names(), default="least_cost")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=ELEVEN, metavar="W")
    arguments = parser.parse_args()
    print(
        f"| | {arguments.policy}: TTFT p50 / p99 ms | best preset p50 | best preset p99 | per token p50 ms "
        "| round_robin | predicted p50 / p95 / sum | won |\n|---|---|---|---|---|---|---|---|"
    )
    won = 0
    for name in arguments.workloads:
        rows: dict[str, list[Row]] = {}
        for seed in range(1, arguments.seeds + 1):
            workload = WORKLOADS[name](seed)
            for router in (arguments.policy, "round_robin", *RIVALS):
                rows.setdefault(router, []).append(run(workload, router, seed)[0])
            print(f"{name} seed {seed} done", file=sys.stderr, flush=True)
        won += _compare(name, arguments.policy, rows)
    print(f"\nwon {won} of {len(arguments.workloads)}, {arguments.seeds} seeds")


def _compare(name: str, policy: str, rows: dict[str, list[Row]]) -> bool:
    def middle(router: str, pick: Callable[[Row], float]) -> float:
        return statistics.median(pick(each) for each in rows[router])

    def best(pick: Callable[[Row], float]) -> tuple[float, str]:
        return min((middle(router, pick), router.removeprefix("preset:")) for router in RIVALS)

    first, last = middle(policy, lambda row: row.first_token_p50), middle(policy, lambda row: row.first_token_p99)
    step = middle(policy, lambda row: row.token_p50)
    (best_first, first_by), (best_last, last_by) = (
        best(lambda row: row.first_token_p50),
        best(lambda row: row.first_token_p99),
    )
    even_step = middle("round_robin", lambda row: row.token_p50)
    wins = first <= best_first * MARGIN and last <= best_last * MARGIN and step <= even_step * MARGIN
    p50, p95 = middle(policy, lambda row: row.prediction_p50), middle(policy, lambda row: row.prediction_p95)
    total = middle(policy, lambda row: row.prediction_sum)
    print(
        f"| {name} | {first * 1e3:.0f} / {last * 1e3:.0f} | {best_first * 1e3:.0f} {first_by} "
        f"| {best_last * 1e3:.0f} {last_by} | {step * 1e3:.1f} | {even_step * 1e3:.1f} "
        f"| {p50:.1%} / {p95:.1%} / {total:+.1%} | {'yes' if wins else 'no'} |",
        flush=True,
    )
    return wins


if __name__ == "__main__":
    main()
