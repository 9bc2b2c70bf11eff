"""Minari data sets (https://minari.farama.org): trajectories to and from the format of Farama's offline RL library.

An episode is stored as the environment is stepped: an observation before each action and one behind the last. That is
what Minari's users expect and takes T times the room of a file of data.trajectories, which says the same. What a step
does not say (score, stop reason, texts) is in the episode's metadata, and the turn of each action and its
log-probability in its infos. The package is an extra.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from textrl_gym.core import StopReason
from textrl_gym.data.trajectories import Trajectory, check_vocabulary, vocabulary_hash
from textrl_gym.extras import install
from textrl_gym.mdp.text_env import vector_env

if TYPE_CHECKING:
    from minari import MinariDataset
    from transformers import PreTrainedTokenizerBase

PREFIX = "minari:"
"""Before an id, where a data set of trajectories is named."""
TOKENS = "textrl_gym_tokens"
"""The key of a data set's metadata that has the hash of the vocabulary."""
TRUNCATED = frozenset({StopReason.LENGTH, StopReason.MAX_TURNS})
KEPT = ("score", "prompt", "completion", "turns")
"""Fields of a trajectory that are in an episode's metadata as they are."""


def to_minari(
    trajectories: Sequence[Trajectory], dataset_id: str, env: gym.Env[Any, Any], **metadata: Any
) -> MinariDataset:
    """Write trajectories as a new local Minari data set.

    Args:
        dataset_id: such as "CopyText/reference-v0".
        env: the environment that they are of; of one that gymnasium.make has made `recover_environment` makes another.
        metadata: further arguments of minari.create_dataset_from_buffers, such as algorithm_name, author, description.

    Raises:
        ImportError: without the package.
        ValueError: there is such a data set already, or a trajectory does not fit into the environment's budgets.
    """
    minari = _package()
    mdp = vector_env(env)
    if dataset_id in minari.list_local_datasets():
        raise ValueError(f"there is a Minari data set {dataset_id!r} already: minari.delete_dataset removes it")
    buffers = [_episode(one, mdp.max_prompt_tokens, mdp.max_new_tokens) for one in trajectories]
    # Arrow: its package comes with `datasets`, and HDF5's would be one more.
    given: dict[str, Any] = {"data_format": "arrow", "description": "episodes of textrl-gym"}
    given |= dict.fromkeys(("algorithm_name", "author", "author_email", "code_permalink"), "unknown")
    # An environment that gymnasium.make has not made has no name that it could be made again by.
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    given |= spaces if env.spec is None else {"env": env, "eval_env": env}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`eval_env` is set to None|env_spec is None")
        dataset = minari.create_dataset_from_buffers(dataset_id, buffers, **(given | metadata))
    metadata_of = [{name: getattr(one, name) for name in KEPT} | {"stop": one.stop.name} for one in trajectories]
    dataset.storage.update_episode_metadata(metadata_of, range(len(metadata_of)))
    dataset.storage.update_metadata({TOKENS: vocabulary_hash(mdp.tokenizer)})
    return dataset


def from_minari(dataset: str | MinariDataset, tokenizer: PreTrainedTokenizerBase | None = None) -> list[Trajectory]:
    """The trajectories of a data set, also of one that Minari's DataCollector has recorded of a text environment.

    Args:
        dataset: an id, of a local data set, or a loaded one.
        tokenizer: hold that the ids are its own, where the data set says whose they are.

    Raises:
        ImportError: without the package.
        ValueError: there is no such data set, it is not of a text environment, or of another tokenizer.
    """
    minari = _package()
    if isinstance(dataset, str):
        if dataset not in minari.list_local_datasets():
            raise ValueError(
                f"there is no local Minari data set {dataset!r}: minari.download_dataset({dataset!r}) fetches one"
            )
        dataset = minari.load_dataset(dataset)
    name, space = dataset.spec.dataset_id, dataset.spec.observation_space
    if not isinstance(space, gym.spaces.Dict) or set(space.spaces) != {"input_ids", "attention_mask"}:
        raise ValueError(f"the Minari data set {name!r} is not of a text environment: its observations are {space}")
    tokens = dataset.storage.metadata.get(TOKENS)
    if tokenizer is not None and tokens is not None:
        check_vocabulary(tokens, tokenizer, f"the Minari data set {name!r}")
    episodes = dataset.iterate_episodes()
    known = dataset.storage.get_episode_metadata(dataset.episode_indices)
    return [_trajectory(episode, of_one) for episode, of_one in zip(episodes, known, strict=True)]


def _episode(one: Trajectory, max_prompt: int, max_new: int) -> Any:
    """An EpisodeBuffer of a trajectory."""
    from minari.data_collector import EpisodeBuffer

    for name, ids, most in (("prompt", one.prompt_ids, max_prompt), ("token", one.token_ids, max_new)):
        if len(ids) > most:
            raise ValueError(f"a trajectory has {len(ids)} {name} ids, over the environment's {most}")
    acts_T = ~np.array(one.replies or [False] * len(one.token_ids))
    # Before each action stands all that is before it, and at the end all there is.
    seen_N = np.append(np.flatnonzero(acts_T), len(one.token_ids))
    token_L, begin = np.zeros(max_prompt + max_new, np.int64), max_prompt - len(one.prompt_ids)
    token_L[begin : max_prompt + len(one.token_ids)] = [*one.prompt_ids, *one.token_ids]
    place_L = np.arange(len(token_L))
    mask_NL = (place_L >= begin) & (place_L < max_prompt + seen_N[:, None])
    steps = int(acts_T.sum())
    ends_N = np.arange(steps) == steps - 1
    truncated = one.stop in TRUNCATED
    infos: dict[str, Any] = {}
    # One more than there are actions: the first is that of reset().
    for name, values in {"turn": one.turn, "logprob": one.logp}.items():
        if values:
            # A column: Minari 0.5.4 cannot read numbers without a dimension back from Arrow.
            infos[name] = np.concatenate([[0], np.array(values)[acts_T]])[:, None]
    return EpisodeBuffer(
        observations={"input_ids": token_L * mask_NL, "attention_mask": mask_NL.astype(np.int8)},
        actions=np.array(one.token_ids, np.int64)[acts_T],
        rewards=np.array(one.rewards, np.float64)[acts_T].tolist(),
        terminations=(ends_N & (not truncated)).tolist(),
        truncations=(ends_N & truncated).tolist(),
        infos=infos or None,
    )


def _trajectory(episode: Any, known: Mapping[str, Any]) -> Trajectory:
    """A trajectory of an EpisodeData and the metadata of its episode."""
    token_NL, mask_NL = episode.observations["input_ids"], episode.observations["attention_mask"].astype(bool)
    prompt = int(np.flatnonzero(mask_NL[0])[-1]) + 1
    count_N = mask_NL[:, prompt:].sum(1)
    size = int(count_N[-1])
    acts_T = np.zeros(size, bool)
    acts_T[count_N[:-1]] = True
    rewards_T = np.zeros(size)
    rewards_T[acts_T] = episode.rewards
    given: dict[str, Any] = {}
    if not acts_T.all() or known.get("turns"):
        given["replies"] = (~acts_T).tolist()
    infos = episode.infos or {}
    if "turn" in infos and (given or np.any(infos["turn"])):
        # A reply has the number of the turn before it.
        turn_N = np.asarray(infos["turn"], np.int64).reshape(-1)[1:]
        given["turn"] = turn_N[np.maximum(acts_T.cumsum() - 1, 0)].tolist()
    if "logprob" in infos:
        logp_T = np.zeros(size)
        logp_T[acts_T] = np.asarray(infos["logprob"]).reshape(-1)[1:]
        given["logp"] = logp_T.tolist()
    stop = StopReason.LENGTH if episode.truncations[-1] else StopReason.EOS
    names = {field.name for field in dataclasses.fields(Trajectory)} & set(KEPT)
    return Trajectory(
        prompt_ids=token_NL[0][mask_NL[0]].tolist(),
        token_ids=token_NL[-1][prompt : prompt + size].tolist(),
        rewards=rewards_T.tolist(),
        stop=StopReason[known["stop"]] if "stop" in known else stop,
        **({"score": float(episode.rewards[-1])} | {name: known[name] for name in names if name in known} | given),
    )


def _package() -> Any:
    if importlib.util.find_spec("minari") is None:
        raise ImportError(f"Minari data sets need the package minari: {install('minari')}")
    import minari

    return minari
