"""`make gpu`: time limits, results on disk at once, failures that stop nothing, the page's part, the wheels' limit."""

from __future__ import annotations

import importlib
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu import plan, run, table, wheels
from gpu.numbers import Numbers
from gpu.plan import Step

MACHINE = {"cuda": True, "device": "a GPU", "torch": "2.11.0", "transformers": "5.17.0", "trl": False}


def step(name: str, code: str, seconds: int = 60, **fields: Any) -> Step:
    command = ("-c", code, "{out}")
    usual: dict[str, Any] = {"name": name, "shows": "", "seconds": seconds, "command": command, "on_cpu": command}
    return Step(**(usual | fields))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the probe finds; tests change it."""
    found = dict(MACHINE)
    monkeypatch.setattr(run, "probe", lambda out: found)
    return found


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_the_plan_takes_under_nine_minutes_by_its_own_limits() -> None:
    assert sum(step.seconds + plan.GRACE_SECONDS for step in plan.PLAN) <= plan.BUDGET_SECONDS == 9 * 60


def test_every_step_is_a_module_and_what_a_cpu_skips_has_its_reason_in_words() -> None:
    for one in plan.PLAN:
        for command in filter(None, (one.command, one.on_cpu)):
            assert command[0] == "-m" and "{out}" in command
            assert importlib.util.find_spec(command[1]) is not None
        assert one.why_not and one.shows


@pytest.mark.parametrize("one", plan.PLAN, ids=lambda one: one.name)
def test_the_commands_are_understood(one: Step, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Each step's own parser takes the plan's arguments, on a GPU and on a CPU: nothing is left to find out there."""
    monkeypatch.syspath_prepend(str(root / "examples"))
    for command in filter(None, (one.command, one.on_cpu)):
        module = importlib.import_module(command[1])
        parsed: list[Any] = []

        class Stop(Exception):
            pass

        def parse(parser: Any, argv: Any, parsed: list[Any] = parsed) -> Any:
            parsed.append(parser.parse_known_args(argv))
            raise Stop

        with monkeypatch.context() as patch:
            patch.setattr("argparse.ArgumentParser.parse_args", parse)
            with pytest.raises(Stop):
                module.main(command[2:])
        assert parsed[0][1] == [], f"unknown: {parsed[0][1]}"


def test_every_file_with_a_test_for_a_gpu_is_run_there(root: Path) -> None:
    from gpu import tests as step_tests

    marked = {
        f"tests/{path.name}"
        for path in (root / "tests").glob("test_*.py")
        if re.search(r"^(@pytest\.mark\.gpu|from devices import)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert marked == set(step_tests.FILES["cuda"])


# -- running ----------------------------------------------------------------------------------------------------------

WRITE = "import json, sys; open(sys.argv[1], 'w').write(json.dumps({'speed': 3}))"


@pytest.mark.slow
def test_a_failing_step_and_one_that_hangs_stop_nothing_and_each_result_is_on_disk_at_once(
    tmp_path: Path, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child"
    hang = f"{WRITE}; import subprocess, time; p = subprocess.Popen(['sleep', '60']); "
    hang += f"open({str(child)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    steps = [
        step("good", WRITE),
        step("bad", "print('about to fail'); raise ValueError('a reason')"),
        step("hangs", hang, seconds=5),
        step("after", WRITE),
    ]
    on_disk: list[list[str]] = []
    plain = run.run_step

    def watched(*args: Any) -> dict[str, Any]:
        path = tmp_path / "result.json"
        on_disk.append([s["status"] for s in json.loads(path.read_text())["steps"]] if path.exists() else [])
        return plain(*args)

    monkeypatch.setattr(run, "run_step", watched)
    result = run.run(steps, tmp_path)
    assert [s["status"] for s in result["steps"]] == ["ok", "failed", "timed out", "ok"]
    assert on_disk == [[], ["ok"], ["ok", "failed"], ["ok", "failed", "timed out"]]
    assert json.loads((tmp_path / "result.json").read_text()) == result
    good, bad, hangs, _ = result["steps"]
    assert good["numbers"] == hangs["numbers"] == {"speed": 3}  # what there was before the limit is kept
    assert "ValueError: a reason" in bad["reason"] and "about to fail" in bad["reason"]
    assert "limit of 5 s" in hangs["reason"]
    assert result["device"] == "a GPU" and result["torch"] == "2.11.0"
    assert not running(int(child.read_text())), "the hanging step's own child lives on"


def running(pid: int) -> bool:
    """Whether a process goes on; one that was killed may wait for its parent as a zombie."""
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] in "ZX":
                return False
        except FileNotFoundError:
            return False
        time.sleep(0.1)
    return True


def test_the_budget_cuts_steps_and_skips_those_for_which_nothing_is_left(
    tmp_path: Path, machine: dict[str, Any]
) -> None:
    steps = [step("long", "import time; time.sleep(60)"), step("none", WRITE)]
    result = run.run(steps, tmp_path, budget=plan.GRACE_SECONDS + 1)
    assert [s["status"] for s in result["steps"]] == ["timed out", "skipped"]
    assert result["steps"][1]["reason"] == "no time is left"


def test_without_a_gpu_the_small_form_runs_and_what_is_skipped_is_said(tmp_path: Path, machine: dict[str, Any]) -> None:
    machine["cuda"] = False
    steps = [
        step("small", "raise SystemExit(1)", on_cpu=("-c", WRITE, "{out}"), why_not="a tiny shape"),
        step("large", WRITE, on_cpu=None, why_not="it takes hours on a CPU"),
        step("needy", WRITE, needs="TEXTRL_GYM_NO_SUCH_VARIABLE"),
    ]
    found = run.run(steps, tmp_path)["steps"]
    assert [(s["status"], s["reason"]) for s in found] == [
        ("ok", "small form: a tiny shape"),
        ("skipped", "no GPU here: it takes hours on a CPU"),
        ("skipped", "TEXTRL_GYM_NO_SUCH_VARIABLE is not set"),
    ]


def test_numbers_are_on_disk_after_each_one(tmp_path: Path) -> None:
    numbers = Numbers(tmp_path / "n.json")
    numbers.add(a=1)
    assert json.loads(numbers.path.read_text()) == {"a": 1}
    numbers.add(b=[2], a=3)
    assert json.loads(numbers.path.read_text()) == {"a": 3, "b": [2]}


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_script_makes_of_the_committed_result() -> None:
    text = table.PAGE.read_text(encoding="utf-8")
    assert table.page(text, table.read_result()) == text, "run python -m gpu.table"


def test_the_page_says_that_nothing_was_run_until_it_was() -> None:
    assert "**Not run yet.**" in table.section(None)
    assert "**Not run yet.**" in table.section({"cuda": False, "steps": []})  # a result of a CPU is none


def a_result() -> dict[str, Any]:
    """As a GPU run may leave it: a finished step, one that was cut short, and one that was skipped."""
    work = {"shape": "smollm2-135m", "dtype": "bfloat16", "prompts": 32, "group": 8, "prompt_tokens": 350}
    work |= {"new_tokens": 64}
    decode = {
        "work": work,
        "device": "cuda",
        "tokens_per_second": {"ours": [10.0, 30.0, 20.0], "dynamic": [4.0, 5.0, 6.0]},
        "share_of_roofline": {"ours": 0.25, "dynamic": 0.05},
        "ours_peak_bytes": 2**31,
        "ours_launches": {"launches_per_token": 700.0, "kernels_per_token": 710.0},
    }
    turn = {"tokens_per_second": 900.0, "peak_bytes": 2**30}
    train = {"work": work, "turns": {"grpo": [turn], "trl_grpo": [{"tokens_per_second": 300.0, "peak_bytes": 2**32}]}}
    side = {"completion_tokens_per_second": 1234.0, "phase_seconds": {"rollout": 0.5, "update": 0.25}}
    compiled = {"work": work, "sides": {"update": side | {"first_seconds": 40.0}}}
    usual = {"status": "ok", "reason": "", "seconds": 1.0}
    return MACHINE | {
        "date": "2026-11-28T12:00:00+00:00",
        "steps": [
            usual | {"name": "tests", "numbers": {"passed": ["a", "b"], "failed": ["c"], "skipped": []}},
            usual | {"name": "decode", "numbers": decode},
            usual | {"name": "train", "numbers": train},
            usual | {"name": "compile", "numbers": compiled},
            usual | {"name": "tldr", "status": "timed out", "reason": "ended at 9 s", "numbers": {"device": "cuda"}},
            usual | {"name": "real-posts", "status": "skipped", "reason": "no weights", "numbers": {}},
        ],
    }


def test_the_page_has_the_numbers_of_a_run() -> None:
    text = table.section(a_result())
    assert "a GPU, 2026-11-28: torch 2.11.0" in text
    assert "2 passed, 1 failed.\n- failed: `c`" in text
    # medians 20 and 5: 4 times; a quarter of the roofline; 700 launches; 2 GiB
    assert "| textrl-gym, step by step | 20 (10 to 30) | 4.0 | 25% | 700 | 2.0 |" in text
    # 900 / 300 in speed; 1 GiB / 4 GiB in memory
    assert "| GRPO, textrl-gym | 900 (900 to 900) | 1.0 | 3.00 | 0.25 |" in text
    assert '| `compile="update"` | 1,234 | 0.500 | 0.250 | 40 |' in text
    assert "Step `tldr` timed out: ended at 9 s." in text
    assert "Step `real-posts` skipped: no weights." in text


def test_every_step_of_the_plan_can_be_written() -> None:
    for one in plan.PLAN:
        record = {"name": one.name, "status": "failed", "reason": "x", "seconds": 0.0, "numbers": {}}
        assert f"Step `{one.name}` failed: x." in table.section(MACHINE | {"date": "2026-01-01", "steps": [record]})


# -- what is measured -------------------------------------------------------------------------------------------------


@pytest.fixture
def decode_speed(monkeypatch: pytest.MonkeyPatch, root: Path) -> Any:
    monkeypatch.syspath_prepend(str(root / "examples"))
    return importlib.import_module("gpu.decode_speed")


def test_the_needs_of_a_decode_step_by_hand(decode_speed: Any) -> None:
    # width 4, 2 heads of 2, 1 key head, 3 layers, inner width 5, vocabulary 7
    config = SimpleNamespace(
        hidden_size=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=3,
        intermediate_size=5,
        vocab_size=7,
    )
    # weights: a layer has q and o (4 x 4 each), k and v (4 x 2 each), three of 4 x 5: 16 + 16 + 8 + 8 + 60 = 108;
    # 3 layers and 7 x 4: 352. Positions of 2 prompts of 10, and of 2 x 3 rows after (5 + 1) / 2 = 3: 20 + 18 = 38,
    # each of 2 x 3 layers x 1 x 2 = 12 numbers: 456. In bytes 2 (352 + 456) = 1616.
    # Operations: 2 x 6 rows x 352 = 4224; 4 x 3 layers x 2 heads x 2 x 6 rows x (10 + 3) = 3744.
    assert decode_speed.step_needs(config, 2, 3, 10, 5) == (1616.0, 7968.0)


def test_launches_are_counted_by_name_and_device(decode_speed: Any) -> None:
    events = [
        SimpleNamespace(name="cudaLaunchKernel", device_type="DeviceType.CPU"),
        SimpleNamespace(name="cudaGraphLaunch", device_type="DeviceType.CPU"),
        SimpleNamespace(name="aten::add", device_type="DeviceType.CPU"),
        SimpleNamespace(name="void add_kernel", device_type="DeviceType.CUDA"),
    ]
    assert decode_speed.counts(events) == {"launches_per_token": 2, "kernels_per_token": 1}


def test_a_side_that_fails_is_left_out_and_named(decode_speed: Any, tmp_path: Path) -> None:
    def out_of_memory() -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    sides = {"ours": lambda: 1, "dynamic": out_of_memory}
    assert decode_speed.try_out(sides, Numbers(tmp_path / "n.json")) == {"dynamic": "CUDA out of memory"}
    assert [*sides] == ["ours"]


# -- wheels -----------------------------------------------------------------------------------------------------------


def wheel(folder: Path, name: str, size_mib: float) -> None:
    with (folder / f"{name}-1.0-py3-none-any.whl").open("wb") as file:
        file.truncate(int(size_mib * 2**20))


def test_wheels_over_the_limit_are_left_out_in_their_order_and_named(tmp_path: Path) -> None:
    for name, size in {"pyarrow": 5, "pandas": 3, "other": 4}.items():
        wheel(tmp_path, name, size)
    left_out = wheels.slim(tmp_path, limit_mib=8)
    assert [*left_out] == ["pyarrow (5 MiB)"]
    assert {path.name.split("-")[0] for path in tmp_path.glob("*.whl")} == {"pandas", "other"}
    assert wheels.slim(tmp_path, limit_mib=8) == {}
    with pytest.raises(ValueError, match="have 4 MiB, allowed are 2"):
        wheels.slim(tmp_path, limit_mib=2)


def test_wheels_are_what_the_project_needs_beyond_the_machine(root: Path) -> None:
    """Every dependency of the project is either one that such a machine has, or collected."""
    import tomllib

    machine = {
        "markupsafe",
        "torch",
        "transformers",
        "accelerate",
        "peft",
        "tensorboard",
        "numpy",
        "tokenizers",
        "safetensors",
    }
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[<>=\[]", text)[0] for text in project["dependencies"]}
    collected = {re.split(r"[<>=]", text)[0] for text in (*wheels.WANTED, *wheels.FROM_SOURCE)}
    assert needed - machine <= collected


def test_that_machines_versions_are_allowed(root: Path) -> None:
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    ranges = {(found := Requirement(text)).name: found.specifier for text in project["dependencies"]}
    for name, version in {"torch": "2.11.0", "transformers": "5.17.0", "tokenizers": "0.23.2"}.items():
        assert ranges[name].contains(version), name
