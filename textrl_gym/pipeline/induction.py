"""Induction for tiny models: an initialisation that can copy, and a curriculum that practises it.

A model of a few million parameters that is trained on summaries from a random start never learns to take a name or an
amount out of the post: it has no induction heads ("this token stood there; copy what followed"), and none form.

Shape legend: B rows, N tokens of a run, L places, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from textrl_gym.pipeline.trainer import Phase

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def induction_init(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    """Start a Llama's first two layers as an induction circuit: find where this token stood, copy what followed it.

    Layer 0 looks one token back: its query bias q and key bias k = R(1) q meet at distance 1 under rotary positions R.
    It writes a rotation M of that token's embedding beside the token's own. In layer 1 a query A x meets keys A M^T x,
    so that a token attends to the places whose predecessor was the same token, and copies them. Everything else is
    random, and all of it is trained. (Olsson et al. 2022, "In-context Learning and Induction Heads", for the circuit.)

    Why: from a random start, 800 updates of the copying curriculum got to 2 nats a token and no further (the entropy of
    "one of the recent tokens"), under seven settings of width, learning rate and positions; from here 150 get to 0.12.
    """
    decoder: Any = model.model
    width = model.config.hidden_size
    head = width // model.config.num_attention_heads

    def rotation() -> Tensor:
        return torch.linalg.qr(torch.randn(width, width, generator=generator))[0]

    embedding_std = width**-0.5  # tied embeddings of norm 1: a token's logit for itself is sqrt(width)
    embedding = decoder.embed_tokens.weight
    embedding.copy_(torch.randn(embedding.shape, generator=generator) * embedding_std)

    back = decoder.layers[0].self_attn
    # Any direction will do; 3 makes the attention to the place before sharp from the start.
    query = torch.full((head,), 3.0)
    cos, sin = decoder.rotary_emb(query[None, None], torch.tensor([[1]]))
    half_turned = torch.cat([-query[head // 2 :], query[: head // 2]])
    # Rotated by one place: the two meet at distance 1 and nowhere else as well.
    key = query * cos[0, 0] + half_turned * sin[0, 0]
    back.q_proj.bias.copy_(query.repeat(width // head))
    back.k_proj.bias.copy_(key.repeat(width // head))
    read, write = rotation(), rotation()
    back.v_proj.weight.copy_(read)
    back.o_proj.weight.copy_(embedding_std * write)

    match = decoder.layers[1].self_attn
    same, copied = rotation(), rotation()
    match.q_proj.weight.copy_(same)
    match.k_proj.weight.copy_(same @ (write @ read).T)
    match.v_proj.weight.copy_(copied)
    # A third of the way: the model has to learn when to copy, and unlearns it less easily than it strengthens it.
    match.o_proj.weight.copy_(0.3 * copied.T)


class CopyCurriculum(Phase):
    """Practise induction: predict runs of random tokens while they repeat; a quarter of a length, then all of it.

    Args:
        steps: at most so many updates.
        target_loss: it ends when the running mean on the longest runs is below this, in nats a token.
        longest_run: of tokens.
        seed: of the runs.
    """

    name = "copying"
    smoothing = 0.1

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        steps: int,
        target_loss: float,
        longest_run: int,
        batch_size: int,
        rate: float,
        seed: int,
    ) -> None:
        super().__init__(steps)
        self.model, self.target_loss, self.longest_run, self.batch_size = model, target_loss, longest_run, batch_size
        self.rate = rate
        self.generator = torch.Generator().manual_seed(seed)
        # Short runs first: with few places to look at, the circuit forms sooner.
        self.longest = max(2, longest_run // 4)

    def losses(self, step: int) -> Iterator[Tensor]:
        """Cross-entropy of the repeated tokens of random runs, in nats a token."""
        longest, generator = self.longest, self.generator
        # Half a run more than the longest, so that every run repeats at least in part.
        width = longest + max(longest // 2, 8)
        # B lengths of run, in a quarter of the longest to the longest; each run starts again from its first token.
        run_B1 = torch.randint(max(2, longest // 4), longest + 1, (self.batch_size, 1), generator=generator)
        size = self.model.config.vocab_size
        fresh_BN = torch.randint(size, (self.batch_size, longest), generator=generator)
        place_L = torch.arange(width)
        ids_BL = fresh_BN.gather(1, place_L % run_B1)
        again_BL = (place_L > run_B1)[:, 1:]  # the first token of a second run cannot be foreseen
        device = self.model.device
        logits_BLV = self.model(input_ids=ids_BL[:, :-1].to(device), use_cache=False).logits
        yield F.cross_entropy(logits_BLV[again_BL.to(device)].float(), ids_BL[:, 1:][again_BL].to(device))

    def learning_rate(self, step: int) -> float:
        """A warm-up and no decay: it ends by its loss."""
        return self.rate * min(1.0, (step + 1) / 50)

    def ends(self, mean_loss: float) -> bool:
        """Whether the longest runs are copied; short ones that are make way for those."""
        if mean_loss >= self.target_loss:
            return False
        if self.longest == self.longest_run:
            return True
        self.longest = self.longest_run
        return False

    def state(self) -> dict[str, Any]:
        return {"longest": self.longest, "generator": self.generator.get_state().numpy().tobytes().hex()}

    def go_to(self, step: int, state: Mapping[str, Any]) -> None:
        if state:
            self.longest = state["longest"]
            held = bytearray.fromhex(state["generator"])
            self.generator.set_state(torch.frombuffer(held, dtype=torch.uint8))

    def measured(self, steps: int, mean_loss: float) -> dict[str, float]:
        """Updates taken, and the last running mean of the loss in nats a token."""
        return {"copy_steps": steps, "copy_loss": mean_loss}
