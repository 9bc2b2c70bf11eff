"""The training loop: collect -> update -> log -> evaluate -> save. It imports no agent."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import MaybeCallback
from torch import Tensor

from textrl_gym import files, functional, processes
from textrl_gym.bounds import shown
from textrl_gym.console import plain, time_columns
from textrl_gym.core import Rollout
from textrl_gym.evaluation import health
from textrl_gym.evaluation.evaluator import Evaluator, Player
from textrl_gym.evaluation.reward_hacking import Evaluation
from textrl_gym.kl import KLPenalty
from textrl_gym.mdp import budgets
from textrl_gym.persistence import recovery, run_lock, signals, update_log
from textrl_gym.persistence.save_schedule import SaveSchedule, rescue
from textrl_gym.rollouts import vllm
from textrl_gym.rollouts.phases import listening, phase
from textrl_gym.rollouts.vllm import ServedRollouts
from textrl_gym.training import distributed, logs, run_folder
from textrl_gym.training.callbacks import EvaluationCallback, RewardHackingMonitor, locals_of_rollout
from textrl_gym.training.config import Clock, TrainOptions
from textrl_gym.training.distributed import Shardable
from textrl_gym.training.run_folder import append_evaluation

T = TypeVar("T")

LEAST_EVALUATIONS = 10
"""Of a run, spread evenly over its tokens, whatever its budget: fewer points are no learning curve."""


class Learner(Shardable, Player, Protocol):
    """An agent, as the training loop sees it. The loop stands below the agents and imports none."""

    out: Path | None
    home: Path | None
    finished: bool
    num_timesteps: int
    num_updates: int
    total_timesteps: int
    clock: Clock

    @property
    def seed(self) -> int: ...

    served: ServedRollouts | None

    @property
    def generator(self) -> torch.Generator: ...
    @property
    def by_server(self) -> bool: ...
    @property
    def one_process(self) -> bool: ...
    @property
    def trains(self) -> bool: ...
    @property
    def starts_at_reference(self) -> bool: ...
    @property
    def dropped_tokens(self) -> int: ...
    @property
    def seconds(self) -> dict[str, float]: ...
    @property
    def kl(self) -> KLPenalty: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def is_offline(self) -> bool: ...
    @property
    def bar_metrics(self) -> Mapping[str, str]: ...
    @property
    def logger(self) -> Logger: ...

    def set_logger(self, logger: Logger | None) -> None: ...
    def collect(self) -> Rollout: ...
    def update(self, rollout: Rollout) -> dict[str, float]: ...
    def save(self, path: str | Path) -> None: ...
    def extra_state(self) -> dict[str, Any]: ...
    def load_extra_state(self, state: dict[str, Any]) -> None: ...
    def rng_state(self) -> tuple[dict[str, Any], Tensor]: ...
    def load_rng_state(self, numbers: dict[str, Any], generator: Tensor, env: bool = True) -> None: ...


def train(
    agent: Learner,
    *,
    callback: MaybeCallback = None,
    log_interval: int = 1,
    tb_log_name: str | None = None,
    progress_bar: bool = True,
    options: TrainOptions | None = None,
) -> None:
    """Train an agent until its num_timesteps reach its total; see Agent.learn for the arguments.

    Writes into agent.out: progress.json (a JSON object a line), TensorBoard's files, evaluations.jsonl, samples.jsonl
    and checkpoints: before the first update, by time, at the end, and of the last whole update when the run is stopped
    by a signal or an error.

    Raises:
        ValueError: agent.out cannot be written, holds another run, or another process trains in it.
        health.HealthError: a line of the health card failed and options.on_bad_health is "stop".
        functional.NonFiniteError: a number that training needs is NaN or infinite.
        signals.Terminated: SIGTERM or SIGHUP came.
    """
    options = options or TrainOptions()
    if agent.one_process and processes.size() > 1:
        raise ValueError(f"{type(agent).__name__} trains in one process: start it without torchrun")
    _check_server(agent, options)
    out = agent.out = agent.out or processes.from_first(lambda: _new_folder(agent))
    with run_lock.alone(out):
        _prepare_folder(agent, out)
        run = _Run(agent, callback, log_interval, tb_log_name, options, progress_bar)
        try:
            run.open_tracker()
            with signals.hearing_signals() as run.stop, listening(run.phases), run.serving():
                run.loop(run.stop)
        except BaseException as error:
            run.rescue(error)
            raise
        finally:
            run.close()


def _check_server(agent: Learner, options: TrainOptions) -> None:
    """Raise ValueError where rollouts by a vLLM server are wanted of an agent that has none."""
    if not options.by_server:
        return
    name = type(agent).__name__
    if not agent.trains or agent.is_offline or not agent.by_server:
        raise ValueError(
            f"{name} has no rollouts that a vLLM server could sample: it trains nothing, learns from given texts, or "
            "samples from another distribution than the policy's; leave vllm_url and vllm_python out"
        )
    if options.rollouts_ahead and agent.config.importance_cap is None:
        raise ValueError("rollouts_ahead are of an older policy, and have to be weighed: give importance_cap")


def _prepare_folder(agent: Learner, out: Path) -> None:
    """Make room for the logs of a run that begins, or take out what one that goes on will log again."""
    if agent.home != out.resolve():
        # By the first process alone: to a later one what the first has begun to write would be another's run.
        if processes.from_first(lambda: run_folder.holds_run(out)):
            raise ValueError(f"{str(out)!r} holds a run already: load it to go on, or name another folder (out)")
        files.check_free(out, "train")
        run_folder.clear_logs(out)
    elif agent.num_updates:
        run_folder.cut_logs(out, agent.num_updates, agent.num_timesteps)
    else:
        run_folder.clear_logs(out)
    agent.home = out.resolve()


class _Run:
    """One call of train(): the agent and everything that watches it."""

    def __init__(
        self,
        agent: Learner,
        callback: MaybeCallback,
        log_interval: int,
        tb_log_name: str | None,
        options: TrainOptions,
        progress_bar: bool,
    ) -> None:
        self.agent, self.options, self.log_interval, self.tb_log_name = agent, options, log_interval, tb_log_name
        self.stop = signals.Stop()
        self.console = Console(stderr=True, quiet=not progress_bar or not processes.is_first())
        assert agent.out is not None
        self.out = agent.out
        self.phases = logs.PhaseSeconds()
        self.callback = _callback(callback)
        if options.on_hacking != "off" and not any(isinstance(c, RewardHackingMonitor) for c in _each(self.callback)):
            tell = functools.partial(self.console.print, style="bold yellow", markup=False, highlight=False)
            self.callback = CallbackList([self.callback, RewardHackingMonitor(options.on_hacking, tell=tell)])
        # One evaluator for the whole run: it keeps the reference's completions, which the win rate is against.
        self.evaluator = Evaluator(agent.env, options.eval_episodes, gold=options.gold)
        # After all that may fail: close() comes only where this came to its end.
        if not hasattr(agent, "logger"):  # one that set_logger() gave is kept, as in Stable-Baselines3
            agent.set_logger(update_log.new_logger(self.out / tb_log_name if tb_log_name else self.out))
        self.evaluated: dict[str, float] = {}
        """Numbers of the last evaluation, as they are logged."""
        self.evaluated_at = (0, 0)
        """Updates and timesteps of the last evaluation."""
        distributed.shard(agent, options.shard)
        self.last = recovery.LastUpdate(agent)
        self.saved_at: int | None = agent.num_updates if agent.num_updates else None
        """Updates of the checkpoint in the folder; None: there is none of this run."""
        self.schedule = SaveSchedule(options)
        self.seconds = agent.seconds  # kept by the agent, so that a resumed run goes on counting
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(table_column=Column(min_width=2 * len(str(agent.total_timesteps)) + 1)),
            TextColumn("tokens", markup=False, table_column=Column(min_width=6)),
            *time_columns(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            disable=self.console.quiet,
        )

    def open_tracker(self) -> None:
        """Log to the tracker too, where one is wanted."""
        name, agent = self.options.log_to, self.agent
        if name != "none" and processes.is_first():
            settings = dataclasses.asdict(agent.config) | {"agent": type(agent).__name__, "seed": agent.seed}
            settings["env"] = agent.env.task.id
            agent.logger.output_formats.append(
                logs.open_tracker(name, self.out, settings, goes_on=agent.num_updates > 0)
            )

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Inside, rollouts are a vLLM server's, where the options say so."""
        agent, options = self.agent, self.options
        if not options.by_server:
            yield
            return
        with vllm.connected(
            agent,
            self.out,
            url=options.vllm_url,
            python=options.vllm_python,
            arguments=options.vllm_args,
            transfer=options.vllm_transfer,
            ahead=options.rollouts_ahead,
        ) as agent.served:
            try:
                yield
            finally:
                agent.served = None

    def loop(self, stop: signals.Stop) -> None:
        agent, total = self.agent, self.agent.total_timesteps if self.agent.trains else 0
        agent.finished = False
        self.callback.init_callback(agent)  # type: ignore[arg-type] # an agent has what callbacks use of SB3's algorithms
        # The names that callbacks know from SB3's learn().
        of_learn = {"total_timesteps": total, "tb_log_name": self.tb_log_name, "log_interval": self.log_interval}
        self.callback.on_training_start(of_learn, globals())
        earlier = processes.from_first(self._earlier_evaluations)
        self._remember(earlier)
        with self.bar:
            task = self.task = self.bar.add_task(
                type(agent).__name__, total=total, completed=agent.num_timesteps, note=""
            )
            goes_on = self._begin(earlier, total)
            while goes_on and agent.num_timesteps < total:
                stop.check()
                # The clock counts from before the rollout: with it the last update of every run had learning rate 0.
                agent.clock = Clock(agent.num_updates + 1, agent.num_timesteps / total)
                self._tell_reward()
                # 1. Collect.
                # A rollout that is not learnt from is collected again after a resumption.
                self.last.before_rollout()
                self.callback.on_rollout_start()
                rollout = self._timed("collect", self._collect)
                if agent.num_updates == 0:
                    # Before any update, where the ratio must be 1 and the KL 0; later they may differ for good reasons.
                    self._check_health(rollout)
                agent.num_timesteps += rollout.num_tokens + agent.dropped_tokens
                # As SB3's collect_rollouts does: callbacks read the rollout from self.locals.
                self.callback.update_locals(locals() | locals_of_rollout(rollout))
                # A callback may ask the clock, by which processes would part.
                goes_on = processes.of_first(self.callback.on_step())
                self.callback.on_rollout_end()
                if not goes_on:
                    break
                # 2. Update.
                stop.check()
                metrics = self._timed("update", functools.partial(self._update, rollout))
                agent.num_updates += 1
                self.last.done()
                # 3. Adapt the KL coefficient.
                # Not inside the update: an agent that overrides it would have to remember to do this.
                facts = logs.rollout_metrics(rollout, not agent.is_offline, agent.config.importance_cap)
                agent.kl.adapt(facts["rollout/kl_sequence"], len(rollout))
                # 4. Log.
                facts |= {f"train/{name}": value for name, value in metrics.items()}
                facts |= logs.speed_metrics(self.phases.take(), rollout.num_tokens + agent.dropped_tokens)
                if agent.num_updates % self.log_interval == 0:
                    self._log(facts)
                self.bar.update(task, completed=min(agent.num_timesteps, total), note=self._note(facts))
                # 5. Evaluate and save.
                if self._evaluation_due(total):
                    goes_on = self._evaluate()
                if processes.of_first(self.schedule.due(agent.num_updates)):
                    self._save()
            self._evaluate_at_end(earlier)
        self.callback.on_training_end()
        agent.finished = True
        self._save()

    def _earlier_evaluations(self) -> list[Evaluation]:
        return run_folder.read_evaluations(self.out) if self.agent.num_updates else []

    def _remember(self, earlier: list[Evaluation]) -> None:
        for watcher in self._watchers():
            watcher.remember_evaluations(earlier)
        if earlier:
            last = earlier[-1].row
            # Not beyond now: a second learn() may count its timesteps anew.
            self.evaluated_at = last.get("updates", 0), min(last["timesteps"], self.agent.num_timesteps)

    def _begin(self, earlier: list[Evaluation], total: int) -> bool:
        """What comes before the first update of this call; whether all who watch want to go on."""
        agent = self.agent
        if agent.num_updates:
            # Stopped between an update and its evaluation, which is made up for.
            owed = self._evaluation_due(total) and not _evaluated(earlier, agent.num_updates)
            return self._evaluate() if owed else True
        self._tell_data()
        if agent.trains:
            self._evaluate(greedy=True)
            if agent.num_timesteps < total:
                # What cannot be saved is found out now, and not after hours of training.
                self._save()
        return True

    def _tell_data(self) -> None:
        """Say how much of the data the budgets cut, and write it down."""
        envs = {str(env.settings["split"]): env for env in (self.agent.env, self.evaluator.mdp)}
        lengths = {split: budgets.of_env(env) for split, env in envs.items()}
        if any(lengths.values()):
            if not self.console.quiet:
                budgets.tell(lengths)
            budgets.write(self.out, {split: env.source for split, env in envs.items()}, lengths)

    def _evaluation_due(self, total: int) -> bool:
        every, now = self.options.eval_every, self.agent.num_timesteps
        # The last evaluation comes behind the loop, with greedy decoding too, and would be done twice otherwise.
        if not every or now >= total:
            return False
        # From the last evaluation, which a resumed run reads from its folder: it evaluates where one that was not
        # stopped does.
        updates, timesteps = self.evaluated_at
        tenth, last_tenth = (LEAST_EVALUATIONS * t // total for t in (now, timesteps))
        return tenth > last_tenth or self.agent.num_updates - updates >= every

    def _evaluate_at_end(self, earlier: list[Evaluation]) -> None:
        # A kill may have come between the last evaluation and the last checkpoint.
        done = [row for row in earlier if row.row["updates"] == self.agent.num_updates and "score_greedy" in row.row]
        if not (done and self.agent.num_updates):
            self._evaluate(greedy=True)

    def _save(self) -> None:
        self.agent.save(self.out)
        self.saved_at = self.agent.num_updates
        self.schedule.saved()

    def rescue(self, error: BaseException) -> None:
        """Save the last whole update before the run ends by an error or a signal. Raises nothing."""
        agent = self.agent
        if not agent.trains:
            return
        # Moments that are sharded are gathered by all processes, or by none: one that failed alone is not there.
        whole = self.last.restore() and (agent.shards is None or self.stop.together)
        if agent.num_updates == 0 and self.saved_at is None:
            return  # nothing was trained, and the folder stays free
        words = rescue(error, self.out, agent.num_updates, self.saved_at, whole, self._save)
        with contextlib.suppress(OSError):  # a terminal that was closed
            self.console.print(plain(f"\n{words}"), highlight=False)

    def close(self) -> None:
        self.last.close()
        self.agent.logger.close()
        self.agent.set_logger(None)  # a later learn() goes on in new files beside these

    def _timed(self, name: Literal["collect", "update", "evaluate"], work: Callable[[], T]) -> T:
        begin = time.perf_counter()
        with phase(name):
            result = work()
        self.seconds[name] += time.perf_counter() - begin
        return result

    def _tell_reward(self) -> None:
        """Give the reward how far training is, as TRL's trainer does."""
        agent, mdp = self.agent, self.agent.env
        # A run's length is in tokens. Until there are any, completions are taken to be as long as they may be; a second
        # learn() counts tokens anew, and updates on.
        tokens = agent.num_timesteps / max(agent.num_updates, 1) or mdp.num_envs * mdp.max_new_tokens
        state = mdp.reward_model.trainer_state
        state.global_step, state.max_steps = agent.num_updates, math.ceil(agent.total_timesteps / tokens)
        state.epoch = agent.num_updates * mdp.num_envs / mdp.group_size / len(mdp.source)

    def _collect(self) -> Rollout:
        rollout = self.agent.collect()
        # The first rollout's health card has more to say of the same faults.
        if self.agent.num_updates:
            with self._naming_update():
                require_finite_rollout(rollout)
        return rollout

    def _update(self, rollout: Rollout) -> Mapping[str, float]:
        self.last.before_update()
        with self._naming_update(), distributed.updating(self.agent):
            metrics: Any = self.agent.update(rollout)
        if not isinstance(metrics, Mapping):  # a subclass forgets to return them
            name = type(self.agent).__name__
            raise TypeError(f"update(rollout) of {name} must return a mapping of numbers, got {shown(metrics)}")
        return metrics

    @contextlib.contextmanager
    def _naming_update(self) -> Iterator[None]:
        try:
            yield
        except functional.NonFiniteError as error:
            number = self.agent.num_updates + 1
            raise functional.NonFiniteError(f"update {number}: {error}; nothing is learnt from it") from error

    def _check_health(self, rollout: Rollout) -> None:
        agent = self.agent
        fresh = agent.num_timesteps == 0 and agent.starts_at_reference
        lines = health.card(agent.policy, rollout, agent.env.end_ids, fresh=fresh)
        self.console.print(plain(health.text(lines)), highlight=False)
        bad = [line for line in lines if not line.ok]
        if bad and self.options.on_bad_health == "stop":
            raise health.HealthError(
                "; ".join(f"{line.name}: {line.value} (likely cause: {line.cause})" for line in bad)
            )

    def _note(self, facts: dict[str, float]) -> str:
        """What stands behind the bar: the numbers that the agent names, of the update or the last evaluation."""
        known = facts | self.evaluated
        return "  ".join(words.format(known[key]) for key, words in self.agent.bar_metrics.items() if key in known)

    def _log(self, facts: dict[str, float]) -> None:
        agent = self.agent
        for name, value in (facts | agent.env.reward_model.take_metrics()).items():
            agent.logger.record(name, value)
        agent.logger.record("train/learning_rate", agent.learning_rate)
        agent.logger.record("train/kl_coef", agent.kl.coef)
        agent.logger.record("train/updates", agent.num_updates)
        agent.logger.record("time/total_timesteps", agent.num_timesteps)
        for name, seconds in self.seconds.items():
            agent.logger.record(f"time/{name}_seconds", seconds)
        agent.logger.dump(agent.num_timesteps)

    def _watchers(self) -> list[EvaluationCallback]:
        return [callback for callback in _each(self.callback) if isinstance(callback, EvaluationCallback)]

    def _evaluate(self, greedy: bool = False) -> bool:
        """Evaluate, write it down and tell those who watch; whether all of them want to go on."""
        agent = self.agent
        # Two kinds of GPU, or a custom update that only one process does, would part the weights without a word.
        processes.require_equal("the sum of all weights", _sum_of_weights(agent.policy))
        self._tell_reward()
        note = self.bar.tasks[self.task].fields["note"]
        self.bar.update(self.task, note="evaluating")  # or the bar would seem to hang
        metrics, samples = self._timed("evaluate", lambda: self.evaluator.run(agent, greedy=greedy))
        self.bar.update(self.task, note=note)
        row = {"timesteps": agent.num_timesteps, "updates": agent.num_updates} | metrics
        row["train_seconds"] = self.seconds["collect"] + self.seconds["update"]
        append_evaluation(self.out, row, samples)
        self.evaluated_at = agent.num_updates, agent.num_timesteps
        logs.log_evaluation(agent.logger, row)
        self.evaluated = {f"eval/{name}": float(value) for name, value in metrics.items()}
        if self.options.show_samples:
            self.console.print(samples_table(samples[: self.options.show_samples], metrics, agent.num_timesteps))
        answers = [watcher.on_evaluation(row, samples) for watcher in self._watchers()]
        return processes.of_first(all(answers))


def _sum_of_weights(policy: torch.nn.Module) -> float:
    weights = [p.detach() for p in policy.parameters()]
    return float(sum(p.sum(dtype=torch.float64) for p in weights)) if processes.size() > 1 else 0.0


def _evaluated(evaluations: list[Evaluation], updates: int) -> bool:
    """Whether there is an evaluation after so many updates."""
    return any(evaluation.row["updates"] == updates for evaluation in evaluations)


def require_finite_rollout(rollout: Rollout) -> None:
    """Raise NonFiniteError where a score, reward, value or log-probability of a rollout is NaN or infinite."""
    mask_BT = rollout.mask_BT
    functional.require_finite("the score of a completion", rollout.score_B)
    for name, values_BT in {
        "the log-probability of a token": rollout.logp_BT,
        "the reference's log-probability of a token": rollout.ref_logp_BT,
        "the reward of a token": rollout.reward_BT,
        "the value of a state": rollout.value_BT,
    }.items():
        functional.require_finite(name, values_BT[mask_BT])


def samples_table(samples: list[dict[str, Any]], metrics: dict[str, float], timesteps: int) -> Table:
    """A table of completions for the terminal, with the evaluation's means in its title."""
    means = "  ".join(f"{name} {value:.3g}" for name, value in metrics.items())
    title = plain(f"after {timesteps:,} tokens: {means}")
    # A title has the width of its table, which narrow completions would make narrow.
    table = Table(title=title, title_justify="left", show_lines=True, min_width=len(title))
    table.add_column("prompt (its end)", ratio=3)
    table.add_column("completion", ratio=3)
    table.add_column("score", justify="right")
    table.add_column("gold", justify="right")
    for sample in samples:
        gold = f"{sample['gold']:.2f}" if "gold" in sample else ""
        prompt, completion = plain(sample["prompt"][-300:]), plain(sample["completion"].strip())
        table.add_row(prompt, completion, f"{sample['score']:.2f}", gold)
    return table


def _new_folder(agent: Learner) -> Path:
    name = f"{type(agent).__name__}-{type(agent.env.task).__name__}-seed{agent.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    return files.make_new_folder(Path("runs") / name)  # another run may begin in the same second


def _each(callback: BaseCallback) -> Iterator[BaseCallback]:
    """A callback, or all that a list of them holds."""
    if isinstance(callback, CallbackList):
        for one in callback.callbacks:
            yield from _each(one)
    else:
        yield callback


def _callback(callback: MaybeCallback) -> BaseCallback:
    if callback is None:
        return CallbackList([])
    if isinstance(callback, list):
        return CallbackList(callback)
    return callback if isinstance(callback, BaseCallback) else ConvertCallback(callback)
