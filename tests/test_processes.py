"""Several processes give the numbers of one: gloo on the CPU, two processes, tiny models of random weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import outcome

from textrl_gym import functional, processes
from textrl_gym.cli import main
from textrl_gym.training import run_folder

SHARDED = "ppo+shard"  # PPO has a value head besides
SUPERVISED = ("sft+shard", "sft+shard+checkpointed", "reward-model+shard", "reward-model+shard+lora")
WORKS = ("grpo", "ppo", "dpo", "raft", SHARDED, "grpo+shard+lora", "sft", "reward-model", *SUPERVISED)
UPDATES = 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what one process has come to in 1/ and what two have in 2/."""
    folder = tmp_path_factory.mktemp("ranks")
    script = str(Path(__file__).with_name("ranks.py"))
    command = [
        sys.executable,
        script,
        str(folder),
        "--work",
        *WORKS,
        "primitives",
        "compared",
        "--updates",
        str(UPDATES),
    ]
    done = subprocess.run(command, timeout=600, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


# -- the primitives ---------------------------------------------------------------------------------------------------


def test_one_process_needs_no_group() -> None:
    assert (processes.size(), processes.rank(), processes.is_first(), processes.launched()) == (1, 0, True, False)
    with processes.join():  # without WORLD_SIZE nothing is joined, and nothing needs torch.distributed
        assert processes.size() == 1
    tensor, parts = torch.ones(2), [1, 2, 3]
    assert processes.total(tensor) is tensor and processes.deal(parts) is parts
    assert not processes.is_dealt()
    assert processes.share(5) == slice(0, 5)
    assert processes.gather("a") == ["a"] and processes.from_first(lambda: 3) == 3 and processes.most(4) == 4


def answers(runs: Path, rank: int) -> dict[str, object]:
    return json.loads((runs / "2" / f"primitives-{rank}.json").read_text())


def test_blocks_of_units_are_neighbours_and_all_there(runs: Path) -> None:
    # Of one unit the first process has none: 1 * 1 // 2 = 0. Of five it has 5 // 2 = 2.
    assert answers(runs, 0)["blocks"] == [[0, 0], [0, 2]]
    assert answers(runs, 1)["blocks"] == [[0, 1], [2, 5]]


def test_gradients_of_dealt_parts_are_summed_once(runs: Path) -> None:
    assert [answers(runs, rank)["parts"] for rank in (0, 1)] == [[1.0, 4.0], [2.0]]
    for rank in (0, 1):
        # 1 + 4 of the one and 2 of the other; a parameter that only one has used is 0 in the other; one that nobody
        # has used keeps no gradient, by which AdamW would move it.
        assert answers(runs, rank)["gradients"] == [[7.0, 7.0], [1.0, 1.0], None]


def test_processes_hear_of_each_other(runs: Path) -> None:
    for rank in (0, 1):
        of_rank = answers(runs, rank)
        assert of_rank["total"] == [2.0, 1.0]
        assert of_rank["total_of"] == {"both": 2.0, "of 0": 2.0, "of 1": 2.0}
        assert of_rank["gather"] == ["I am 0", "I am 1"]
        assert (of_rank["from_first"], of_rank["most"]) == (10, 1)
        assert of_rank["difference"] == "the weight must be the same in every process, and differs: [0, 1]"


def test_batches_are_halved_to_a_number_for_each_process() -> None:
    # The largest first, and the first of equals: [0..4] becomes [0, 1] and [2, 3, 4].
    assert functional.halved([[0, 1, 2, 3, 4], [5, 6]], 3) == [[0, 1], [2, 3, 4], [5, 6]]
    assert functional.halved([[0, 1], [2]], 1) == [[0, 1], [2]]
    assert functional.halved([[0], [1], [2]], 2) == [[0], [1], [2]]  # nothing is left to halve


# -- training ---------------------------------------------------------------------------------------------------------


def assert_same_weights(name: str, one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        # The gradient of attention's key bias is 0 but for rounding, since it adds the same to all of a query's scores;
        # Adam with its usual epsilon makes whole steps of what is rounded otherwise.
        if key.endswith(("k_proj.bias", "c_attn.bias")) or key in ("held", "reference"):
            continue
        difference = float((two[key].double() - tensor.double()).abs().max())
        assert difference < 1e-6, (name, key)


@pytest.mark.parametrize("name", WORKS)
def test_two_processes_train_as_one(name: str, runs: Path) -> None:
    one, logged = outcome(runs / "1", name)
    assert len(logged) >= UPDATES
    for rank in (0, 1):
        two, logged_by_two = outcome(runs / "2", name, rank)
        assert_same_weights(name, one, two)
        for before, now in zip(logged, logged_by_two, strict=True):
            timeless = {key for key in before if not key.startswith("time")}
            assert timeless == {key for key in now if not key.startswith("time")}
            for key in timeless:
                assert now[key] == pytest.approx(before[key], abs=1e-5), (name, key)


def test_a_run_of_a_comparison_by_two_processes_is_that_of_one(runs: Path) -> None:
    one, two = (runs / size / "compared" / "runs" / "grpo-0" for size in ("1", "2"))
    numbers, machines, costs = (
        [json.loads((run / name).read_text()) for run in (one, two)]
        for name in ("evaluation.json", "machine.json", "flops.json")
    )
    for of_run in numbers:
        of_run.pop("train_seconds")
    assert numbers[1] == pytest.approx(numbers[0], abs=1e-5)
    assert [machine["processes"] for machine in machines] == [1, 2]
    assert costs[0]["tokens"] == costs[1]["tokens"]
    # Of both processes: a prompt that both have rows of is computed twice.
    assert costs[0]["flop"] <= costs[1]["flop"] * 1.01 and costs[1]["flop"] < 1.2 * costs[0]["flop"]
    for name in ("episodes.jsonl", "credit.jsonl", "progress.json"):
        rows = [len((run / name).read_text().splitlines()) for run in (one, two)]
        assert rows[0] == rows[1] > 0, name


def test_each_process_holds_its_part(runs: Path) -> None:
    # Also that fully_shard averages over processes, and does not sum, as its older versions did over gloo
    # (pytorch issue 162338): above, the weights of a sharded run are those of one process.
    parts = [outcome(runs / "2", SHARDED, rank)[0] for rank in (0, 1)]
    trained = int(parts[0]["trained"])
    assert sum(int(part["held"]) for part in parts) == trained == int(outcome(runs / "1", SHARDED)[0]["held"])
    # Tensors are cut by rows: of an odd number one process has one more, and of the value head one has all.
    assert all(0.45 * trained < int(part["held"]) < 0.55 * trained for part in parts)
    # Of the reference, which no update needs, half a process while it goes on; replicated all of it.
    whole = int(outcome(runs / "2", "ppo")[0]["reference"])
    assert all(0.5 * whole <= int(part["reference"]) < 0.51 * whole for part in parts)
    # With a LoRA the reference is the policy's own model, which is sharded with it.
    assert int(outcome(runs / "2", "grpo+shard+lora")[0]["held"]) < 0.55 * int(
        outcome(runs / "2", "grpo+shard+lora")[0]["trained"]
    )


@pytest.mark.parametrize("name", SUPERVISED)
def test_each_process_holds_its_part_of_supervised_moments(name: str, runs: Path) -> None:
    one, *two = (
        json.loads((runs / size / f"{name}-{rank}-held.json").read_text())
        for size, rank in (("1", 0), ("2", 0), ("2", 1))
    )
    assert one["held"] == one["moments"] == sum(part["held"] for part in two) > 0
    for part in two:
        assert part["steps"] == one["steps"] and part["moments"] == one["moments"]
        assert 0.4 * one["held"] < part["held"] < 0.6 * one["held"]
    whole = json.loads((runs / "2" / "sft-1-held.json").read_text())
    assert whole["held"] == whole["moments"]  # replicated, each holds all


@pytest.mark.parametrize("name", ["grpo", "ppo", "dpo", SHARDED])
def test_first_process_alone_writes_and_evaluations_are_of_all_rows(name: str, runs: Path) -> None:
    one, two = (runs / size / f"run-{name}" for size in ("1", "2"))
    # Two writers of one log would leave twice the rows.
    of_one, of_two = run_folder.read_run(one), run_folder.read_run(two)
    assert len(of_one.evaluations) == len(of_two.evaluations) >= 2
    for before, now in zip(of_one.evaluations, of_two.evaluations, strict=True):
        numbers = {key for key in before if key != "train_seconds"}
        assert {key: now[key] for key in numbers} == pytest.approx({key: before[key] for key in numbers}, abs=1e-5)
    texts = [[(s["prompt"], s["completion"]) for s in run.samples] for run in (of_one, of_two)]
    assert texts[0] == texts[1] and texts[0]
    assert len(of_one.rollouts) == len(of_two.rollouts) == UPDATES
    assert {p.name for p in one.iterdir() if "tfevents" not in p.name} == {
        p.name for p in two.iterdir() if "tfevents" not in p.name
    }


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_other_commands_are_refused_under_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    assert main.main(["compare", "CopyText-v0"]) == 2
    assert "compare runs in one process; torchrun is for train, sft, reward-model" in capsys.readouterr().err
