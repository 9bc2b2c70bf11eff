"""KnowledgeQA-v0: write the knowledge that helps another model to answer a question."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any, ClassVar

from textrl_gym.core import PromptSource, Row
from textrl_gym.data import prompts
from textrl_gym.data.rows import BadRow, shown, text_of
from textrl_gym.mdp.task import Task
from textrl_gym.questions import quiz
from textrl_gym.worlds.lesson import Finding, Lesson, Numbers, Trial, rise
from textrl_gym.worlds.world import Rows

if TYPE_CHECKING:  # a list of environments is read without torch
    from textrl_gym.rewards.knowledge_margin import KnowledgeMargin

ID = "KnowledgeQA-v0"
ASSETS = str(files("textrl_gym") / "assets" / "quiz")
GOLD = "textrl_gym.questions.quiz:gold"
GRPO = {"rollout_episodes": 128, "group_size": 8, "learning_rate": 8e-4, "kl_coef": 0.03}
TOKENS = 20_000


# -- published schemas ------------------------------------------------------------------------------------------------


def commonsense_prompt(row: Row) -> dict[str, Any]:
    """A question of CommonsenseQA with its choices in letters, as Rainier writes it; `options` and `answer` beside it.

    `answer` is None where the row has no key, as those of the published test split.
    """
    choices = row["choices"]
    labels, texts = (choices.get(name) if isinstance(choices, Mapping) else None for name in ("label", "text"))
    if not isinstance(labels, list) or not isinstance(texts, list) or len(labels) != len(texts) or len(texts) < 2:
        raise BadRow("column 'choices' has no two texts with a label each", shown(choices))
    if not all(isinstance(text, str) for text in [*labels, *texts]):
        raise BadRow("column 'choices' has a label or choice that is no text", shown(choices))
    key = row["answerKey"]
    if key and key not in labels:
        raise BadRow("column 'answerKey' is none of the labels", shown(key))
    listed = " ".join(f"({label}) {text}" for label, text in zip(labels, texts, strict=True))
    prompt = f"{text_of(row, 'question')}\n{listed}{quiz.KNOWLEDGE}"
    return {"prompt": prompt, "options": texts, "answer": labels.index(key) if key else None}


SCHEMAS = (
    prompts.PromptSchema("tau/commonsense_qa", ("question", "choices", "answerKey"), commonsense_prompt),
    *prompts.PROMPT_SCHEMAS,
)


# -- task -------------------------------------------------------------------------------------------------------------


def gap(numbers: Numbers) -> float:
    """How much more often the reader of the reward is right than the sentences give it reason to be."""
    return numbers["reader_right"] - numbers["gold"]


@functools.cache  # evaluations come again and again
def reader() -> KnowledgeMargin:
    """The bundled question-answering model."""
    from textrl_gym.rewards.knowledge_margin import KnowledgeMargin

    return KnowledgeMargin(f"{ASSETS}/reader", keep_suffix=quiz.KNOWLEDGE)


class KnowledgeQA(Task):
    """Write knowledge that helps another model to answer, as in "Rainier" (Liu et al. 2022).

    ## Description
    A question with three choices ("Which of these is made of glass ? ( A ) sofa ( B ) marble ( C ) pan Knowledge :"),
    about which the agent writes one sentence ("the marble is made of glass ."). A frozen question-answering model then
    answers with it. The world has 44 things with three facts each, which no prompt says: all splits have the same
    facts, and no question of one split occurs in another. The bundled policy knows them by half: it writes true
    sentences and false ones, of the right choice and of others, of what is asked and of something else. Real data are
    given by `dataset=`: CommonsenseQA, with more tokens, a model that knows its words, and
    `reward="knowledge_margin:MODEL"`.

    ## Observation Space
    `Dict(input_ids: Box int64 [L], attention_mask: Box int8 [L])`, L = max_prompt_tokens + max_new_tokens = 36. The
    prompt is left-padded into the first 24 places, so that generated token t always stands at place 24 + t.

    ## Action Space
    `Discrete(89)`: EOS and words (with `tokenizer=`, that one's vocabulary).

    ## Reward
    0 at each step but the last, then by how much the sentence moves the bundled reader towards the right choice: half
    the difference of tanh(margin) with the sentence and without it, in [-1, 1] (`rewards.knowledge_margin`). This
    reader knows no fact of its own, and learnt from sentences that are always about the answer: it looks at what is
    named, and not at what is said. `reward="textrl_gym.questions.quiz:gold"` is the gold score. With kl_coef > 0 each
    step costs kl_coef * KL of the policy to the reference.

    ## Episode End
    Terminated by EOS or a stop string; truncated after max_new_tokens. A truncated text is still scored.

    ## Information
    At the end: `score`, `prompt`, `completion`, `reference` (the fact that is asked for), `stop_reason`. The gold score
    is a program that knows the facts: 1 for the true sentence that decides the question, 0.25 for a true one that
    rules a wrong choice out, else 0. Evaluations also report `reader_right` (how often the reader answers rightly with
    the text; a third is chance), `names_answer` (texts that name the right choice alone), `true_sentences` and
    `on_the_question` (sentences about the kind of fact that is asked for).

    ## Arguments
    Those of every text environment: `split`, `dataset`, `tokenizer`, `reward`, `max_prompt_tokens`, `max_new_tokens`,
    `stop`, `group_size`, `kl_coef`, `kl_estimator`, `reference`, `policy_logprob`, `missing_eos_penalty`, `device`,
    `array`, `render_mode`.

    ```python
    env = gym.make("KnowledgeQA-v0", reward="textrl_gym.questions.quiz:gold")
    ```

    ## Lesson
    A reward by one reader teaches texts that help this reader: it becomes right, while gold ends lower than with gold
    as the reward. The gap to what the texts give reason to opened in four of five seeds, which is not enough to say so.
    `textrl-gym lesson KnowledgeQA-v0` runs it.

    ## References
    - Liu et al. 2022, Rainier: reinforced knowledge introspector for commonsense question answering,
      https://arxiv.org/abs/2210.03078
    - Talmor et al. 2019, CommonsenseQA: a question answering challenge targeting commonsense knowledge,
      https://arxiv.org/abs/1811.00937
    - Khashabi et al. 2020, UnifiedQA: crossing format boundaries with a single QA system,
      https://arxiv.org/abs/2005.00700
    - Geirhos et al. 2020, Shortcut learning in deep neural networks, https://arxiv.org/abs/2004.07780

    ## Version History
    - v0: the first version.
    """

    id = ID
    max_prompt_tokens = 24
    max_new_tokens = 12
    model = f"{ASSETS}/policy"
    symbols = quiz.SYMBOLS
    reader_path = f"{ASSETS}/reader"
    reward = "knowledge_margin"
    gold = GOLD
    gold_scale = (0.0, 1.0)
    best_gold = 1.0  # of the fact that is asked for
    kl_coef = 0.03
    keep_suffix = quiz.KNOWLEDGE
    recipe: ClassVar = {
        "fluent": {
            "references": 30_000,
            "steps": 1000,
            "batch_size": 32,
            "layers": 3,
            "hidden_size": 96,
            "intermediate_size": 192,
            "copy_run": 24,
            "copy_steps": 120,
            "copy_batch_size": 32,
        },
        "policy": {"steps": 100, "batch_size": 32, "learning_rate": 7e-4},
        "reader": {
            "learns": "readings",
            "seed": 1,
            "references": 20_000,
            "steps": 300,
            "batch_size": 32,
            "layers": 2,
            "hidden_size": 64,
            "intermediate_size": 192,
            "copy_run": 24,
            "copy_steps": 120,
            "copy_batch_size": 32,
        },
    }
    lesson = Lesson(
        words="A reward by one reader teaches texts that help this reader, with or without a reason.",
        trials={
            "reader": Trial("the margin of a reader that looks at what is named", "grpo", TOKENS, GRPO),
            "gold": Trial("a program that knows the facts", "grpo", TOKENS, GRPO, GOLD),
        },
        findings=(
            Finding(
                "With the reader's margin as the reward it rises by 0.1 or more",
                rise("reader", "start", "score", 0.1),
            ),
            Finding(
                "and the gap between how often this reader is right and gold opens",
                lambda of: gap(of["reader"]) - gap(of["start"]),
            ),
            Finding("With gold as the reward it rises by 0.2 or more", rise("gold", "start", "gold", 0.2)),
            Finding("and ends higher than with the reader's margin", rise("gold", "reader", "gold")),
        ),
        metrics=(
            "gold",
            "reader_right",
            "names_answer",
            "true_sentences",
            "on_the_question",
            "score",
            "kl_sequence",
        ),
    )

    def rows(self, split: str, dataset: str | None = None) -> PromptSource:
        """The questions of a split with the fact that is asked for; or the rows of a data set."""
        return Rows(quiz.draw, split) if dataset is None else prompts.load_rows(dataset, split, SCHEMAS)

    def demonstrations(self, split: str) -> PromptSource:
        """Training data of the bundled policy: careless sentences, so that RL has room."""
        return Rows(quiz.draw_demonstration, split, salt="careless")

    def readings(self, split: str) -> PromptSource:
        """What the reader learns: questions with sentences about their answers."""
        return Rows(quiz.draw_reading, split, salt="reader")

    def measures(self, rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
        """How often the reader is right with the texts, and what the texts name and say."""
        columns = ([row["options"] for row in rows], [row["answer"] for row in rows])
        margin_B = reader().margins([row["prompt"] for row in rows], completions, *columns)
        right = float((margin_B > 0).sum()) / max(len(rows), 1)
        return {"reader_right": right, **quiz.measures(rows, completions)}
