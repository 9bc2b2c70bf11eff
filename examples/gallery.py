"""A page for each environment of a comparison: python examples/gallery.py runs/benchmark --out docs/gallery

Each page has the environment's card, the learning curves of all agents, and what the initial policy and the best agent
wrote for the first prompts. It is Markdown with SVG pictures; needs matplotlib.
"""

import argparse
import inspect
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

from textrl_gym.experiments.results import Comparison, Group
from textrl_gym.experiments.suite import SuiteResult, read_suite
from textrl_gym.mdp.env_settings import EnvSettings

SAMPLES = 3
"""Prompts of a page: the first of the last evaluation, so that nobody has chosen them."""
POINTS = 20
"""Places of a curve: a place is the mean over the updates around it, of all seeds."""


def curve(group: Group) -> tuple[np.ndarray, np.ndarray]:
    """Mean training score by generated tokens, over updates and seeds. [POINTS], nan where there is no update."""
    tokens = [row["time/total_timesteps"] for run in group.runs for row in run.rollouts]
    # A conversation is scored turn by turn.
    scores = [row["rollout/score"] + row.get("rollout/turn_rewards", 0.0) for run in group.runs for row in run.rollouts]
    edges = np.linspace(0, max(tokens), POINTS + 1)
    place = np.clip(np.digitize(tokens, edges) - 1, 0, POINTS - 1)
    means = [np.mean(of) if (of := np.array(scores)[place == n]).size else np.nan for n in range(POINTS)]
    return (edges[:-1] + edges[1:]) / 2, np.array(means)


def draw(comparison: Comparison, file: Path) -> None:
    """The training score of each agent over tokens."""
    # The same file for the same numbers, and words as text, which is found and is small.
    mpl.rcParams.update({"svg.hashsalt": "textrl-gym", "svg.fonttype": "none", "font.size": 9})
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    for number, group in enumerate(one for one in comparison.groups if not one.untrained):
        tokens, scores = curve(group)
        there = ~np.isnan(scores)
        style = "-" if number < 5 else "--"  # colours alone do not tell eight apart
        axes.plot(tokens[there], scores[there], style, color=f"C{number % 5}", label=group.label, linewidth=1.4)
    axes.set_xlabel("generated tokens")
    axes.set_ylabel("training score")
    axes.grid(alpha=0.25)
    axes.legend(ncols=1, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def text_of(sample: dict, key: str) -> str:
    """A completion with its score, as lines of a text block."""
    score = f"{key} {sample[key]:.2f}"
    return f"[{score}] {sample['completion'].strip() or '(nothing)'}"


def samples(group: Group, key: str) -> list[str]:
    """What the initial policy and an agent's first seed wrote for the first prompts."""
    lines = []
    for episode in group.runs[0].episodes[:SAMPLES]:
        texts = ["prompt", episode["prompt"].strip(), "", "initial policy", text_of(episode["start"], key)]
        texts += ["", f"after {group.label}", text_of(episode, key)]
        lines += ["```text", *[line.replace("```", "'''") for line in texts], "```", ""]
    return lines


def numbers(comparison: Comparison, result: SuiteResult) -> list[str]:
    """A table: the last evaluation of each agent, the best first."""
    key, env_id = comparison.gold, comparison.environment
    groups = sorted(comparison.groups, key=lambda group: -np.mean(group.finals(key)))
    lines = [f"| agent | {key}, mean of seeds | least and most | KL, nats a text | tokens |", "|---|---|---|---|---|"]
    for group in groups:
        finals = group.finals(key)
        cells = [f"`{group.label}`", f"{np.mean(finals):.3f}"]
        cells += ["-" if len(finals) < 2 else f"{min(finals):.3f} to {max(finals):.3f}"]
        # Plus 0: a KL of -1e-7 is no "-0.00".
        cells += [f"{round(np.mean(group.finals(name)), 2) + 0:g}" for name in ("kl_sequence", "completion_tokens")]
        lines.append("| " + " | ".join(cells) + " |")
    start, best = result.anchors[env_id]
    return [*lines, "", f"The initial policy has {start:.3f}; the best that is known is {best:.3f}."]


def page(comparison: Comparison, result: SuiteResult, picture: str) -> str:
    """The page of an environment."""
    env_id, key = comparison.environment, comparison.gold
    task = EnvSettings().task(env_id)
    card = inspect.cleandoc(type(task).__doc__ or "")
    first, _, rest = card.partition("\n")
    trained = [group for group in comparison.groups if not group.untrained]
    best = max(trained, key=lambda group: np.mean(group.finals(key)))
    tokens = comparison.config["total_timesteps"]
    parts = [
        f"# {env_id}\n\n{first}",
        f'```python\nimport gymnasium as gym\nimport textrl_gym\n\nenv = gym.make("{env_id}")\n```',
        f"## Learning curves\n\n![Training score of {len(trained)} agents over generated tokens]({picture})",
        f"Default settings, {tokens:,} generated tokens a run, {len(best.runs)} seeds, as in the "
        "[benchmark](../benchmark.md). The training score is what is trained on, without the KL penalty; the table has "
        f"the last evaluation, on {len(best.runs[0].episodes)} held-out prompts.",
        "\n".join(numbers(comparison, result)),
        f"## Samples\n\nOf the first {SAMPLES} held-out prompts, by the agent with the best mean.",
        "\n".join(samples(best, key)).rstrip(),
        rest.strip(),
    ]
    return "\n\n".join(parts) + "\n"


def index(result: SuiteResult) -> str:
    """The page that lists the environments."""
    lines = [
        "# Gallery",
        "",
        "Each environment with its card, learning curves and samples before and after training.",
        "",
    ]
    lines += ["| environment | task | initial policy | best agent here |", "|---|---|---|---|"]
    for env_id, comparison in result.comparisons.items():
        key = comparison.gold
        first = inspect.cleandoc(type(EnvSettings().task(env_id)).__doc__ or "").partition("\n")[0]
        best = max(comparison.groups, key=lambda group: np.mean(group.finals(key)))
        start = result.anchors[env_id][0]
        cells = [f"[{env_id}]({env_id}.md)", first.rstrip("."), f"{key} {start:.2f}"]
        lines.append("| " + " | ".join([*cells, f"`{best.label}` {np.mean(best.finals(key)):.2f}"]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", type=Path, help="the folder of a comparison over tasks")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    result = read_suite(args.suite)
    args.out.mkdir(parents=True, exist_ok=True)
    for env_id, comparison in result.comparisons.items():
        draw(comparison, args.out / f"{env_id}.svg")
        (args.out / f"{env_id}.md").write_text(page(comparison, result, f"{env_id}.svg"), encoding="utf-8")
    (args.out / "index.md").write_text(index(result), encoding="utf-8")
    print(f"{len(result.comparisons)} pages in {args.out}")


if __name__ == "__main__":
    main()
