"""KnownOptimum-v0: a task so small that its KL-regularised optimum is computed exactly.

The optimum of E_pi[r(x, y)] - beta KL(pi || pi_ref), over all policies, is (Ziegler et al. 2019; Rafailov et al. 2023,
eq. 4)

    pi*(y | x) = pi_ref(y | x) exp(r(x, y) / beta) / Z(x)

and with three symbols and three tokens all 40 completions of a prompt can be written down.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from textrl_gym.core import Row
from textrl_gym.data import sources
from textrl_gym.mdp.task import Task

if TYPE_CHECKING:  # a list of environments is read without torch
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from textrl_gym.policy.policy import Policy

ID = "KnownOptimum-v0"

SYMBOLS = ("a", "b", "c")
TOKENS = 3
PROMPTS = ("a", "b c")
EOS_ID = 0


def table(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
    """A fixed reward of text alone: 1 for each "a" after the prompt's own number of symbols, 0.5 for ending in "b"."""
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        symbols = completion.split()
        late = sum(symbol == "a" for symbol in symbols[len(prompt.split()) - 1 :])
        scores.append(0.5 * late + 0.5 * (symbols[-1:] == ["b"]) - 0.25 * (not symbols))
    return scores


def completions() -> list[list[int]]:
    """Every possible completion as token ids: all of up to TOKENS - 1 symbols and EOS, and all of TOKENS symbols."""
    ids = range(1, len(SYMBOLS) + 1)
    ended = [[*y, EOS_ID] for n in range(TOKENS) for y in itertools.product(ids, repeat=n)]
    return ended + [list(y) for y in itertools.product(ids, repeat=TOKENS)]


def sequence_logprobs(policy: Policy, prompt: str) -> Tensor:
    """log pi(y | prompt) of every completion, in the order of completions(). float64 [40], exact.

    Read from the distribution of the next token after each prefix, so that any kind of policy will do.
    """
    import torch

    from textrl_gym.functional import pad
    from textrl_gym.models import tiny

    prompt_ids = tiny.symbol_tokenizer(SYMBOLS)(prompt)["input_ids"]
    # Completions share their beginnings: the 40 have 13 different prefixes, and one pass serves them all.
    prefixes = sorted({tuple(y[:t]) for y in completions() for t in range(len(y))})
    input_XL, mask_XL = pad([[*prompt_ids, *prefix] for prefix in prefixes], "left")
    with torch.no_grad():
        logp_XV = policy.next_logprobs(input_XL.to(policy.device), mask_XL.to(policy.device)).double()
    after = dict(zip(prefixes, logp_XV, strict=True))
    return torch.stack([torch.stack([after[tuple(y[:t])][y[t]] for t in range(len(y))]).sum() for y in completions()])


def optimum(reference: Policy, prompt: str, kl_coef: float) -> Tensor:
    """log pi*(y | prompt) of every completion, in the order of completions(). float64 [40]."""
    import torch

    from textrl_gym.models import tiny

    tokenizer = tiny.symbol_tokenizer(SYMBOLS)
    texts = [tokenizer.decode(y, skip_special_tokens=True) for y in completions()]
    reward_Y = torch.tensor(table([prompt] * len(texts), texts), dtype=torch.float64)
    # log_softmax divides by Z(x), as these are all completions that there are.
    return (sequence_logprobs(reference, prompt) + reward_Y / kl_coef).log_softmax(0)


def distance(policy: Policy, reference: Policy, kl_coef: float) -> float:
    """KL(pi || pi*) in nats per sequence, mean over the prompts."""
    distances = []
    for prompt in PROMPTS:
        logp_Y, best_Y = sequence_logprobs(policy, prompt), optimum(reference, prompt, kl_coef)
        distances.append((logp_Y.exp() * (logp_Y - best_Y)).sum().item())
    return sum(distances) / len(distances)


class KnownOptimum(Task):
    """Reach a KL-regularised optimum that is known in closed form.

    ## Description
    Two prompts, three symbols and EOS, at most three tokens: 40 completions of each prompt. The optimum is
    pi*(y | x) proportional to pi_ref(y | x) exp(r(x, y) / kl_coef), and `textrl_gym.envs.known_optimum.distance` gives
    KL(pi || pi*) exactly. An algorithm that maximises the KL-shaped return must come near 0.

    ## Observation Space
    `Dict(input_ids: Box int64 [5], attention_mask: Box int8 [5])`: two prompt places, three generated.

    ## Action Space
    `Discrete(4)`: EOS, a, b, c.

    ## Reward
    At the end a fixed function of prompt and completion (`table`) in [-0.25, 2]; minus the KL penalty where it is on.

    ## Episode End
    Terminated by EOS, truncated after three tokens.

    ## Information
    At the end `score`, `prompt`, `completion`, `stop_reason`.

    ## Arguments
    Those of every text environment: see textrl_gym.mdp.text_env.TextVectorEnv.

    ## References
    Ziegler et al. 2019, arXiv:1909.08593; Rafailov et al. 2023, arXiv:2305.18290, equation 4.

    ## Version History
    * v0: first version
    """

    max_prompt_tokens = 2
    max_new_tokens = TOKENS
    model = "a random Llama made in code"
    reward = "textrl_gym.envs.known_optimum:table"
    kl_coef = 0.5  # rewards reach 2: the optimum differs from the reference, and is not yet one completion

    def rows(self, split: str, dataset: str | None = None) -> Sequence[Row]:
        """The two prompts, in every split."""
        sources.check_split(split)
        if dataset is not None:
            raise ValueError(f"KnownOptimum-v0 has only its own prompts; dataset must be None, got {dataset!r}")
        return [{"prompt": prompt} for prompt in PROMPTS]

    def load_tokenizer(self, name: str | None = None) -> PreTrainedTokenizerBase:
        from textrl_gym.models import tiny

        return tiny.symbol_tokenizer(SYMBOLS) if name is None else super().load_tokenizer(name)

    def load_model(
        self, name: str | None = None, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> nn.Module:
        # A larger scale than usual: the reference must differ from uniform for the test to mean something.
        if name is not None:
            return super().load_model(name, device=device, dtype=dtype)
        from textrl_gym.models import tiny

        return tiny.llama(len(SYMBOLS) + 1, scale=0.2)
