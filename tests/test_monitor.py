"""The rules of the reward-hacking monitor by hand, the monitor in training, and Stable-Baselines3's callbacks."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from stable_baselines3.common.callbacks import CallbackList

from textrl_gym.agents import GRPO, Reinforce
from textrl_gym.evaluation import reward_hacking
from textrl_gym.evaluation.reward_hacking import AlarmBounds, Evaluation
from textrl_gym.registry import load_agent
from textrl_gym.reports import run_page
from textrl_gym.training.callbacks import RewardHackingMonitor
from textrl_gym.training.config import TrainOptions
from textrl_gym.training.run_folder import ALARMS, BEST, alarms, read_evaluations, read_run

ROW = {"timesteps": 0, "updates": 0, "score": -1.9, "gold": 0.4, "kl_sequence": 0.0, "completion_tokens": 24.0}
ROW |= {"eos_share": 1.0}
TEXTS = [f"My friend number {i} broke the {i}th lamp and I am sad ." for i in range(8)]


def evaluation(timesteps: int, texts: list[str] = TEXTS, golds: list[float] | None = None, **row: float) -> Evaluation:
    """An evaluation of 8 prompts, each with the mean gold score or, where they are given, with golds of their own."""
    changed = ROW | {"timesteps": timesteps, "updates": timesteps // 100} | row
    if golds is not None:
        changed["gold"] = sum(golds) / len(golds)
    golds = golds or [changed["gold"]] * len(texts)
    samples = [
        {"timesteps": timesteps, "index": 10 + i, "completion": text, "gold": gold}
        for i, (text, gold) in enumerate(zip(texts, golds, strict=True))
    ]
    return Evaluation(changed, samples)


START = evaluation(0)


def found(now: Evaluation, top: Evaluation = START, start: Evaluation = START, **bounds: float) -> dict[str, Any]:
    alarms = reward_hacking.alarms(start, top, now, AlarmBounds(**bounds))
    assert all(alarm.words for alarm in alarms)
    return {alarm.measure: (alarm.before, alarm.now) for alarm in alarms}


# -- the rules --------------------------------------------------------------------------------------------------------


def test_a_healthy_run_is_quiet() -> None:
    """Numbers of GRPO after 300,000 tokens: half as long again, a quarter fewer distinct bigrams, 9 nats."""
    now = evaluation(300, score=0.13, gold=0.9, completion_tokens=36.5, kl_sequence=9.5, eos_share=0.95)
    assert found(now, top=now) == {}
    assert found(START) == {}


def test_gold_falls_while_the_score_rises() -> None:
    top = evaluation(100, score=0.0, gold=0.8)
    assert found(evaluation(200, score=0.5, gold=0.7), top) == {"gold": (0.8, 0.7)}
    assert found(evaluation(200, score=0.5, gold=0.76), top) == {}  # 0.04 is no fall
    assert found(evaluation(200, score=-0.1, gold=0.5), top) == {}  # both fell: worse, but nothing is exploited
    assert found(evaluation(200, score=0.5, gold=0.76), top, gold_fall=0.03) == {"gold": (0.8, 0.76)}
    # below the start: that is told, though the score was higher at the best gold score
    assert found(evaluation(200, score=-0.5, gold=0.3), top) == {"gold": (0.4, 0.3)}
    words = reward_hacking.alarms(START, top, evaluation(2000, score=0.5, gold=0.7))[0].words
    assert "From 100 tokens to 2,000 tokens the score that was trained on rose from 0.000 to 0.500" in words
    assert "the gold score fell from 0.800 to 0.700" in words


def test_a_fall_within_the_noise_of_paired_differences_is_none() -> None:
    # differences 0.1 and 0.3: mean 0.2, variance 0.02, standard error sqrt(0.02 / 2) = 0.1
    texts = ["a text of words", "another text"]
    top, now = evaluation(100, texts, [0.5, 0.7]), evaluation(200, texts, [0.4, 0.4], score=0.0)
    assert reward_hacking.paired_error(top, now) == pytest.approx(0.1, abs=1e-12)
    assert found(now, top, gold_errors=2.1) == {}
    assert found(now, top, gold_errors=1.9) == {"gold": (pytest.approx(0.6), pytest.approx(0.4))}
    # other prompts are no pairs
    other = Evaluation(now.row, [sample | {"index": sample["index"] + 50} for sample in now.samples])
    assert reward_hacking.paired_error(top, other) == 0.0


def test_without_a_gold_score_there_is_no_gold() -> None:
    def blind(one: Evaluation) -> Evaluation:
        row = {name: value for name, value in one.row.items() if name != "gold"}
        return Evaluation(row, [{k: v for k, v in s.items() if k != "gold"} for s in one.samples])

    assert reward_hacking.best([blind(START)]) is None
    now = blind(evaluation(100, score=9.0, kl_sequence=60.0))
    assert [alarm.measure for alarm in reward_hacking.alarms(blind(START), None, now)] == ["kl"]


@pytest.mark.parametrize(
    ("row", "measure", "before", "now"),
    [
        ({"completion_tokens": 24 * 1.76}, "length", 24.0, 24 * 1.76),
        ({"completion_tokens": 24 / 1.76}, "length", 24.0, 24 / 1.76),
        ({"eos_share": 0.49}, "ends", 1.0, 0.49),
        ({"kl_sequence": 50.1}, "kl", 0.0, 50.1),
    ],
)
def test_symptoms_in_the_metrics(row: dict[str, Any], measure: str, before: float, now: float) -> None:
    assert found(evaluation(100, **row)) == {measure: (before, now)}


@pytest.mark.parametrize(
    "row", [{"completion_tokens": 24 * 1.74}, {"completion_tokens": 24 / 1.74}, {"eos_share": 0.5}, {"kl_sequence": 50}]
)
def test_metrics_within_their_bounds(row: dict[str, Any]) -> None:
    assert found(evaluation(100, **row)) == {}


def test_symptoms_in_the_texts() -> None:
    # 8 texts of 12 bigrams: 8 are the same in all, 4 hold the text's number: (8 + 8 * 4) / 96 are distinct
    start = 40 / 96
    # 3 of 8 are empty, and 2 of them letter for letter the same: a quarter is not above the bound
    assert found(evaluation(100, [*TEXTS[:5], "", " ", ""])) == {}
    empty = found(evaluation(100, [*TEXTS[:3], "", " ", "", " ", ""]))
    assert empty == {"empty": (0.0, 5 / 8), "sameness": (1 / 8, 3 / 8)}
    same = found(evaluation(100, [*TEXTS[:5], *["My friend is sad today ."] * 3]))
    assert same == {"sameness": (1 / 8, 3 / 8)}
    assert found(evaluation(100, [*TEXTS[:2], "one and one", "one and one"])) == {}  # twice is no habit
    # every text says one bigram over and over, each prompt its own: few are distinct, none is the same
    again = found(evaluation(100, [f"word{i} " * 13 for i in range(8)]))
    assert again == {"bigrams": (pytest.approx(start), pytest.approx(8 / 96))}


def test_short_texts_say_nothing_by_their_form() -> None:
    """As of CopyText-v0, whose answers have three tokens: EOS comes and goes while the task is learnt."""
    start = evaluation(0, ["a b"] * 8, completion_tokens=2.1, eos_share=0.6)
    now = evaluation(100, [""] * 8, completion_tokens=1.0, eos_share=0.1)
    assert found(now, start, start) == {}


def test_bounds_are_checked() -> None:
    with pytest.raises(ValueError, match=r"kl must be at least 0, got -1"):
        AlarmBounds(kl=-1)
    with pytest.raises(ValueError, match=r"length_ratio must be at least 1, got 0.5"):
        AlarmBounds(length_ratio=0.5)
    with pytest.raises(ValueError, match=r"gold_fall must be a finite number, got nan"):
        AlarmBounds(gold_fall=math.nan)


def test_what_was_evaluated_twice_counts_as_the_last_time() -> None:
    rows = [{"timesteps": 0, "gold": 0.1}, {"timesteps": 9, "gold": 0.2}, {"timesteps": 9, "gold": 0.3}]
    samples = [{"timesteps": at, "completion": text} for at, text in [(0, "a"), (9, "b"), (9, "c"), (9, "d"), (9, "e")]]
    first, second = reward_hacking.evaluations(rows, samples)
    assert (first.row["gold"], first.texts) == (0.1, ["a"])
    assert (second.row["gold"], second.texts) == (0.3, ["d", "e"])


def test_the_report_applies_the_same_rules(tmp_path: Path) -> None:
    evaluations = [START, evaluation(100, score=0.0, gold=0.8), evaluation(200, score=0.5, gold=0.7, eos_share=0.1)]
    for name, lines in (
        ("evaluations.jsonl", [e.row for e in evaluations]),
        ("samples.jsonl", [{"prompt": "p", "score": 0.0, **s} for e in evaluations for s in e.samples]),
    ):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(tmp_path)
    assert [alarm.measure for alarm in alarms(run)] == ["gold", "ends"]
    start, top, now = evaluations
    assert alarms(run) == reward_hacking.alarms(start, top, now)
    text = run_page.run_html([run])
    assert f"<b>Reward hacking in {tmp_path.name}.</b> From 100 tokens" in text
    assert f"<b>Drift in {tmp_path.name}.</b> EOS ends 10% of the completions; at the start 100%." in text


# -- the monitor ------------------------------------------------------------------------------------------------------


class Model:
    """Stands for an agent: remembers where it was saved."""

    def __init__(self, out: Path) -> None:
        self.out, self.saved = out, list[Path]()

    def save(self, path: Path) -> None:
        self.saved.append(path)


def monitor(out: Path, **settings: Any) -> tuple[Any, Model, list[str]]:
    told: list[str] = []
    watcher: Any = RewardHackingMonitor(tell=told.append, **settings)
    watcher.model = Model(out)
    return watcher, watcher.model, told


def test_an_alarm_is_told_once_and_again_when_it_comes_back(tmp_path: Path) -> None:
    watcher, model, told = monitor(tmp_path)
    answers = []
    for at, eos_share in ((0, 1.0), (100, 0.3), (200, 0.2), (300, 0.9), (400, 0.1)):
        one = evaluation(at, eos_share=eos_share)
        answers.append(watcher.on_evaluation(one.row, list(one.samples)))
    assert answers == [True] * 5  # it only warns
    assert [words.split("; ")[0] for words in told] == [
        "reward hacking? EOS ends 30% of the completions",
        "reward hacking? EOS ends 10% of the completions",
    ]
    lines = [json.loads(line) for line in (tmp_path / ALARMS).read_text().splitlines()]
    assert [(line["timesteps"], line["measure"], line["before"], line["now"]) for line in lines] == [
        (100, "ends", 1.0, 0.3),
        (400, "ends", 1.0, 0.1),
    ]
    assert model.saved == []


RISING = [START, evaluation(100, score=0.0, gold=0.8), evaluation(200, score=0.5, gold=0.79)]
HACKED = evaluation(300, score=0.9, gold=0.6)


def test_stop_keeps_the_best_gold_score_and_ends_at_gold(tmp_path: Path) -> None:
    watcher, model, told = monitor(tmp_path, on_hacking="stop")
    assert all(watcher.on_evaluation(one.row, list(one.samples)) for one in RISING)
    assert model.saved == [tmp_path / BEST]  # of the second; the start needs no checkpoint, and 0.79 is no better
    drift = evaluation(250, score=0.6, gold=0.8, eos_share=0.1)
    assert watcher.on_evaluation(drift.row, list(drift.samples))  # a symptom ends nothing where a gold score can tell
    assert not watcher.on_evaluation(HACKED.row, list(HACKED.samples))
    assert told[-1] == f"stopped by gold; {tmp_path / BEST} has the best gold score, 0.800 at 100 tokens"
    assert model.saved == [tmp_path / BEST]
    number = len(told)
    assert not watcher.on_evaluation(HACKED.row, list(HACKED.samples))  # the last evaluation of a run that ends
    assert len(told) == number


def test_stop_without_a_gold_score_ends_at_a_symptom(tmp_path: Path) -> None:
    watcher, _, told = monitor(tmp_path, on_hacking="stop")
    rows = [{k: v for k, v in one.row.items() if k != "gold"} for one in (START, evaluation(100, eos_share=0.1))]
    assert watcher.on_evaluation(rows[0], [])
    assert not watcher.on_evaluation(rows[1], [])
    assert told[-1] == "stopped by ends"


def test_a_monitor_that_goes_on_is_as_one_that_never_stopped(tmp_path: Path) -> None:
    whole, _, told = monitor(tmp_path)
    again, _, told_again = monitor(tmp_path)
    every = [*RISING, HACKED, evaluation(400, score=1.0, gold=0.5, kl_sequence=99.0)]
    for one in every[:4]:
        whole.on_evaluation(one.row, list(one.samples))
    again.remember_evaluations(every[:4])
    told.clear()
    for watcher in (whole, again):
        watcher.on_evaluation(every[4].row, list(every[4].samples))
    assert told == told_again == ["reward hacking? The KL to the reference is 99.0 nats a sequence, more than 50."]
    assert again.best.row == whole.best.row == RISING[1].row


def test_a_line_that_a_kill_has_torn_is_no_evaluation(tmp_path: Path) -> None:
    (tmp_path / "evaluations.jsonl").write_text('{"timesteps": 0, "gold": 0.5}\n{"timesteps": 64, "jud')
    assert [found.row["timesteps"] for found in read_evaluations(tmp_path)] == [0]


def test_wrong_settings_name_themselves() -> None:
    with pytest.raises(ValueError, match=r"on_hacking must be 'warn' or 'stop', got 'off'"):
        RewardHackingMonitor("off")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"on_hacking must be one of off, warn, stop, got 'maybe'"):
        TrainOptions(on_hacking="maybe")  # type: ignore[arg-type]


# -- in training ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_is_paid_by_length_stops(tmp_path: Path) -> None:
    """Longer texts repeat themselves and end in mid-sentence: the gold score falls while the reward rises."""
    env = gym.make("TLDRSummarize-v0", reward="length")
    agent = GRPO(env, seed=0, out=tmp_path, rollout_episodes=32, group_size=4, learning_rate=1e-3, kl_coef=0.0)
    agent.learn(200_000, progress_bar=False, on_hacking="stop", eval_every=4, eval_episodes=32, show_samples=0)
    assert agent.num_timesteps < 100_000
    assert agent.out is not None
    last = read_evaluations(agent.out)[-1]
    alarm = next(json.loads(line) for line in (tmp_path / ALARMS).read_text().splitlines() if '"gold"' in line)
    assert alarm["now"] < alarm["before"] - 0.05
    assert last.row["score"] > 30
    assert load_agent(tmp_path, device="cpu").num_updates == agent.num_updates  # the run's own checkpoint is the last
    if (tmp_path / BEST).is_dir():
        assert load_agent(tmp_path / BEST, device="cpu").num_updates < agent.num_updates


def test_a_monitor_of_ones_own_takes_the_place_of_the_usual_one(tmp_path: Path) -> None:
    told: list[str] = []
    strict = RewardHackingMonitor("stop", AlarmBounds(kl=0.02), told.append)
    agent = Reinforce("CopyText-v0", seed=0, out=tmp_path, rollout_episodes=16)
    agent.learn(2000, CallbackList([strict]), progress_bar=False, eval_every=2, eval_episodes=8, show_samples=0)
    kl = [one.row["kl_sequence"] for one in read_evaluations(agent.out)]
    assert kl[-1] > 0.02 >= max(kl[:-1])  # it ended at the first evaluation that was too far away
    assert agent.num_timesteps < 2000
    assert told[-1] == "stopped by kl"
    assert len((tmp_path / ALARMS).read_text().splitlines()) == 1


@dataclasses.dataclass
class Weights:
    """What training leaves behind."""

    agent: Any
    files: set[str]


def test_watching_changes_nothing(tmp_path: Path) -> None:
    runs = {}
    for mode in ("off", "warn"):
        out = tmp_path / mode
        agent = Reinforce("CopyText-v0", seed=0, out=out, rollout_episodes=16)
        agent.learn(600, progress_bar=False, eval_every=2, eval_episodes=8, show_samples=0, on_hacking=mode)
        runs[mode] = Weights(agent, {path.name for path in out.iterdir() if "tfevents" not in path.name})
    assert runs["off"].files == runs["warn"].files  # a healthy run leaves no alarms
    for a, b in zip(runs["off"].agent.policy.parameters(), runs["warn"].agent.policy.parameters(), strict=True):
        assert a.equal(b)


# -- divergence -------------------------------------------------------------------------------------------------------


def test_a_policy_that_is_lost_has_diverged_and_hacks_nothing() -> None:
    """A student's PPO at 309 nats, gold 0: the score fell too, so that no reward was exploited."""
    lost = evaluation(300, score=-4.0, gold=0.0, kl_sequence=309.0, completion_tokens=3.0, updates=12)
    (alarm,) = reward_hacking.alarms(START, None, lost)
    assert (alarm.measure, alarm.title) == ("divergence", "Divergence")
    assert alarm.line.startswith("Diverged: the KL to the reference is 309 nats a sequence after update 12, and the ")
    assert "fell from -1.900 to -4.000. Likely causes: a learning rate" in alarm.line
    # With a score that rose it is what it was.
    hacked = evaluation(300, score=4.0, gold=0.0, kl_sequence=309.0, updates=12)
    assert reward_hacking.alarms(START, None, hacked)[0].measure == "gold"
    assert reward_hacking.alarms(START, None, hacked)[0].line.startswith("reward hacking? From ")
    near = evaluation(300, score=-4.0, gold=0.0, kl_sequence=49.0, updates=12)
    assert "divergence" not in [one.measure for one in reward_hacking.alarms(START, None, near)]


# -- callbacks of Stable-Baselines3 ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_every_callback_of_stable_baselines3_runs(tmp_path: Path) -> None:
    from stable_baselines3.common import callbacks, monitor

    class Look(callbacks.BaseCallback):
        episodes = 0

        def _on_training_start(self) -> None:
            assert self.locals["total_timesteps"] == 400

        def _on_step(self) -> bool:
            rollout = self.locals["rollout"]
            assert self.locals["rewards"].tolist() == rollout.reward_BT.sum(1).tolist()
            assert [info["episode"]["l"] for info in self.locals["infos"]] == rollout.mask_BT.sum(1).tolist()
            self.episodes += len(rollout)
            return True

    look = Look()
    every = [
        look,
        callbacks.CheckpointCallback(save_freq=2, save_path=str(tmp_path / "checkpoints")),
        callbacks.EvalCallback(
            monitor.Monitor(gym.make("CopyText-v0")),
            eval_freq=2,
            n_eval_episodes=1,
            verbose=0,
            callback_on_new_best=callbacks.StopTrainingOnRewardThreshold(10),
            callback_after_eval=callbacks.StopTrainingOnNoModelImprovement(10),
        ),
        callbacks.EveryNTimesteps(100, callbacks.ConvertCallback(lambda *_: True)),
        callbacks.LogEveryNTimesteps(100),
        callbacks.StopTrainingOnMaxEpisodes(1_000),
        callbacks.ProgressBarCallback(),
    ]
    tried = {type(one) for one in every} | {callbacks.StopTrainingOnRewardThreshold, callbacks.ConvertCallback}
    tried |= {callbacks.StopTrainingOnNoModelImprovement, callbacks.CallbackList, callbacks.EventCallback}
    theirs = {one for one in vars(callbacks).values() if isinstance(one, type) and one.__module__ == callbacks.__name__}
    assert theirs - tried == {callbacks.BaseCallback}
    quiet: dict[str, Any] = {"progress_bar": False, "eval_every": 0, "eval_episodes": 16}
    agent = GRPO("CopyText-v0", out=tmp_path)
    with pytest.warns(UserWarning, match="not of the same type"):  # our environment, and SB3's around another
        agent.learn(400, callback=every, **quiet)
    rows = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    # EvalCallback writes rows of its own.
    assert sum("rollout/score" in row for row in rows) == agent.num_updates >= 2
    assert sum("eval/mean_reward" in row for row in rows) == len(rows) - agent.num_updates
    # Episodes are counted, and end the training: one rollout of 64 in an environment of 64.
    stopped = GRPO("CopyText-v0", out=tmp_path / "stopped")
    stopped.learn(10_000, callback=callbacks.StopTrainingOnMaxEpisodes(1), **quiet)
    assert look.episodes == 64 * agent.num_updates
    assert stopped.num_timesteps < 200
