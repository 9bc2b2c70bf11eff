"""`textrl-gym train`: a new run, or one that goes on. Loads no torch before it has read its flags."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from textrl_gym import files, processes, registry
from textrl_gym.cli.options import (
    CONFIG_FILE,
    Part,
    RunSettings,
    env_flags,
    find_agent,
    flag,
    flat,
    hold_names,
    own_flags,
    parse_command,
    parse_flags,
    write_toml,
)
from textrl_gym.mdp.env_settings import EnvSettings, by_flag, make_env, parse_reward
from textrl_gym.persistence.run_lock import alone
from textrl_gym.registry import find_env, load_agent
from textrl_gym.training.run_folder import holds_run, renamed

if TYPE_CHECKING:
    from textrl_gym.training.agent import Agent
    from textrl_gym.training.config import TrainOptions

TRAIN = """Train an agent: textrl-gym train AGENT ENV --total-timesteps N --out DIR; --resume DIR goes on.

An agent that does not train is evaluated and saved, and needs no --total-timesteps.

AGENT is the name of a file in agents/, or module:Class; ENV is an environment id, or module:ID. They come first.
`textrl-gym train AGENT ENV --help` lists the settings of that agent."""


def train_command(args: Sequence[str]) -> int:
    """Train an agent: AGENT ENV --total-timesteps N --out DIR, or --resume DIR."""
    # Before anything else is read: a run that goes on takes agent and environment from its folder, and not from
    # arguments.
    if any(arg.partition("=")[0] == "--resume" for arg in args):
        return resume(args)
    names = [arg for arg in args[:2] if not arg.startswith("-")]
    if len(names) < 2 and not {"-h", "--help"} & set(args):
        raise ValueError("train needs AGENT and ENV first: textrl-gym train AGENT ENV --total-timesteps N --out DIR")
    # Before torch is loaded: a wrong name is said at once.
    if len(names) == 2 and names[0] in registry.text_envs() and names[1] in registry.names("agents"):
        raise ValueError(f"AGENT comes before ENV: textrl-gym train {names[1]} {names[0]}")
    env_id = find_env(names[1]) if len(names) == 2 else ""
    agent_class = find_agent(names[0]) if names else None
    from textrl_gym.mdp.task import load_env_task

    parsed = parse_train(agent_class, names, args)
    assert agent_class is not None  # without names there was --help, which ends above
    run = parsed.run
    if agent_class.trains and run.total_timesteps is None:
        raise ValueError(f"{names[0]} trains: give --total-timesteps N, the generated tokens to train for")
    out = run.out or Path("runs") / f"{names[0].rpartition(':')[2]}-{env_id}-seed{run.seed}"
    # Every setting is handed over, defaults too, so that the checkpoint and run.json say what was used.
    config = dataclasses.asdict(agent_class.Config(**vars(parsed.agent), **vars(parsed.shared)))
    settings = {"agent": names[0], "environment": env_id, "model": run.model, "seed": run.seed}
    settings |= {"total_timesteps": run.total_timesteps, "config": config, "env": dataclasses.asdict(parsed.env)}
    # By the first process alone: a later one would find what the first has begun to write.
    if processes.from_first(lambda: holds_run(out)):
        defaults = {"config": dataclasses.asdict(agent_class.Config()), "env": dataclasses.asdict(EnvSettings())}
        check_same(out, args, settings, defaults)
        # The checkpoint may name the code that this command names, and no other.
        load_env_task(env_id)
        parsed.env.import_code()
        return go_on(load_agent(out, device=run.device, out=out), parsed.options)
    files.check_free(out, "train")  # before the model is loaded; learn() looks again
    agent = agent_class(
        make_env(env_id, parsed.env, run.model, run.device, config),
        run.model,
        seed=run.seed,
        device=run.device,
        out=out,
        **config,
    )
    record = {"command": list(args), "environment": env_id, "options": dataclasses.asdict(parsed.options)}
    with alone(out):  # another process that trains there goes on with its own
        files.write_text(out / files.RUN_FILE, json.dumps(record | {"settings": settings}, indent=1) + "\n")
        tables_of_run = {"env": parsed.env, "agent": [parsed.agent, parsed.shared], "train": [run, parsed.options]}
        write_toml(out / CONFIG_FILE, tables_of_run)
    return learn(agent, run.total_timesteps or 0, parsed.options, goes_on=False)


def parse_train(agent_class: type[Agent] | None, names: Sequence[str], args: Sequence[str]) -> SimpleNamespace:
    """The flags of a new run: the agent's own settings, the run's, training's, every agent's, the environment's.

    Args:
        agent_class: None where only help is asked for.
        names: AGENT and ENV, as far as they are given.
    """
    from textrl_gym.training.config import AgentConfig, TrainOptions

    own, shared = own_flags(AgentConfig if agent_class is None else agent_class.Config, AgentConfig)
    parts: list[Part] = [
        ("agent", Annotated[own, tyro.conf.OmitArgPrefixes]),
        ("run", flat(RunSettings)),
        ("options", flat(TrainOptions)),
        ("shared", Annotated[shared, tyro.conf.OmitArgPrefixes]),
        env_flags(),
    ]
    if agent_class is not None:
        classes = (RunSettings, TrainOptions, agent_class.Config)
        hold_names(args, {"config", *(field.name for cls in classes for field in dataclasses.fields(cls))})
    tables = {"run": "train", "options": "train", "agent": "agent", "shared": "agent", "env": "env"}
    titles = {"agent": f"Agent: {'' if agent_class is None else agent_class.__name__}", "shared": "Every agent"}
    command = " ".join(["train", *(names or ["AGENT", "ENV"])])
    return parse_command(command, TRAIN, parts, tables, args[len(names) :], titles)


def check_same(out: Path, args: Sequence[str], settings: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Hold that a folder's run was started by the same command; what only says where and how to show it may differ.

    Args:
        defaults: of settings that the version which started the run may not have known.

    Raises:
        ValueError: naming the first setting that differs.
    """
    record = read_record(out)
    words = f"{str(out)!r} holds a run already"
    advice = f"go on with --resume {out}, or name another --out"
    if "settings" not in record:  # of 0.1, or of a run from Python
        if record.get("command") != list(args):
            raise ValueError(f"{words}: {advice}")
        return
    before, now = _flattened(record["settings"]), _flattened(json.loads(json.dumps(settings)))
    before = _flattened(json.loads(json.dumps(defaults))) | before
    # The agent and the environment have settings of their own, which differ with them.
    names = dict.fromkeys(["agent", "environment", *before, *now])
    other = [name for name in names if before.get(name) != now.get(name)]
    if other == ["total_timesteps"]:
        advice = _longer(out, now["total_timesteps"]) or advice
    if other:
        raise ValueError(f"{words}, with {other[0]}={before.get(other[0])!r}, not {now.get(other[0])!r}: {advice}")


def _longer(out: Path, total: int | None) -> str:
    """How a folder's run goes on to a total; empty where it has come as far."""
    numbers = files.read_state(files.whole_checkpoint(out)).get("rng_state")
    done = numbers.get("num_timesteps") if isinstance(numbers, dict) else None
    if not isinstance(done, int) or total is None or total <= done:
        return ""
    trust = " --trust-code" if registry.foreign_modules else ""
    return (
        f"it has {done:,} tokens, and with --resume the number counts tokens more than these: go on with "
        f"textrl-gym train --resume {out} --total-timesteps {total - done}{trust}, or name another --out"
    )


def _flattened(settings: dict[str, Any]) -> dict[str, Any]:
    flat = {name: value for name, value in settings.items() if name not in ("config", "env")}
    return flat | settings.get("config", {}) | by_flag(settings.get("env", {}))


def read_record(folder: Path) -> dict[str, Any]:
    """How a folder's run was started; empty where no command has started it.

    Raises:
        ValueError: run.json is no JSON, or does not hold what it should.
    """
    file = folder / files.RUN_FILE
    if not file.is_file():
        return {}
    record = files.read_json(file)
    kinds = {"command": list, "options": dict, "settings": dict}
    for name, kind in kinds.items():
        if not isinstance(record.get(name, kind()), kind):
            raise ValueError(f"{str(file)!r} is damaged: {name!r} must be a {kind.__name__}, got {record[name]!r}")
    for name in ("config", "env"):
        if not isinstance(record.get("settings", {}).get(name, {}), dict):
            raise ValueError(f"{str(file)!r} is damaged: {name!r} in 'settings' must be a dict")
    return record


def go_on(agent: Agent, options: TrainOptions) -> int:
    """Train a loaded agent as far as its run's own total; a run that is finished is left as it is."""
    if agent.finished:
        done = f"{agent.num_timesteps:,} of {agent.total_timesteps:,} tokens"
        print(f"{agent.out} is finished: it has {done}; plots: textrl-gym report {agent.out}")
        return 0
    return learn(agent, agent.total_timesteps - agent.num_timesteps, options, goes_on=True)


def learn(agent: Agent, timesteps: int, options: TrainOptions, goes_on: bool) -> int:
    """Train and say where the results are; Ctrl-C and other signals leave a checkpoint."""
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()  # what may be downloaded is here; a checkpoint's bar breaks into training's own
    try:
        # A run that was stopped before its last evaluation may be beyond its total.
        agent.learn(max(0, timesteps), reset_num_timesteps=not goes_on, **dataclasses.asdict(options))
    except KeyboardInterrupt:
        trust = " --trust-code" if registry.foreign_modules else ""
        if processes.is_first():
            print(f"go on with: textrl-gym train --resume {agent.out}{trust}", file=sys.stderr)
        raise
    print(f"saved in {agent.out}; plots: textrl-gym report {agent.out}")
    return 0


@dataclasses.dataclass(frozen=True)
class Moved:
    """Where things stand now that the environment of a run needs; None: where they stood."""

    dataset: str | None = None
    """A Hub id, or a local file or folder."""
    reward: str | None = None
    """The reward, with the folder of the same reward model."""

    def settings(self, folder: Path) -> dict[str, Any]:
        """What differs from the settings of the run in a folder.

        Raises:
            ValueError: another reward than the run was trained on.
        """
        changes: dict[str, Any] = {} if self.dataset is None else {"dataset": self.dataset}
        if self.reward is None:
            return changes
        from textrl_gym.training import dependencies

        whole = files.whole_checkpoint(folder)
        state, reward = files.read_state(whole), parse_reward(self.reward)
        expected = dependencies.known(state, whole / files.STATE_FILE)["reward"]
        other = dependencies.other_reward(folder, reward, expected)
        if other is not None or (not expected and reward != state.get("env", {}).get("reward")):
            raise ValueError(other or f"{str(folder)!r} was trained on another reward than {reward!r}")
        return changes | {"reward": reward}


def resume(args: Sequence[str]) -> int:
    """Go on with an interrupted run, or with a finished one for more tokens."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--resume", type=Path, nargs="?")
    folder = peek.parse_known_args(args)[0].resume
    from textrl_gym.training.config import TrainOptions

    # Options of the first call hold on unless this one says otherwise.
    record = {} if folder is None else read_record(folder)
    try:
        saved = TrainOptions(**renamed(record.get("options", {})))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(folder / files.RUN_FILE)!r} is damaged: {error}") from error
    more = "tokens more than now; None: up to the run's own total"
    parts: list[Part] = [
        ("resume", flag(Path, "the run's folder")),
        ("total_timesteps", flag(int | None, more), None),
        ("device", flag(str, "auto, cpu, cuda or cuda:N"), "auto"),
        ("base_model", flag(str | None, "where the model stands now that the run started from, if it was moved"), None),
        ("env", Moved, Moved()),
        ("options", flat(TrainOptions), saved),
    ]
    parsed = parse_flags("train", resume.__doc__, parts, args)
    folder = parsed.resume
    if not processes.from_first(lambda: holds_run(folder)) and record.get("command"):
        # Stopped before the first update: there is nothing to go on from but the command.
        with registry.named_by(folder / files.RUN_FILE, trust=False):
            return train_command([*map(str, record["command"]), "--out", str(folder)])
    moved = parsed.env.settings(folder)
    agent = load_agent(folder, device=parsed.device, out=folder, base_model=parsed.base_model, env_settings=moved)
    if not agent.trains:
        raise ValueError(f"{str(folder)!r} holds {type(agent).__name__}, which does not train: nothing to resume")
    given = parsed.total_timesteps
    left = agent.total_timesteps - agent.num_timesteps if given is None else given
    # Below 1 without --total-timesteps: stopped between its last update and its last evaluation, which is left.
    if left < 1 and (agent.finished or given is not None):
        done = f"{str(folder)!r} has {agent.num_timesteps:,} of {agent.total_timesteps:,} tokens"
        raise ValueError(f"{done}: give --total-timesteps N, at least 1, to train for N more")
    return learn(agent, left, parsed.options, goes_on=True)
