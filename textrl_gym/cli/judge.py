"""The commands `evaluate` and `judge`, and the flags of a judge that they share."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from textrl_gym import files
from textrl_gym.bounds import Seed, check_settings
from textrl_gym.cli.options import Part, env_flags, flat, parse_command, parse_flags, positional
from textrl_gym.cli.terminal import interval, make_table, print_rows, print_tables
from textrl_gym.extras import install
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.registry import find_env, named_by, register_again, text_envs

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from textrl_gym.evaluation.evaluator import Evaluator
    from textrl_gym.experiments.win_rates import Reader, Tally
    from textrl_gym.judges.judge import Judge
    from textrl_gym.llm.asking import EndpointConfig
    from textrl_gym.mdp.task import Task
    from textrl_gym.mdp.text_env import TextVectorEnv
    from textrl_gym.training.agent import Agent


@dataclasses.dataclass(frozen=True)
class JudgeFlags:
    """Who judges, and against whom."""

    judge: str | None = None
    """gold (the task's own), a reward (its name, module:function, a folder with a reward model), or endpoint or
    local:FOLDER, language models, of which the second needs no server (local alone: the task's own); None: gold."""
    against: str | None = None
    """start (the initial policy), human (the reference texts), or another agent: for `evaluate` the
    folder that it was saved to, for `judge` its name in the comparison. None: start."""
    judge_noise: float = 0.0
    """Share of the pairs whose verdict is flipped, as human annotators disagree: 0.25 in AlpacaFarm."""
    judge_seed: Seed = 0
    """Seeds which pairs are flipped."""

    def __post_init__(self) -> None:
        check_settings(self)

    def make(
        self,
        endpoint: EndpointConfig,
        folder: Path,
        task: Task | None,
        device: str | torch.device = "cpu",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Judge:
        """The judge that the flags name; endpoint: how a language model is asked."""
        from textrl_gym.judges.judge import GOLD, Noisy, load_judge
        from textrl_gym.judges.llm_judge import load_language_judge
        from textrl_gym.llm.asking import ENDPOINT, EndpointConfig, is_language_model

        # Said before a judge is asked for an hour: the intervals come last.
        if importlib.util.find_spec("scipy") is None:
            raise ImportError(f"win rates with intervals need the package scipy: {install('judge')}")
        if not is_language_model(self.judge) and endpoint != EndpointConfig():
            raise ValueError(f"--endpoint. settings are of --judge {ENDPOINT}, and the judge is {self.judge or GOLD}")
        if self.judge is not None and is_language_model(self.judge):
            judge: Judge = load_language_judge(self.judge, endpoint, folder, task=task, device=device)
        else:
            judge = load_judge(self.judge or GOLD, task=task, device=device, tokenizer=tokenizer)
        return Noisy(judge, self.judge_noise, self.judge_seed) if self.judge_noise else judge


@dataclasses.dataclass(frozen=True)
class EvaluateFlags:
    """What is evaluated, and by what work."""

    env: str | None = None
    """Another environment id, or module:ID; None: the agent's own, with its settings."""
    episodes: Annotated[int, Ge(1)] = 256
    """Prompts, one completion of each."""
    seed: Seed = 0
    """Of prompts and sampling."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    base_model: str | None = None
    """Where the model stands now that the run started from (a folder), if it was moved."""
    json: Path | None = None
    """Also write the numbers to this file."""

    def __post_init__(self) -> None:
        check_settings(self)


def judge_parts() -> list[Part]:
    """The flags of a judge, and under --endpoint. those of a language model."""
    from textrl_gym.llm.asking import EndpointConfig

    return [("judging", flat(JudgeFlags)), ("endpoint", EndpointConfig, EndpointConfig())]


# -- evaluate ---------------------------------------------------------------------------------------------------------


def evaluate_command(args: Sequence[str]) -> int:
    """Evaluate a saved agent on held-out prompts; with --judge or --against also as another judge sees it."""
    parts: list[Part] = [
        ("folder", positional("DIR", Path, "what training saved")),
        ("settings", flat(EvaluateFlags)),
        env_flags(EnvSettings(split="validation")),
        *judge_parts(),
    ]
    tables = {"settings": "evaluate", "env": "env"}
    parsed = parse_command("evaluate", evaluate_command.__doc__, parts, tables, args)
    # Before torch is loaded: a wrong folder is said at once.
    folder = files.whole_checkpoint(parsed.folder)
    files.read_state(folder)
    from textrl_gym.evaluation.evaluator import Evaluator
    from textrl_gym.evaluation.metrics import metric, metric_names, number

    settings, split = parsed.settings, parsed.env.split
    agent = _agent(folder, settings, settings.base_model, parsed.env)
    evaluator = Evaluator(_changed(agent.env, parsed.env), settings.episodes, settings.seed, split)
    flags, against, judge = parsed.judging, parsed.judging.against or "start", None
    if (
        flags != JudgeFlags() or parsed.endpoint != type(parsed.endpoint)()
    ):  # made first: what is wrong is said before any work
        mdp = evaluator.mdp
        judge = flags.make(parsed.endpoint, parsed.folder, mdp.task, mdp.device, mdp.tokenizer)
        opponent = _opponent(against, settings, parsed.env)
    metrics, samples = evaluator.run(agent)
    # JSON gets the numbers in full; the table rounds them.
    numbers: dict[str, Any] = dict(metrics)
    rows = {metric(name).heading: number(metrics, name) for name in metric_names([metrics])}
    size, episodes = len(evaluator.mdp.source), settings.episodes
    met = f"{episodes} prompts" if episodes <= size else f"{episodes} completions of {size} prompts"
    title = f"{parsed.folder}: {met} of {split}, seed {settings.seed}"
    print_rows(title, rows)
    if judge is not None:
        tally = _judged(judge, evaluator, agent, samples, opponent, parsed.env)
        numbers["judged"] = {"judge": judge.name, "against": against} | tally.numbers()
        print_rows(f"judged by {judge.name} against {against}", tally_rows(tally))
    if settings.json is not None:
        files.write_text(settings.json, json.dumps(numbers, indent=1) + "\n")
    return 0


def _agent(folder: Path, settings: EvaluateFlags, base_model: str | None, changes: EnvSettings) -> Agent:
    """The saved agent, in its own environment or in the one that was named."""
    import gymnasium

    from textrl_gym.registry import load_agent

    env, moved = None, {name: value for name, value in changes.keywords().items() if name in ("dataset", "reward")}
    if settings.env is not None:
        # With the agent's own tokenizer: the environment's may have other tokens for the same ids.
        env, moved = gymnasium.make(find_env(settings.env), tokenizer=str(folder / "model")), {}
    return load_agent(folder, env, device=settings.device, base_model=base_model, env_settings=moved)


def _changed(env: TextVectorEnv, settings: EnvSettings) -> TextVectorEnv:
    """An agent's environment with the settings that the flags name in place of its own."""
    changes = {name: value for name, value in settings.keywords().items() if name != "split"}
    if "tokenizer" in changes:
        raise ValueError(f"--env.tokenizer {changes['tokenizer']!r}: an agent reads and writes by its own tokenizer")
    return env.remake(env.num_envs, **changes) if changes else env


def _opponent(against: str, settings: EvaluateFlags, changes: EnvSettings) -> Agent | str:
    """An agent, or the name of an opponent that is none."""
    from textrl_gym.experiments.win_rates import HUMAN, START

    if against in (START, HUMAN):
        return against
    if not Path(against).is_dir():
        raise ValueError(f"--against must be {START}, {HUMAN} or the folder of a saved agent, got {against!r}")
    return _agent(Path(against), settings, None, changes)


def _judged(
    judge: Judge,
    evaluator: Evaluator,
    agent: Agent,
    samples: list[dict[str, Any]],
    opponent: Agent | str,
    env: EnvSettings,
) -> Tally:
    """The tally of an evaluation's answers against the opponent's, by the same prompts and random numbers."""
    from textrl_gym.evaluation.evaluator import Evaluator
    from textrl_gym.experiments import win_rates

    mdp = evaluator.mdp
    reader = win_rates.Reader(mdp.task, mdp.tokenizer, mdp.source, mdp.max_prompt_tokens)
    if opponent == win_rates.HUMAN:
        pairs = win_rates.against_references(samples, reader)
    elif isinstance(opponent, str):
        assert agent.policy.reference is not None
        pairs = win_rates.against_answers(samples, evaluator.start(agent.policy.reference), reader)
    else:
        theirs = Evaluator(_changed(opponent.env, env), evaluator.episodes, evaluator.seed, env.split)
        pairs = win_rates.against_answers(samples, theirs.run(opponent, greedy=False)[1], reader)
    return win_rates.tally(judge.prefer(pairs.rows, pairs.own, pairs.other), pairs.longer_N, pairs.prompts)


def tally_rows(found: Tally) -> dict[str, str]:
    """A tally for the terminal."""
    counts = {"wins": found.wins, "ties": found.ties, "losses": found.losses, "no verdict": found.no_verdict}
    rates = {"win rate": found.win_rate, "win rate at equal lengths": found.length_controlled}
    return {name: str(count) for name, count in counts.items()} | {n: interval(rate) for n, rate in rates.items()}


# -- judge ------------------------------------------------------------------------------------------------------------


def judge_command(args: Sequence[str]) -> int:
    """Judge the answers of a finished comparison: DIR --judge gold|REWARD|endpoint --against start|human|AGENT."""
    parts: list[Part] = [("folder", positional("DIR", Path, "what `compare` wrote")), *judge_parts()]
    parsed = parse_flags("judge", judge_command.__doc__, parts, args)
    from textrl_gym.experiments import win_rates
    from textrl_gym.experiments.results import read_comparison

    folder, against = parsed.folder, parsed.judging.against or "start"
    comparison = read_comparison(folder)
    reader = _reader(folder, comparison.environment)
    judged_by = parsed.judging.make(parsed.endpoint, folder, reader.task, tokenizer=reader.tokenizer)
    judged = win_rates.judge_runs(comparison, judged_by, against, reader)
    file = folder / win_rates.file_name(judged_by.name, against)
    win_rates.table_of_runs(judged, judged_by.name, against).to_csv(file, index=False)
    headings = ("agent", "runs", "win rate (95%)", "equal lengths (95%)", "no verdict")
    rows = []
    for group, found in win_rates.by_agent(judged):
        missing = sum(int((one.outcome_N != one.outcome_N).sum()) for one in judged if one.group is group)  # nan
        rates = (interval(found.win_rate), interval(found.length_controlled))
        rows.append((group.label, str(len(group.runs)), *rates, str(missing)))
    title = f"judged by {judged_by.name} against {against}"
    print_tables(make_table(title, headings, rows, left=("agent",), no_wrap=(headings[0], *headings[2:4])))
    print(f"saved in {file}")
    return 0


def _reader(folder: Path, environment: str) -> Reader:
    """What the comparison's task knows of its prompts; nothing where it is not registered here."""
    from textrl_gym.experiments.results import PLAN, read_plan, spec_env
    from textrl_gym.experiments.win_rates import Reader
    from textrl_gym.mdp.task import PromptReader, checked_rows

    plan = read_plan(folder)
    with named_by(folder / PLAN, trust=False):
        register_again(environment, plan.get("registered"))
    if environment not in text_envs():
        return Reader()
    env = spec_env(plan["config"] | plan)
    task = env.task(environment)
    # Prompts were cut by the tokens of the model that was trained.
    tokenizer = task.load_tokenizer(env.tokenizer or plan["config"].get("model"))
    # As the environment had them: an answer's row is known by its index and by what the policy read.
    written_by = PromptReader(task, tokenizer, task.max_prompt_tokens, env.chat_settings())
    source = checked_rows(task, "validation", env.dataset, env.bad_rows, written_by)
    return Reader(task, tokenizer, source, task.max_prompt_tokens)
