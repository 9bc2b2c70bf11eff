"""bench: the phases add up, the settings are checked, and nothing of the package stays patched."""

import json
from pathlib import Path
from typing import Any

import pytest

from textrl_gym.cli.main import main
from textrl_gym.experiments.bench import BenchConfig, bench, rows
from textrl_gym.rollouts import sampler

SMALL = {"prompts": 2, "group": 2, "prompt_tokens": 9, "new_tokens": 4, "iterations": 2, "device": "cpu"}


@pytest.mark.parametrize(("agent", "critic"), [("grpo", {}), ("ppo", {}), ("ppo", {"separate_value_model": True})])
def test_the_phases_are_parts_of_the_whole(agent: str, critic: dict[str, Any], tmp_path: Path) -> None:
    plain = sampler.generate
    config = BenchConfig(agent=agent, out=tmp_path / "new" / "bench.json", **SMALL)  # type: ignore[arg-type]
    record = bench(config, **critic)
    assert sampler.generate is plain
    measured = record["measured"]
    # A critic on the policy's own trunk has given its values while sampling.
    expected = {"rollout", "scoring", "reference", "update", "other"} | ({"values"} if critic else set())
    assert set(measured["share"]) == expected
    assert record["agent"].get("separate_value_model", False) == bool(critic)
    assert sum(measured["share"].values()) == pytest.approx(1)
    assert all(0 <= share < 1 for share in measured["share"].values())
    assert 0 < measured["completion_tokens_per_second"] < measured["rollout_tokens_per_second"]
    # The update's forward and backward of 4 rows alone are over 6 FLOP a parameter of the trunk (3.2M) and place (12).
    assert measured["flop_per_iteration"] > 6 * 3.2e6 * 12
    assert 0 < measured["utilisation"] < 1
    assert json.loads((tmp_path / "new" / "bench.json").read_text()) == json.loads(json.dumps(record))
    assert rows(record)["work"] == "2 prompts x 2, 9 + 4"


def test_wrong_settings_name_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--group", "1"]) == 2
    assert "group must be at least 2, got 1" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    with pytest.raises(ValueError, match="new_tokens must be at least 1, got 0"):
        BenchConfig(new_tokens=0)


def test_scaling_measures_rows_and_lengths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("textrl_gym.experiments.bench.SCALES", {"rows": (8, 16), "new tokens": (4,)})
    out = tmp_path / "scaling.json"
    assert main(["bench", "--scaling", "--iterations", "1", "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    measured = json.loads(out.read_text())["measured"]
    assert [(point["axis"], point["value"]) for point in measured] == [("rows", 8), ("rows", 16), ("new tokens", 4)]
    for point in measured:
        # Microseconds: a token of a model of width 64 takes more than one of them and less than a second.
        assert 1 < point["rollout"] + point["update"] <= point["all"] < 1e6
        assert f"{point['value']} {point['axis']}" in printed
    assert 8 * 20 < measured[0]["tokens"] <= 8 * 32 and measured[2]["tokens"] <= 64 * 4
    assert main(["bench", "CopyText-v0", "--scaling"]) == 2
    assert "leave out CopyText-v0" in capsys.readouterr().err
    assert main(["bench", "--scaling", "--model", "smollm2-135m"]) == 2
    assert "leave out --model smollm2-135m" in capsys.readouterr().err
