"""`textrl-gym collect`: trajectories of a saved agent or of the initial policy, for offline RL."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from textrl_gym import files
from textrl_gym.bounds import MOST_ROWS, Seed, check_settings
from textrl_gym.cli.options import Part, env_flags, environment, flat, parse_command
from textrl_gym.cli.terminal import print_rows
from textrl_gym.mdp.env_settings import EnvSettings, make_env
from textrl_gym.registry import find_env, load_agent, load_agent_class


@dataclasses.dataclass(frozen=True)
class CollectFlags:
    """What is collected."""

    agent: Path | None = None
    """The folder of a saved agent, or one that `play` wrote, with all its episodes; None: the initial policy."""
    episodes: Annotated[int, Ge(1)] = 1_000
    """Trajectories, in passes over the prompts."""
    seed: Seed = 0
    """Of the order of the prompts and of sampling."""
    out: Path = Path("trajectories.jsonl")
    """The file, which must not be there yet."""
    minari: str | None = None
    """Also write a local Minari data set with this id, such as CopyText/reference-v0."""
    model: str | None = None
    """The initial policy: a Hub id or a folder; None: the environment's own."""
    rows: Annotated[int, Ge(1), Le(MOST_ROWS)] = 64
    """Episodes at a time."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.agent is not None and self.model is not None:
            raise ValueError("--agent is a saved agent with a model of its own: leave --model out")


def collect_command(args: Sequence[str]) -> int:
    """Write trajectories for offline RL: ENV [--agent DIR] --episodes N --out FILE."""
    parts: list[Part] = [environment(), ("settings", flat(CollectFlags)), env_flags(EnvSettings())]
    tables = {"settings": "collect", "env": "env"}
    parsed = parse_command("collect", collect_command.__doc__, parts, tables, args)
    flags, env_id = parsed.settings, find_env(parsed.environment)
    if flags.out.exists():
        raise ValueError(f"there is {str(flags.out)!r} already: name another --out, or remove it")
    import gymnasium

    from textrl_gym.data.trajectories import write_trajectories
    from textrl_gym.experiments.play import is_played, played_trajectories
    from textrl_gym.integrations.minari import to_minari
    from textrl_gym.mdp.text_env import TextEnv, vector_env
    from textrl_gym.rollouts.recording import record

    model = flags.model
    played = flags.agent is not None and is_played(flags.agent)
    if flags.agent is not None and not played:
        agent = load_agent(flags.agent, device=flags.device)
        # By the agent's own tokens: the environment's may have other tokens for the same ids.
        model = str(files.whole_checkpoint(flags.agent) / "model")
    sizes = {"rollout_episodes": flags.rows, "group_size": 1}
    mdp = vector_env(make_env(env_id, parsed.env, model, flags.device, sizes))
    if flags.agent is None:
        agent = load_agent_class("reference")(mdp, model, seed=flags.seed, device=flags.device)
    if played:
        trajectories = list(played_trajectories(flags.agent, mdp))
    else:
        batches = record(mdp, agent.play, flags.episodes, flags.seed, agent.device)
        trajectories = list(itertools.chain.from_iterable(batches))
    files.make_folder(flags.out.parent)
    facts = {"environment": env_id, "env": dataclasses.asdict(parsed.env), "seed": flags.seed}
    facts["agent"] = None if flags.agent is None else str(flags.agent.resolve())
    write_trajectories(flags.out, trajectories, mdp.tokenizer, **facts)
    if flags.minari is not None:
        keywords = parsed.env.keywords() | ({} if model is None else {"tokenizer": model})
        env = gymnasium.make(env_id, **keywords)
        assert isinstance(env.unwrapped, TextEnv)
        to_minari(trajectories, flags.minari, env, algorithm_name="play" if played else type(agent).__name__)
    tokens, scores = sum(one.num_actions for one in trajectories), [one.score for one in trajectories]
    rows = {"episodes": f"{len(trajectories):,}", "tokens of the agent": f"{tokens:,}"}
    rows |= {"mean score": f"{sum(scores) / len(scores):.3f}", "best score": f"{max(scores):.3f}"}
    print_rows(str(flags.out), rows)
    return 0
