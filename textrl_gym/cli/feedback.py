"""The commands of feedback, by people and by models: `annotate`, `labels`, `rlhf` and `constitutional`.

No torch before the flags are read.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal

from textrl_gym import files
from textrl_gym.cli.options import Part, env_flags, environment, flag, flat, parse_command, parse_flags, positional
from textrl_gym.cli.terminal import make_table, print_tables
from textrl_gym.llm.asking import EndpointConfig, is_language_model
from textrl_gym.registry import find_env, unknown
from textrl_gym.web.server import LOOPBACK

if TYPE_CHECKING:
    from textrl_gym.data.labels import Item
    from textrl_gym.feedback.critics import Critic
    from textrl_gym.recipes.rounds import Annotate


def annotate_command(args: Sequence[str]) -> int:
    """Ask people which completions are better, on a page: ENV, a run or comparisons, into a file of labels."""
    from textrl_gym.feedback.questions import AnnotateConfig

    about = "an environment id (or module:Class of a Task), the folder of a run, or comparisons: a file, a folder"
    parts: list[Part] = [
        ("source", positional("ENV|RUN|PAIRS", str, about)),
        ("out", flag(Path, "the file of labels, *.jsonl; one that was begun goes on")),
        ("settings", flat(AnnotateConfig)),
        env_flags(),
        ("host", flag(str, "where to listen; beyond this machine the address has a secret token"), LOOPBACK),
        ("port", flag(int, "0: a free one"), 0),
    ]
    tables = {"settings": "annotate", "env": "env"}
    parsed = parse_command("annotate", annotate_command.__doc__, parts, tables, args)
    from textrl_gym.web import annotate as home

    place = (parsed.host, parsed.port)
    with home.make_server(parsed.source, parsed.out, parsed.settings, parsed.env, *place) as server:
        print(f"{server.address}  (Ctrl-C ends it; the same command goes on)", flush=True)
        server.serve_forever()
    return 0


@dataclasses.dataclass(frozen=True)
class Labellers:
    """Who answers."""

    by: str = "simulated"
    """simulated: annotators by the task's gold score, noise and bias and all; page: people, on a page that this command
    serves; endpoint: a language model, by --endpoint.model and so on; local:FOLDER: a language model of this machine,
    local alone the task's own; rules: the environment's rule-based critic, by the principles of our constitution (the
    last three are RLAIF)."""
    host: str = LOOPBACK
    """Where the page is served; beyond this machine its address has a secret token."""
    port: int = 0
    """Of the page; 0: a free one."""

    def __post_init__(self) -> None:
        if self.by not in ("simulated", "page", "rules") and not is_language_model(self.by):
            raise ValueError(f"by must be simulated, page, rules, endpoint, local or local:FOLDER, got {self.by!r}")


def rlhf_command(args: Sequence[str]) -> int:
    """Iterated RLHF: labels on what the policy writes, a reward model, a new policy; several rounds, resumable."""
    from textrl_gym.feedback.critics import CriticErrors
    from textrl_gym.judges.annotators import Annotators
    from textrl_gym.pipeline.reward_data import RewardModelConfig
    from textrl_gym.recipes import rounds

    about = "its folder; the same one goes on. None: runs/rlhf-ENV"
    parts: list[Part] = [
        environment(),
        ("out", flag(Path | None, about), None),
        ("settings", flat(rounds.RoundsConfig)),
        ("labellers", flat(Labellers)),
        ("reward_model", RewardModelConfig, RewardModelConfig()),
        ("annotators", Annotators, Annotators()),
        ("errors", CriticErrors, CriticErrors()),
        ("endpoint", EndpointConfig, EndpointConfig()),
        env_flags(),
    ]
    tables = {"settings": "rlhf", "labellers": "rlhf", "env": "env"}
    parsed = parse_command("rlhf", rlhf_command.__doc__, parts, tables, args)
    env_id = find_env(parsed.environment)
    out = parsed.out or Path("runs") / f"rlhf-{env_id}"
    annotate = _annotate(parsed, out)
    try:
        result = rounds.run_rounds(env_id, parsed.settings, parsed.reward_model, annotate, out, parsed.env)
    except KeyboardInterrupt:
        print(f"go on with the same command, --out {out}", file=sys.stderr)
        raise
    from textrl_gym.cli.compare import show_page
    from textrl_gym.reports import rounds_page as home

    for one in result.rounds:
        show_page(rounds.policy_folder(out, one.number))
    head, rows = home.rounds_table(result)
    print_tables(make_table(f"{env_id}: rounds of RLHF", head, rows, left=()))
    print(home.rounds_report(result))
    return 0


def _annotate(parsed: SimpleNamespace, out: Path) -> Annotate:
    """Who answers the questions of a round."""
    labellers, endpoint, seed = parsed.labellers, parsed.endpoint, parsed.settings.seed
    if labellers.by == "page":
        from textrl_gym.feedback.questions import AnnotateConfig
        from textrl_gym.web.annotate import serve_until_answered

        config = AnnotateConfig(seed=seed)
        return lambda items, file, _: serve_until_answered(items, file, config, labellers.host, labellers.port)
    from textrl_gym.feedback.answers import LabelFile

    if is_language_model(labellers.by):
        from textrl_gym.feedback.judged import answer_by_judge, verdict_report
        from textrl_gym.judges.llm_judge import load_language_judge

        task, device = parsed.env.task(find_env(parsed.environment)), parsed.settings.device
        judge = load_language_judge(labellers.by, endpoint, out, task=task, device=device)

        def ask(items: Sequence[Item], path: Path, appeals: dict[str, list[float]]) -> None:
            with LabelFile(path) as file:
                answer_by_judge(items, file, judge)
                print(verdict_report(file.history), flush=True)

        return ask
    if labellers.by == "rules":
        from textrl_gym.feedback.constitution import read_constitution
        from textrl_gym.feedback.critics import load_rule_critic
        from textrl_gym.recipes import constitutional, critiques

        critic = load_rule_critic(parsed.env.task(find_env(parsed.environment)), parsed.errors)
        drawn, principles = constitutional.ConstitutionalConfig(seed=seed), read_constitution()
        # Before anything is sampled: a principle that it has no rule for would fail in the middle of a round.
        critic.check(principles)
        return lambda items, path, _: critiques.judge_pairs(items, path, critic, principles, drawn)
    from textrl_gym.feedback.simulated import answer_all

    def simulate(items: Sequence[Item], path: Path, appeals: dict[str, list[float]]) -> None:
        with LabelFile(path) as file:
            answer_all(items, file, parsed.annotators, appeals, seed)

    return simulate


@dataclasses.dataclass(frozen=True)
class CriticChoice:
    """Who criticises, revises and compares."""

    by: Literal["rules", "model", "endpoint"] = "rules"
    """rules: the rule-based critic of the environment's embedded prompts, with the errors of --errors.*; model: a chat
    model of transformers, by its chat template; endpoint: a chat model behind an endpoint, by --endpoint.*."""
    critic_model: str | None = None
    """The chat model of --by model: a Hub id or a folder; None: the initial policy criticises itself."""


def constitutional_command(args: Sequence[str]) -> int:
    """Constitutional AI: critique and revision by principles, SFT, AI preferences, RL; resumable, with a page."""
    from textrl_gym.feedback.critics import CriticErrors
    from textrl_gym.llm.endpoint import ClientConfig
    from textrl_gym.pipeline.reward_data import RewardModelConfig
    from textrl_gym.pipeline.sft import SFTConfig
    from textrl_gym.recipes import constitutional

    about = "its folder; the same one goes on. None: runs/constitutional-ENV"
    parts: list[Part] = [
        environment(),
        ("out", flag(Path | None, about), None),
        ("settings", flat(constitutional.ConstitutionalConfig)),
        ("critic", flat(CriticChoice)),
        ("errors", CriticErrors, CriticErrors()),
        ("endpoint", ClientConfig, ClientConfig()),
        ("sft", SFTConfig, constitutional.SUPERVISED),
        ("reward_model", RewardModelConfig, constitutional.COMPARED),
        env_flags(),
    ]
    tables = {"settings": "constitutional", "critic": "constitutional", "env": "env"}
    parsed = parse_command("constitutional", constitutional_command.__doc__, parts, tables, args)
    env_id = find_env(parsed.environment)
    out = parsed.out or Path("runs") / f"constitutional-{env_id}"

    def make_critic() -> Critic:
        return _critic(parsed, env_id, out)

    try:
        result = constitutional.run_constitutional(
            env_id, parsed.settings, parsed.sft, parsed.reward_model, make_critic, out, parsed.env
        )
    except KeyboardInterrupt:
        print(f"go on with the same command, --out {out}", file=sys.stderr)
        raise
    from textrl_gym.cli.compare import show_page
    from textrl_gym.reports import constitutional_page as home

    show_page(out / "policy")
    head, rows = home.counts_table(result)
    print_tables(make_table("data", head, rows, left=("data",)))
    head, rows = home.stages_table(result)
    print_tables(make_table(f"{env_id}: Constitutional AI by {result.critic}", head, rows, left=(head[0],)))
    print(home.constitutional_report(result))
    return 0


def _critic(parsed: SimpleNamespace, env_id: str, out: Path) -> Critic:
    """Who criticises; loads a model, or connects an endpoint."""
    from textrl_gym.feedback import critics, speakers

    task = parsed.env.task(env_id)
    if parsed.critic.by == "rules":
        return critics.load_rule_critic(task, parsed.errors)
    if parsed.critic.by == "endpoint":
        return critics.ChatCritic(speakers.EndpointSpeaker(parsed.endpoint, out / speakers.REPLIES))
    model = parsed.critic.critic_model or parsed.settings.model or task.model
    return critics.ChatCritic(speakers.ModelSpeaker(model, parsed.settings.device))


def labels_command(args: Sequence[str]) -> int:
    """Labels of annotators: `labels report FILE`, `labels export FILE --format ...`, `labels import FILE ...`."""
    if not args or args[0] in ("-h", "--help"):
        print(LABELS_HELP)
        return 0
    if args[0] not in LABELS_COMMANDS:
        raise unknown("command of labels", args[0], LABELS_COMMANDS)
    return LABELS_COMMANDS[args[0]](args[1:])


LABELS_HELP = """\
usage: textrl-gym labels report FILE [--out PAGE] [--json FILE]
       textrl-gym labels export FILE --format trl|openai|alpaca-farm|argilla|label-studio --out FILE
       textrl-gym labels import FILE --format trl|openai|alpaca-farm|argilla|label-studio --out FILE

report: agreement between annotators, with themselves and with known answers, and their habits
export: labels that `annotate` wrote, in the form of another tool
import: the labels of another tool, as `annotate` writes them

`textrl-gym labels report --help` and so on list the settings of each."""

FILE_ABOUT = "a file of labels, as `annotate` writes it"


def _report(args: Sequence[str]) -> int:
    """Agreement between annotators, with themselves and with known answers, and their habits, as a page."""
    parts: list[Part] = [
        ("file", positional("FILE", Path, FILE_ABOUT)),
        ("out", flag(Path | None, "the page; None: FILE with the ending .html"), None),
        ("json", flag(Path | None, "also write the numbers to this file"), None),
    ]
    parsed = parse_flags("labels report", _report.__doc__, parts, args)
    from textrl_gym.feedback import agreement
    from textrl_gym.reports import labels_page as home

    out = parsed.out or parsed.file.with_suffix(".html")
    report = home.labels_report(parsed.file, out)
    headings, rows = home.people_table(report.people)
    tables = [
        make_table(str(parsed.file), ("measure", "value"), home.overall_rows(report), left=("measure",)),
        make_table("annotators", headings, rows, left=("annotator",)),
    ]
    if report.models:
        headings, rows = home.models_table(report)
        tables.append(make_table("models", headings, rows, left=("model", "other")))
    print_tables(*tables)
    for words in report.warnings:
        print(f"warning: {words}")
    if parsed.json is not None:
        files.write_text(parsed.json, json.dumps(agreement.as_record(report), indent=1) + "\n")
    print(f"saved in {out}")
    return 0


def _export(args: Sequence[str]) -> int:
    """Write labels in the form of another tool."""
    return _convert("export", _export.__doc__, FILE_ABOUT, args)


def _import(args: Sequence[str]) -> int:
    """Read the labels of another tool into a file as `annotate` writes it."""
    return _convert("import", _import.__doc__, "the file of the other tool", args)


def _convert(command: str, about: str | None, file_about: str, args: Sequence[str]) -> int:
    from textrl_gym.feedback import formats

    parts: list[Part] = [
        ("file", positional("FILE", Path, file_about)),
        ("format", flag(formats.Format, "the other tool's form")),
        ("out", flag(Path, "the file to write")),
    ]
    parsed = parse_flags(f"labels {command}", about, parts, args)
    work = formats.export_labels if command == "export" else formats.import_labels
    count = work(parsed.file, parsed.format, parsed.out)
    print(f"saved in {parsed.out}: {count:,} {'labels' if command == 'import' else 'entries'}")
    return 0


LABELS_COMMANDS = {"report": _report, "export": _export, "import": _import}
