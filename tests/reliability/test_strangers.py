"""Three strangers at the front door: each does what they know from elsewhere, and sees what they would expect."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def run(folder: Path, *command: str) -> str:
    """What a command printed, in a folder of the stranger's own."""
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100", "NO_COLOR": "1"}
    done = subprocess.run(
        command, cwd=folder, env=os.environ | quiet, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def textrl(folder: Path, *words: str) -> str:
    return run(folder, sys.executable, "-m", "textrl_gym", *words)


RESEARCHER = """
import gymnasium as gym
import numpy as np
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import RecordEpisodeStatistics, RenderCollection
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as check_sb3
from stable_baselines3.common.evaluation import evaluate_policy

env = gym.make("textrl_gym:TLDRSummarize-v0", render_mode="rgb_array")  # nothing imported before
check_env(gym.make("CopyText-v0").unwrapped, skip_render_check=True)
check_sb3(gym.make("CopyText-v0").unwrapped)

env = RenderCollection(RecordEpisodeStatistics(env))
observation, info = env.reset(seed=0)
assert env.observation_space.contains(observation)
env.action_space.seed(0)
over = False
while not over:
    observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
    over = terminated or truncated
frames = env.render()
print("frames", len(frames), np.asarray(frames[-1]).dtype, np.asarray(frames[-1]).ndim)
print("episode", float(info["episode"]["r"]), info["episode"]["l"], info["score"])

model = PPO("MultiInputPolicy", "CopyText-v0", n_steps=128, batch_size=64, seed=0)
model.learn(total_timesteps=512)
mean, _ = evaluate_policy(model, gym.make("CopyText-v0"), n_eval_episodes=4)
print("steps", model.num_timesteps, "mean", float(mean))
"""


def test_an_rl_researcher(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(RESEARCHER, encoding="utf-8")
    seen = dict(line.split(" ", 1) for line in run(tmp_path, sys.executable, "-W", "ignore", "mine.py").splitlines())
    frames, dtype, dimensions = seen["frames"].split()
    total, length, score = map(float, seen["episode"].split())
    # A frame after the reset and one after each token; height, width and three colours.
    assert (int(frames), dtype, dimensions) == (int(length) + 1, "uint8", "3")
    # A plain environment has no KL penalty: the return is the score.
    assert total == pytest.approx(score, abs=1e-5)
    steps, mean = re.fullmatch(r"(\d+) mean ([\d.]+)", seen["steps"]).groups()  # type: ignore[union-attr]
    assert int(steps) == 512 and 0 <= float(mean) <= 1


REWARD = """
def brief(prompts, completions, **kwargs):
    return [1.0 - abs(len(text.split()) - 5) / 10 for text in completions]
"""
TOPICS = ("cat", "rent", "boss", "sister", "car", "party", "dog", "neighbor", "exam", "garden")


def test_an_llm_engineer(tmp_path: Path) -> None:
    with (tmp_path / "posts.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "completion"])
        for number in range(40):
            topic = TOPICS[number % len(TOPICS)]
            post = f"POST: My {topic} gave me trouble {number} times this week.\n\nTL;DR:"
            rows.writerow([post, f" Trouble with my {topic}."])
    (tmp_path / "my_reward.py").write_text(REWARD, encoding="utf-8")

    ours = ("--env.dataset", "posts.csv", "--env.reward", "my_reward:brief", "--env.max-prompt-tokens", "64")
    small = ("--rollout-episodes", "16", "--eval-every", "0", "--eval-episodes", "4", "--total-timesteps", "1500")
    textrl(tmp_path, "train", "grpo", "TLDRSummarize-v0", *ours, *small, "--out", "runs/brief")
    first, *_, last = [
        json.loads(line) for line in (tmp_path / "runs/brief/evaluations.jsonl").read_text().splitlines()
    ]
    assert first["timesteps"] == 0 and last["timesteps"] >= 1500
    # Five words score 1, and each word more or less takes 0.1 off.
    assert first["score"] <= 1 and last["score"] <= 1 and last["score"] != first["score"]

    # The folder names the engineer's own code, which a folder of others could do too: an error says what to type.
    textrl(tmp_path, "export", "runs/brief", "--to", "model", "--trust-code")
    code = """
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("model"), AutoModelForCausalLM.from_pretrained("model")
ids = tokenizer("POST: My cat sleeps on my keyboard.\\n\\nTL;DR:", return_tensors="pt")
out = model.generate(**ids, max_new_tokens=16, do_sample=False)
print(len(out[0]) - ids["input_ids"].shape[1], tokenizer.decode(out[0][ids["input_ids"].shape[1]:]))
"""
    tokens, _, text = run(tmp_path, sys.executable, "-W", "ignore", "-c", code).partition(" ")
    assert 0 < int(tokens) <= 16 and text.strip()
    assert (tmp_path / "model" / "README.md").is_file()  # the model card


def test_a_student(tmp_path: Path) -> None:
    # A page of the lecture, block by block as they stand.
    page = ROOT / "docs" / "lecture" / "11-clipping.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    (tmp_path / "page.py").write_text(
        "\n".join(["import matplotlib", "matplotlib.use('Agg')", *blocks]), encoding="utf-8"
    )
    assert "A = +1: gradient 0 for ratios 1.21 to 2.00" in run(tmp_path, sys.executable, "page.py")
    assert (tmp_path / "clipping.svg").is_file()

    # Two algorithms side by side, and the page that says what can be said.
    small = ("--seeds", "2", "--total-timesteps", "400", "--eval-every", "0", "--eval-episodes", "8", "--workers", "1")
    printed = textrl(tmp_path, "compare", "CopyText-v0", "--agents", "reinforce", "grpo", *small, "--out", "runs/two")
    assert "reinforce" in printed and "grpo" in printed
    report = (tmp_path / "runs/two/report.html").read_text(encoding="utf-8")
    assert "2 seeds" in report and "plotly" in report.lower()
    with (tmp_path / "runs/two/results.csv").open(encoding="utf-8") as file:
        runs = {(row["agent"], row["seed"]) for row in csv.DictReader(file)}
    assert runs == {(agent, seed) for agent in ("reinforce", "grpo") for seed in ("0", "1")}
