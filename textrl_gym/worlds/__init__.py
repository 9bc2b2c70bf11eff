"""Procedural text worlds: the embedded tasks' prompts and reference texts. No torch.

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
