"""What each worker of `launch_server` is given."""

from pathlib import Path

import pytest

from warmroute.worker_plan import cuda_devices, plan_workers

PLANS = [
    (2, False, [], 2, 1, ["--threads", "4"]),
    (3, False, ["--threads", "1"], 3, 1, ["--threads", "1"]),
    (3, False, ["--threads=1"], 3, 1, ["--threads=1"]),
    (1, False, ["--tp", "2"], 1, 1, ["--tp", "2", "--threads", "4"]),
    (2, False, ["--tp-size=2", "--pp-size", "2"], 2, 1, ["--tp-size=2", "--pp-size", "2", "--threads", "1"]),
    (1, False, ["--tensor-parallel-size", "4"], 1, 1, ["--tensor-parallel-size", "4", "--threads", "2"]),
    (1, False, ["--tp", "x"], 1, 1, ["--tp", "x", "--threads", "8"]),
    (1, False, ["--page-size", "8", "--tp"], 1, 1, ["--page-size", "8", "--tp", "--threads", "8"]),
    (16, False, [], 16, 1, ["--threads", "1"]),
    (2, True, ["--tp", "2"], 1, 2, ["--tp", "2", "--dp-size", "2", "--enable-dp-attention", "--threads", "4"]),
    (1, True, ["--tp", "2"], 1, 1, ["--tp", "2", "--dp-size", "1", "--enable-dp-attention", "--threads", "4"]),
]


@pytest.mark.parametrize(("dp_size", "dp_attention", "rest", "count", "targets", "flags"), PLANS)
def test_plan(dp_size: int, dp_attention: bool, rest: list[str], count: int, targets: int, flags: list[str]) -> None:
    plan = plan_workers("m", dp_size, dp_attention, rest, cores=8)
    assert (plan.count, plan.targets, list(plan.flags)) == (count, targets, ["--model-path", "m", *flags])
    assert all(plan.environment(index) == {} for index in range(count)), "no CUDA, no devices"


DEVICES = [
    (2, "--tp 2", "0 1 2 3", ["0,1", "2,3"]),
    (2, "--tp 1 --pp-size 2", "0 1 2 3 4", ["0,1", "2,3"]),
    (1, "--tp 2 --device cuda", "5 GPU-a", ["5,GPU-a"]),
    (2, "--tp 2", "0 1 2", ["0,1", "2,0"]),
    (3, "", "0", ["0", "0", "0"]),
    (1, "--tp 4", "0 1", ["0,1"]),
    (2, "--device cpu", "0 1", [None, None]),
    (2, "--device=cpu", "0 1", [None, None]),
    (2, "", "", [None, None]),
]


@pytest.mark.parametrize(("dp_size", "rest", "devices", "visible"), DEVICES)
def test_devices(dp_size: int, rest: str, devices: str, visible: list[str | None]) -> None:
    plan = plan_workers("m", dp_size, False, rest.split(), 8, devices.split())
    assert [plan.environment(index).get("CUDA_VISIBLE_DEVICES") for index in range(plan.count)] == visible


@pytest.mark.parametrize(
    ("dp_size", "devices", "shares"), [(2, "0 1 2 3", False), (2, "0 1 2", True), (2, "0", True), (2, "", False)]
)
def test_workers_that_share_devices_are_told_of_memory(dp_size: int, devices: str, shares: bool) -> None:
    remarks = plan_workers("m", dp_size, False, ["--tp", "2"], 8, devices.split()).remarks()
    assert any("--mem-fraction-static" in line for line in remarks) == shares


def test_one_worker_with_fewer_devices_than_ranks_shares_them_itself() -> None:
    assert plan_workers("m", 1, False, ["--tp", "4"], 8, ["0", "1"]).remarks() == []


@pytest.mark.parametrize(
    ("listed", "devices"),
    [("0,1", ("0", "1")), ("3, GPU-ab", ("3", "GPU-ab")), ("", ()), ("-1", ()), ("2,-1,3", ("2",))],
)
def test_visible_devices_are_those_of_the_environment(listed: str, devices: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    assert cuda_devices({"CUDA_VISIBLE_DEVICES": listed}, tmp_path) == devices


def test_devices_are_counted_from_0_whatever_their_files_are_called(tmp_path: Path) -> None:
    assert cuda_devices({}, tmp_path) == ()
    for name in ("nvidia3", "nvidia11", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert cuda_devices({}, tmp_path) == ("0", "1")
