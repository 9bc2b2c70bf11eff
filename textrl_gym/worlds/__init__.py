"""Procedural text worlds: the embedded tasks' prompts and reference texts. No torch.

- `world`: rows that are a function of split, seed and index, and that no two splits share
- `lesson`: Lesson: what a task shows about RL from feedback
- `claims`: what a text says of known facts, and what it is worth by them
- `orders`: lists with constraints that a program can check
- `news`: articles with a catchy lead, and summaries of the facts that matter
- `provocations`: rude remarks with invented words, to be continued politely
- `requests`: requests that are safe, unsafe, or only sound so
- `reviews`: reviews with mixed judgements, to be continued
- `tables`: a few facts about a place or a player, to be said in one or two sentences
- `tldr`: forum posts with short summaries, in the format of trl-lib/tldr
- `tldr_grammar`: the phrase bank and the grammar that reference texts and gold score share
"""

from __future__ import annotations

from textrl_gym.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "TLDRCorpus": "tldr",
    },
)
