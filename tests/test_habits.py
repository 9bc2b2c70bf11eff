"""What users of Gymnasium and Stable-Baselines3 put around an environment: videos, conversions, rl_zoo3.

moviepy wants Pillow below 12, and rl_zoo3 pins more, so neither is among the pinned packages: `make adapters` has them.
"""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers import NumpyToTorch, RecordEpisodeStatistics, RecordVideo
from numpy.typing import NDArray
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecVideoRecorder

import textrl_gym  # noqa: F401  registers the environments

SINGLE_OR_TURNS = ("CopyText-v0", "Tool-v0", "GuessNumber-v0")


def play(env: gym.Env[Any, Any]) -> tuple[list[NDArray[np.uint8]], int]:
    """An episode of random tokens: the picture after the reset and after each token, and the number of tokens."""
    env.action_space.seed(0)
    env.reset(seed=0)
    frames, over = [np.asarray(env.render())], False
    while not over:
        *_, terminated, truncated, _ = env.step(env.action_space.sample())
        frames.append(np.asarray(env.render()))
        over = terminated or truncated
    env.close()
    return frames, len(frames) - 1


@pytest.mark.parametrize("env_id", SINGLE_OR_TURNS)
def test_record_video_hands_over_a_frame_a_token(env_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips: list[tuple[list[NDArray[np.uint8]], float, str]] = []

    class Clip:
        """moviepy's, as far as RecordVideo asks."""

        def __init__(self, frames: Sequence[NDArray[np.uint8]], fps: float) -> None:
            self.frames, self.fps = list(frames), fps

        def write_videofile(self, path: str, logger: str | None) -> None:
            clips.append((self.frames, self.fps, Path(path).name))

    names = ("moviepy", "moviepy.video", "moviepy.video.io", "moviepy.video.io.ImageSequenceClip")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules[names[-1]], "ImageSequenceClip", Clip, raising=False)
    env = gym.make(env_id, render_mode="rgb_array")
    frames, tokens = play(RecordVideo(env, str(tmp_path / "videos"), episode_trigger=lambda episode: True))
    ((recorded, fps, name),) = clips
    # Four tokens a second can be read; Gymnasium's default of 30 shows an episode of CopyText-v0 for 0.1 seconds.
    assert (len(recorded), fps, name) == (tokens + 1, 4, "rl-video-episode-0.mp4")
    np.testing.assert_array_equal(recorded, frames)


# imageio leaves its pipes to ffmpeg open.
moviepy = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def decoded(video: Path) -> NDArray[Any]:
    """The frames of a video. [frames, height, width, 3]"""
    from imageio import v3 as imageio

    return imageio.imread(video, plugin="FFMPEG").astype(float)


@moviepy
@pytest.mark.parametrize("env_id", SINGLE_OR_TURNS)
def test_record_video_writes_a_video(env_id: str, tmp_path: Path) -> None:
    pytest.importorskip("moviepy", reason="wants Pillow below 12: make adapters")
    env = gym.make(env_id, render_mode="rgb_array")
    frames, _ = play(RecordVideo(env, str(tmp_path / "videos"), episode_trigger=lambda episode: True))
    video = decoded(tmp_path / "videos" / "rl-video-episode-0.mp4")
    assert video.shape == (len(frames), 480, 640, 3)
    # H.264 keeps half of the colours' places: a letter's edge differs, the page does not.
    differences = np.abs(video - np.asarray(frames, dtype=float)).mean((1, 2, 3))
    assert differences.max() < 2.0
    assert np.abs(video[0] - frames[-1]).mean() > differences.max(), "the text has grown"


@moviepy
def test_sb3_records_two_environments_one_above_the_other(tmp_path: Path) -> None:
    pytest.importorskip("moviepy", reason="wants Pillow below 12: make adapters")
    envs = VecVideoRecorder(
        make_vec_env("GuessNumber-v0", n_envs=2, seed=0), str(tmp_path), lambda step: step == 0, video_length=6
    )
    envs.reset()
    for _ in range(7):
        envs.step(np.array([1, 2]))
    envs.close()
    assert decoded(tmp_path / "rl-video-step-0-to-step-6.mp4").shape == (7, 960, 640, 3)


def test_numpy_to_torch_around_statistics() -> None:
    env = NumpyToTorch(RecordEpisodeStatistics(gym.make("CopyText-v0")))
    observation, _ = env.reset(seed=0)
    assert isinstance(observation["input_ids"], torch.Tensor)
    for _ in range(3):  # the token budget
        *_, info = env.step(torch.tensor(1))
    assert int(info["episode"]["l"]) == 3
    assert float(info["episode"]["r"]) == pytest.approx(float(info["score"]), abs=1e-6)


HYPERPARAMETERS = """
CopyText-v0:
  policy: MultiInputPolicy
  n_timesteps: 256
  n_envs: 2
  n_steps: 64
  batch_size: 64
"""


def test_rl_zoo3_trains(tmp_path: Path) -> None:
    pytest.importorskip("rl_zoo3", reason="pins other versions: make adapters")
    (tmp_path / "zoo.yml").write_text(HYPERPARAMETERS, encoding="utf-8")
    words = "--algo ppo --env CopyText-v0 --gym-packages textrl_gym -conf zoo.yml -f logs --seed 0 --eval-episodes 2"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "rl_zoo3.train", *words.split(), "--eval-freq", "128"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "logs" / "ppo" / "CopyText-v0_1"
    assert (run / "CopyText-v0.zip").is_file() and (run / "best_model.zip").is_file()
    returns = np.load(run / "evaluations.npz")["results"]
    assert returns.shape == (2, 2) and ((returns >= 0) & (returns <= 1)).all()
