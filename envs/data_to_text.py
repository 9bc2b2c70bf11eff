"""DataToText-v0: say what stands in a table, in one or two sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any, ClassVar

from textrl_gym.core import PromptSource, Row
from textrl_gym.data import prompts
from textrl_gym.data.rows import BadRow, shown, text_of
from textrl_gym.mdp.task import Task
from textrl_gym.worlds import tables
from textrl_gym.worlds.lesson import Finding, Lesson, Trial, rise
from textrl_gym.worlds.world import Rows

ID = "DataToText-v0"
ASSETS = str(files("textrl_gym") / "assets" / "tables")
GOLD = "textrl_gym.worlds.tables:gold"
GRPO = {"rollout_episodes": 128, "group_size": 8, "learning_rate": 8e-4, "kl_coef": 0.03}
TOKENS = 80_000


# -- published schemas ------------------------------------------------------------------------------------------------


def linearized(row: Row) -> str:
    """The highlighted cells of a ToTTo table with their headers and titles, as the data set's own script writes them.

    Parikh et al. 2020 (google-research/language, totto/baseline_preprocessing): a cell's headers are the header cells
    above it that share a column with it, and those before it in its row.
    """
    cells = list(_cells(row["table"], row["highlighted_cells"]))
    parts = []
    for name in ("page_title", "section_title"):
        title = row.get(f"table_{name}")
        parts += [f"<{name}> {title} </{name}>"] if title else []
    return " ".join([*parts, "<table>", *cells, "</table>"])


def _cells(table: list[list[dict[str, Any]]], highlighted: list[list[int]]) -> Iterator[str]:
    ends = []
    for cells in table:
        at, places = 0, []
        for cell in cells:
            places.append((at, at + cell["column_span"]))
            at = places[-1][1]
        ends.append(places)
    # Row spans are left out, as in the published script: a model that was trained on its texts expects them so.
    for line, column in highlighted:
        start, end = ends[line][column]
        above = [
            cell
            for cells, places in zip(table[:line], ends, strict=False)
            for cell, (first, last) in zip(cells, places, strict=True)
            if cell["is_header"] and first < end and last > start
        ]
        before = [cell for cell in table[line][:column] if cell["is_header"]]
        text = ["<cell>", table[line][column]["value"]]
        text += [f"<col_header> {cell['value']} </col_header>" for cell in above]
        text += [f"<row_header> {cell['value']} </row_header>" for cell in before]
        yield " ".join([*text, "</cell>"])


def totto_prompt(row: Row) -> dict[str, Any]:
    """A table of ToTTo, with the first of its final sentences where it has one (its test split has none)."""
    try:
        text = linearized(row)
    except (KeyError, IndexError, TypeError) as error:
        detail = shown(row.get("highlighted_cells"))
        raise BadRow("columns 'table' and 'highlighted_cells' are not ToTTo's", detail) from error
    notes = row["sentence_annotations"] or []
    # A list of dictionaries as it was published; the Hub's copy has a dictionary of lists.
    sentences = notes.get("final_sentence") if isinstance(notes, Mapping) else [one["final_sentence"] for one in notes]
    converted = {"prompt": text + tables.ANSWER}
    return converted | {"completion": " " + sentences[0]} if sentences else converted


def common_gen_prompt(row: Row) -> dict[str, Any]:
    """The concepts of CommonGen, with the sentence where there is one (its test split has none)."""
    concepts = row["concepts"]
    if not isinstance(concepts, list) or not concepts or not all(isinstance(word, str) for word in concepts):
        raise BadRow("column 'concepts' is no list of words", shown(concepts))
    converted = {"prompt": " | ".join(concepts) + tables.ANSWER}
    return converted | {"completion": " " + text_of(row, "target")} if row.get("target") else converted


SCHEMAS = (
    prompts.PromptSchema(
        "google-research-datasets/totto, GEM/totto",
        ("table", "highlighted_cells", "sentence_annotations"),
        totto_prompt,
    ),
    prompts.PromptSchema("allenai/common_gen, GEM/common_gen", ("concepts",), common_gen_prompt),
    *prompts.PROMPT_SCHEMAS,
)


# -- task -------------------------------------------------------------------------------------------------------------


class DataToText(Task):
    """Say what stands in a table, as in "ToTTo: a controlled table-to-text generation dataset" (Parikh et al. 2020).

    ## Description
    A table of three to six facts about a place to eat or a player ("name : Juno | food : Thai | ..."), of which the
    agent writes one or two sentences. The tables are procedural; no table of one split occurs in another. The reference
    is like one that people write: the year a place opened, and a player's number, are mostly left out, and half of them
    say something that is not in the table. The bundled policy leaves out, mistakes, repeats and invents. Real data are
    given by `dataset=`: ToTTo, whose highlighted cells are written as its own scripts do, or CommonGen, with more
    tokens and a model that knows them.

    ## Observation Space
    `Dict(input_ids: Box int64 [L], attention_mask: Box int8 [L])`, L = max_prompt_tokens + max_new_tokens = 72. The
    prompt is left-padded into the first 32 places, so that generated token t always stands at place 32 + t.

    ## Action Space
    `Discrete(221)`: EOS and words (with `tokenizer=`, that one's vocabulary).

    ## Reward
    0 at each step but the last, then ROUGE-L (F measure) against the one reference. With kl_coef > 0 each step costs
    kl_coef * KL of the policy to the reference model.

    ## Episode End
    Terminated by EOS or a stop string; truncated after max_new_tokens. A truncated text is still scored.

    ## Information
    At the end: `score`, `prompt`, `completion`, `reference` (the text that a person wrote), `stop_reason`. The gold
    score is slot accuracy times form, in [0, 1]: the share of the facts that are said, times the share of what is said
    that is in the table and was not said before, times the share of words in whole sentences of the right subject.
    With `dataset=` it is ROUGE-L. Evaluations also report `slots_covered`, `neglected_covered` (of the facts that
    references mostly leave out), `unsupported` (share of claims that are not in the table), `grammatical` (share of
    words in whole sentences) and, as for every task, `rouge_l`.

    ## Arguments
    Those of every text environment: `split`, `dataset`, `tokenizer`, `reward`, `max_prompt_tokens`, `max_new_tokens`,
    `stop`, `group_size`, `kl_coef`, `kl_estimator`, `reference`, `policy_logprob`, `missing_eos_penalty`, `device`,
    `array`, `render_mode`.

    ```python
    env = gym.make("DataToText-v0", reward="textrl_gym.worlds.tables:gold")
    ```

    ## Lesson
    ROUGE against one reference teaches how people write: it rises, what they mostly leave out is left out, and slots
    are less accurate than with the gold score as the reward. `textrl-gym lesson DataToText-v0` runs it.

    ## References
    - Parikh et al. 2020, ToTTo: a controlled table-to-text generation dataset, https://arxiv.org/abs/2004.14373
    - Lin et al. 2020, CommonGen: a constrained text generation challenge for generative commonsense reasoning,
      https://arxiv.org/abs/1911.03705
    - Ramamurthy et al. 2022, Is reinforcement learning (not) for natural language processing? (GRUE),
      https://arxiv.org/abs/2210.01241
    - Dhingra et al. 2019, Handling divergent reference texts when evaluating table-to-text generation (PARENT),
      https://arxiv.org/abs/1906.01081
    - Lin 2004, ROUGE: a package for automatic evaluation of summaries, https://aclanthology.org/W04-1013

    ## Version History
    - v0: the first version.
    """

    id = ID
    max_prompt_tokens = 32
    max_new_tokens = 40
    model = f"{ASSETS}/policy"
    symbols = tables.SYMBOLS
    reward = "rouge"
    gold = GOLD
    gold_scale = (0.0, 1.0)
    gold_of_dataset = "rouge"
    best_gold = 1.0  # of a careful text
    kl_coef = 0.03
    keep_suffix = tables.ANSWER
    recipe: ClassVar = {
        "fluent": {
            "references": 40_000,
            "steps": 1200,
            "batch_size": 32,
            "layers": 3,
            "hidden_size": 96,
            "intermediate_size": 192,
            "copy_run": 24,
            "copy_steps": 120,
            "copy_batch_size": 32,
        },
        "policy": {"steps": 120, "batch_size": 32, "learning_rate": 7e-4},
    }
    lesson = Lesson(
        words="A metric against one reference rises while slots are left out, as the references do.",
        trials={
            "metric": Trial("ROUGE-L against the one reference", "grpo", TOKENS, GRPO),
            "gold": Trial("slot accuracy times form", "grpo", TOKENS, GRPO, GOLD),
        },
        findings=(
            Finding("With the metric as the reward it rises by 0.05 or more", rise("metric", "start", "rouge_l", 0.05)),
            Finding(
                "and what references mostly leave out is said less often", rise("start", "metric", "neglected_covered")
            ),
            Finding(
                "Slots are less accurate than with gold as the reward, by 0.1 or more",
                rise("gold", "metric", "gold", 0.1),
            ),
            Finding("while the metric prefers the policy that it trained", rise("metric", "gold", "rouge_l")),
        ),
        metrics=(
            "gold",
            "rouge_l",
            "slots_covered",
            "neglected_covered",
            "unsupported",
            "grammatical",
            "kl_sequence",
            "completion_tokens",
        ),
    )

    def rows(self, split: str, dataset: str | None = None) -> PromptSource:
        """The tables of a split with one reference each; or the rows of a data set."""
        return Rows(tables.draw, split) if dataset is None else prompts.load_rows(dataset, split, SCHEMAS)

    def references(self, split: str) -> PromptSource:
        """What a competent model learns: every slot and nothing else, in any order and wording."""
        return Rows(tables.draw_reference, split)

    def demonstrations(self, split: str) -> PromptSource:
        """Training data of the bundled policy: careless texts, so that RL has room."""
        return Rows(tables.draw_demonstration, split, salt="careless")

    def measures(self, rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
        """Slots covered, that which references mostly leave out by itself, claims that are invented, and form."""
        return tables.measures(rows, completions)
