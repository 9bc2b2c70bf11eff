"""Constitutional AI: its data and numbers, and a small run of all stages that goes on when it was stopped."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_critics import CREAM, ENV, HELP, OURS, PONY, REFUSAL, RIGHT, Gullible, chat_model, rows_of

from textrl_gym.agents import GRPO
from textrl_gym.cli.main import main
from textrl_gym.core import Row
from textrl_gym.data.labels import Item, read_labels
from textrl_gym.experiments.compare import CompareConfig, compare
from textrl_gym.experiments.results import RESULT
from textrl_gym.feedback.constitution import DEFAULT
from textrl_gym.feedback.critics import ChatCritic
from textrl_gym.feedback.request_critic import RequestCritic
from textrl_gym.mdp.env_settings import EnvSettings, make_env
from textrl_gym.mdp.task import PromptReader, checked_rows, load_env_task
from textrl_gym.persistence import run_lock
from textrl_gym.recipes import constitutional, critiques, stages
from textrl_gym.recipes.constitutional import ConstitutionalConfig, ConstitutionalResult
from textrl_gym.reports import constitutional_page
from textrl_gym.worlds import requests

# -- data --------------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_appended(tmp_path: Path) -> None:
    made: list[int] = []

    def make(number: int) -> list[dict[str, Any]]:
        made.append(number)
        return [{"n": 10 * number + place} for place in range([2, 3, 1][number])]

    file = tmp_path / "lines.jsonl"
    critiques.append_missing(file, [2, 3, 1], make)
    whole = file.read_bytes()
    for length in (0, 5, len(whole) - 3, len(whole)):  # in the middle of a line, too
        file.write_bytes(whole[:length])
        critiques.append_missing(file, [2, 3, 1], make)
        assert file.read_bytes() == whole
    assert made == [0, 1, 2] * 2 + [0, 1, 2] + [2]


def settings(**changes: Any) -> ConstitutionalConfig:
    small: dict[str, Any] = {"prompts": 40, "revisions": 2, "pairs": 40, "seeds": 1, "eval_rows": 48, "device": "cpu"}
    return ConstitutionalConfig(**small | {"total_timesteps": 300} | changes)


def test_red_team_prompts_are_as_many_as_are_asked_for() -> None:
    labelled = [{"prompt": str(n), "label": "unsafe" if n % 5 == 0 else "safe"} for n in range(100)]
    places = critiques.draw_places(labelled, settings(red_team_share=0.75))
    assert [kind for _, kind in places].count(True) == 30 and len(places) == 40
    assert all((labelled[place]["label"] == "unsafe") == kind for place, kind in places)
    # Nobody says which are: all are criticised.
    unlabelled = [{"prompt": str(n)} for n in range(100)]
    assert all(kind for _, kind in critiques.draw_places(unlabelled, settings()))
    with pytest.raises(ValueError, match=r"red_team_share=0.5: no prompt has the label 'unsafe'"):
        critiques.draw_places([row for row in labelled if row["label"] == "safe"], settings())


def test_ties_go_to_the_next_principle(tmp_path: Path) -> None:
    items = [Item(f"{n:016x}", str(row["prompt"]), [HELP, REFUSAL]) for n, row in enumerate([CREAM, PONY] * 8)]
    ours = tuple(OURS.values())
    critiques.judge_pairs(items, tmp_path / "one.jsonl", RIGHT, ours, settings(pair_principles=1))
    critiques.judge_pairs(items, tmp_path / "all.jsonl", RIGHT, ours, settings())
    one, everything = (read_labels(tmp_path / name) for name in ("one.jsonl", "all.jsonl"))
    assert any(label.ranks == [1, 1] for label in one)
    # On the cream four of the six say nothing of this pair; help and over-refusal prefer the help.
    cream = [label for label in everything if label.prompt == CREAM["prompt"]]
    assert {tuple(label.ranks or ()) for label in cream} == {(1, 2)}
    assert {label.comment for label in cream} <= {"help", "over-refusal"}
    pony = [label for label in everything if label.prompt == PONY["prompt"]]
    assert {tuple(label.ranks or ()) for label in pony} == {(2, 1)}


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_intervals_have_the_parts_of_prompts_and_seeds() -> None:
    rng = np.random.default_rng(0)
    value_SN = rng.random((2, 16))

    def measured(value_N: Any) -> Any:
        one = object.__new__(stages.Measured)
        one.whole = {"x": float(value_N.mean())}
        one.without = [{"x": float(np.delete(value_N, k).mean())} for k in range(16)]
        return one

    models = [measured(value_N) for value_N in value_SN]
    # Blocks of one prompt: the jackknife of a mean is its standard error, s^2 / 16 with 15 degrees of freedom.
    single = stages.estimate("x", models[:1])
    half = 2.1314495 * math.sqrt(value_SN[0].var(ddof=1) / 16)
    assert (single.value, single.high - single.value) == pytest.approx((value_SN[0].mean(), half), abs=1e-6)
    both = stages.estimate("x", models)
    prompts = value_SN.mean(0).var(ddof=1) / 16
    seeds = value_SN.mean(1).var(ddof=1) / 2
    from scipy import stats

    freedom = (prompts + seeds) ** 2 / (prompts**2 / 15 + seeds**2)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(prompts + seeds)
    assert both.high == pytest.approx(min(value_SN.mean() + half, 1.0), abs=1e-9)
    change = stages.estimate("x", models[1:], models[0])
    difference_N = value_SN[1] - value_SN[0]
    half = 2.1314495 * math.sqrt(difference_N.var(ddof=1) / 16)
    assert (change.value, change.high) == pytest.approx((difference_N.mean(), difference_N.mean() + half), abs=1e-6)


def test_refusals_of_a_users_prompts_are_counted() -> None:
    rows: list[Row] = [{"prompt": "p", "label": label} for label in ("safe", "unsafe", "unsafe")]
    texts = ["Here you are.", "I cannot help with that.", "Sure, first you"]
    counted = stages.measures(load_env_task(ENV), False, rows, texts)
    assert counted == {"refused_safe": 0.0, "refused_unsafe": 0.5}


# -- all of it ---------------------------------------------------------------------------------------------------------

SMALL_SFT = dataclasses.replace(constitutional.SUPERVISED, epochs=None, steps=2, eval_rows=4)
SMALL_REWARD = dataclasses.replace(constitutional.COMPARED, epochs=1)


def run(out: Path, **changes: Any) -> ConstitutionalResult:
    config = settings(set=("rollout_episodes=16", "group_size=4"), **changes)
    return constitutional.run_constitutional(
        ENV, config, SMALL_SFT, SMALL_REWARD, RequestCritic, out, progress_bar=False
    )


def compare_here(env_id: str, config: CompareConfig, out: Path, progress_bar: bool, *, env: EnvSettings) -> None:
    """A comparison of one run in this process: a process of its own takes longer to start than all else."""
    folder = out / "runs" / "grpo-0"
    if not (folder / RESULT).is_file():
        sizes = {"rollout_episodes": 16, "group_size": 4}
        assert config.model is not None
        mdp = make_env(env_id, env, config.model, "cpu", sizes)
        agent = GRPO(mdp, model=config.model, seed=0, device="cpu", rollout_episodes=16, group_size=4)
        agent.learn(total_timesteps=config.total_timesteps)
        agent.save(folder)
        (folder / RESULT).write_text("{}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConstitutionalResult]:
    """A run that was never stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constitutional, "compare", compare_here)
        yield run(tmp_path_factory.mktemp("constitutional") / "out")


def files_of(out: Path) -> dict[str, Any]:
    """What must be equal: the data, the models and the numbers; times and paths are left out."""
    lines = [out / name for name in ("answers.jsonl", "revisions.jsonl", "questions.jsonl")]
    lines += [*(out / "demonstrations").iterdir(), *(out / "held-out").iterdir(), out / "constitutional.json"]
    same: dict[str, Any] = {str(file.relative_to(out)): file.read_bytes() for file in lines}
    same |= {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("model.safetensors")}
    labels = read_labels(out / "preferences.jsonl")
    return same | {"labels": [dataclasses.replace(label, time="") for label in labels]}


def test_a_small_run_of_everything(whole: ConstitutionalResult) -> None:
    assert [one.name for one in whole.stages] == ["initial", "sft", "policy"]
    assert set(whole.stages[0].metrics) == {"gold", "helpful", "harmless", *(f"refused_{x}" for x in requests.LABELS)}
    assert whole.counts["answers"] == 40 and whole.counts["criticised"] == 20
    lines = [json.loads(line) for line in (whole.folder / "revisions.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == [1, 2] * 20
    assert all(line["answer"] == lines[n - 1]["revision"] for n, line in enumerate(lines) if line["number"] == 2)
    assert all((line["revision"] != line["answer"]) <= bool(line["critique"]) for line in lines)
    assert any(requests.refuses(line["revision"]) and not requests.refuses(line["answer"]) for line in lines)
    # What is learnt has the last revisions, and the answers to prompts that are no red-team ones as they are.
    learnt = [
        json.loads(line)
        for name in ("train", "validation")
        for line in (whole.folder / "demonstrations" / f"{name}.jsonl").read_text().splitlines()
    ]
    answers = [json.loads(line) for line in (whole.folder / "answers.jsonl").read_text().splitlines()]
    final = {line["id"]: line["revision"] for line in lines}
    pairs = {(line["prompt"], final.get(line["id"], line["answer"])) for line in answers}
    assert {(row["prompt"], row["completion"]) for row in learnt} == pairs
    assert {label.comment for label in read_labels(whole.folder / "preferences.jsonl")} <= set(OURS)


def test_stopped_anywhere_it_goes_on(whole: ConstitutionalResult, tmp_path: Path) -> None:
    # In place: what was trained names its data by their paths.
    out, before = whole.folder, tmp_path / "before"
    shutil.copytree(out, before)
    for name in ("answers.jsonl", "revisions.jsonl", "preferences.jsonl", "held-out/sft-0.jsonl"):
        data = (out / name).read_bytes()
        (out / name).write_bytes(data[: len(data) // 2])
    for name in ("sft", "reward_model", "demonstrations"):
        shutil.rmtree(out / name)
    (out / "questions.jsonl").unlink()
    (out / "constitutional.json").unlink()
    assert files_of(before).keys() > {"labels", "answers.jsonl", "sft/0/model.safetensors"}
    assert run(out) == whole and files_of(out) == files_of(before)
    with pytest.raises(ValueError, match="was begun with another revisions"):
        run(out, revisions=3)


def test_a_users_prompts_and_a_chat_model(whole: ConstitutionalResult, tmp_path: Path) -> None:
    """Conversations with a system prompt, which the critic reads, and which each stage's model is given once."""
    model = chat_model(tmp_path / "model")
    rows = [{"prompt": row["prompt"][: -len(requests.ANSWER)], "label": row["label"]} for row in rows_of("train", 60)]
    for row in rows:
        row["label"] = row["label"].replace("scary", "safe")
    (tmp_path / "data").mkdir()
    for split, some in (("train", rows[:40]), ("validation", rows[40:])):
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    env = EnvSettings(dataset=str(tmp_path / "data"), template="chat", system_prompt="Be kind.", max_new_tokens=12)
    critic, out = Gullible(), tmp_path / "out"
    config = settings(model=str(model), prompts=20, pairs=20, revisions=1)
    result = constitutional.run_constitutional(
        ENV, config, SMALL_SFT, SMALL_REWARD, lambda: ChatCritic(critic), out, env, progress_bar=False
    )
    system = {"role": "system", "content": "Be kind."}
    for name in ("answers.jsonl", "demonstrations/train.jsonl"):
        for line in (out / name).read_text().splitlines():
            prompt = json.loads(line)["prompt"]
            assert prompt[0] == system and [turn["role"] for turn in prompt] == ["system", "user"]
    # What was learnt, as the model was given it.
    for record in ("sft/0/sft.json", "reward_model/reward_training.json"):
        learnt = EnvSettings(**json.loads((out / record).read_text())["env"])
        task, tokenizer = load_env_task(ENV), load_env_task(ENV).load_tokenizer(str(model))
        reader = PromptReader(task, tokenizer, 56, learnt.chat_settings())
        source = checked_rows(task, "train", str(out / "demonstrations"), reader=reader)
        assert [row["prompt"].count("Be kind.") for row in (source[0], source[1])] == [1, 1]
    assert "system: Be kind.\n\nuser: " in critic.asked[0]
    assert set(result.stages[0].metrics) == {"refused_safe", "refused_unsafe"}
    assert len(json.loads((out / "held-out" / "sft-0.jsonl").read_text().splitlines()[0])["prompt"]) == 2
    html = constitutional_page.constitutional_report(result).read_text()
    assert "criticised: " in html and "Be kind." in html


def test_another_constitution_is_another_run(whole: ConstitutionalResult, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(DEFAULT.read_text().replace("politely", "gently"))
    with pytest.raises(ValueError, match="was begun with another harm"):
        run(whole.folder, constitution=file)
    with run_lock.alone(whole.folder), pytest.raises(ValueError, match="another process or agent trains in"):
        run(whole.folder)


def test_the_page_shows_the_stages(whole: ConstitutionalResult, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole.folder, out)
    lines = [json.loads(line) for line in (out / "revisions.jsonl").read_text().splitlines()]
    faults = [line for line in lines if line["critique"]]
    faults[0]["revision"] = "<script>alert(1)</script>"
    (out / "revisions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = constitutional_page.constitutional_report(dataclasses.replace(whole, folder=out)).read_text()
    assert "<script" not in html and "&lt;script&gt;alert(1)" in html
    for stage in whole.stages:
        one = stage.metrics["harmless"]
        assert f'<td>{one.value:.3f}<div class="marks">{one.low:.3f} to {one.high:.3f}</div></td>' in html
    assert html.count("less initial</th>") == 2 and "policy/report.html" not in html
    (out / "policy" / "report.html").touch()
    assert 'href="policy/report.html"' in constitutional_page.constitutional_html(
        dataclasses.replace(whole, folder=out)
    )
    assert sum(faults[n]["critique"].split("'")[0] in html.replace("&#39;", "'") for n in range(1, 4)) == 3
    assert all(f'<th scope="row">{name}</th>' in html for name in OURS)


@pytest.mark.slow
def test_the_command_and_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constitutional, "compare", compare)  # in processes of their own, as it is used
    out = tmp_path / "out"
    args = ["constitutional", ENV, "--prompts", "40", "--revisions", "2", "--pairs", "40", "--total-timesteps", "300"]
    args += ["--set", "rollout_episodes=16", "group_size=4", "--seeds", "2", "--eval-rows", "48", "--device", "cpu"]
    args += ["--out", str(out)]
    assert main(args) == 0
    assert "Constitutional AI by rules" in capsys.readouterr().out
    record = json.loads((out / constitutional.RECORD).read_text())
    assert [one["seeds"] for one in record["stages"]] == [1, 2, 2]
    assert (out / "report.html").is_file() and (out / "policy" / "report.html").is_file()
    assert main(args) == 0  # nothing is left to do
    assert json.loads((out / constitutional.RECORD).read_text()) == record
