"""Rollouts by a vLLM server: a sampler with the arguments of `sampler.generate`, over HTTP.

    before a rollout    sync        the policy's weights go to the server, which then has a version of them
    a rollout           generate    one request a row: token ids in, token ids and log-probabilities out

Nothing is encoded or decoded on the way, and where a completion ends is decided here, by the one stop rule. Each row
has a seed of its own, made of its random numbers, so that rollouts depend on neither the order of requests nor the
number of processes. What the server computes differs from the training forward by kernels and dtype; the rollout has
both log-probabilities (see `Rollout.sampler_logp_BT`).

Shape legend: U unique prompts, B rows, P prompt places, T response places.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from textrl_gym import processes
from textrl_gym.core import Rollout
from textrl_gym.mdp.text_env import TextVectorEnv
from textrl_gym.policy.policy import Policy
from textrl_gym.rollouts import vllm_process, weight_transfer
from textrl_gym.rollouts.collect import Collection
from textrl_gym.rollouts.dialogues import Dialogues
from textrl_gym.rollouts.sampler import Completions, sampled_elsewhere
from textrl_gym.rollouts.vllm_client import Client, ServerError, TransferName, Unreachable
from textrl_gym.rollouts.weight_transfer import WeightTransfer

FIRST_VERSION = "default"
"""What a server calls the weights that it has read itself: nobody has sent any since it was started."""
TRIES = 6
"""Of what got no answer, each after a longer wait."""
RESTART_SECONDS = 600.0
"""How long a server may be gone: a large model takes minutes to load."""
WRONG_MODEL_NATS = 0.5
"""Log-probabilities that differ by more, in the mean of some tokens, are another model's: kernels and bfloat16 make
some hundredths."""


class StaleWeightsError(ServerError):
    """The server has other weights than the policy that is trained."""


class VLLMSampler:
    """Completes prompts by a server that has been given a policy's weights.

    Args:
        client: of the server.
        transfer: how weights get there.
        restart_seconds: how long to wait for a server that is gone.
    """

    def __init__(self, client: Client, transfer: WeightTransfer, restart_seconds: float = RESTART_SECONDS) -> None:
        self.client, self.transfer, self.restart_seconds = client, transfer, restart_seconds
        self.model = ""
        """The server's name of its model."""
        self.version = ""
        """Of the weights that the server must have."""
        self._run, self._sent, self._opened = secrets.token_hex(4), 0, False
        self._weights: tuple[Policy, int] | None = None
        self.sends_again = True
        """Whether a server that was started again gets the weights again; not while an update changes them."""

    # -- before the first rollout -------------------------------------------------------------------------------------

    def check(self, policy: Policy, mdp: TextVectorEnv, updates: int = 0) -> None:
        """Hold that the server can sample for a policy, before any long work; it has the policy's weights afterwards.

        Args:
            updates: after which the policy has these weights.

        Raises:
            Unreachable, ServerError: with what is wrong, and how the server has to be started.
        """
        client = self.client
        try:
            client.wait(0.0)
        except Unreachable as error:
            raise Unreachable(f"no vLLM server answers at {client.url}: {error}") from error
        self.model = client.get("v1/models")["data"][0]["id"]
        try:
            client.get("weight_info")
            config = client.get("server_info?config_format=json")["vllm_config"]
        except ServerError as error:
            raise ServerError(
                f"{client.url} has no RL endpoints: start it with VLLM_SERVER_DEV_MODE=1, vLLM 0.29 or newer ({error})"
            ) from error
        _check_config(client.url, config, self.transfer.needs, mdp.max_prompt_tokens + mdp.max_new_tokens)
        self.sync(policy, updates)
        self._check_probabilities(policy, mdp)

    def _check_probabilities(self, policy: Policy, mdp: TextVectorEnv) -> None:
        """Compare the probabilities of some tokens at the server with the policy's own."""
        own_env = mdp.remake(1, group_size=1)  # its streams of prompts are the run's
        own_env.reset(seed=0)
        (prompt,) = own_env.draw()[1]
        (choice,) = self._answers([self._request(policy, prompt, min(8, mdp.max_new_tokens), (), seed=0)])
        ids, logps = _tokens_of(choice)
        total = 0.0
        for place, (token, logp) in enumerate(zip(ids, logps, strict=True)):
            input_BL = torch.tensor([[*prompt, *ids[:place]]], device=policy.device)
            total += abs(float(policy.next_logprobs(input_BL, torch.ones_like(input_BL))[0, token]) - logp)
        if total / len(ids) > WRONG_MODEL_NATS:
            raise ServerError(
                f"log-probabilities of {self.client.url} differ from the policy's by {total / len(ids):.2f} nats a "
                f"token: its model {self.model!r} is another one, or has not taken the weights"
            )

    # -- weights ------------------------------------------------------------------------------------------------------

    def sync(self, policy: Policy, updates: int) -> None:
        """Give the server the weights that a policy has after so many updates, unless it has them.

        Of several processes the first sends.

        Raises:
            StaleWeightsError: the server has others afterwards.
        """
        if self._weights is not None and self._weights[0] is policy and self._weights[1] == updates:
            return
        self.version = processes.from_first(lambda: self._send(policy))
        self._weights = (policy, updates)

    def _send(self, policy: Policy) -> str:
        self._sent += 1
        version, client = f"{self._run}-{self._sent}", self.client
        client.wait(self.restart_seconds)
        if not self._opened or self._version_of_server() == FIRST_VERSION:
            self.transfer.open(client, policy.device)
            self._opened = True
        # "wait": someone else's requests come to their end; and caches of the old weights are cleared.
        client.post("pause?mode=wait")
        try:
            self.transfer.send(client, policy, version)
        finally:
            client.post("resume")
        if (at_server := self._version_of_server()) != version:
            raise StaleWeightsError(f"{client.url} has weights {at_server!r} after {version!r} were sent to it")
        return version

    def _version_of_server(self) -> str:
        return str(self.client.get("weight_info")["weight_version"])

    def _require_weights(self) -> None:
        """Hold that the server has the weights of the last `sync`; one that was started again gets them again.

        Raises:
            Unreachable: it is gone for too long.
            StaleWeightsError: it has others.
        """
        if self._weights is None:
            raise StaleWeightsError(f"{self.client.url} was given no weights yet: sync() comes before generate()")
        self.client.wait(self.restart_seconds)
        at_server = self._version_of_server()
        if at_server == self.version:
            return
        if at_server != FIRST_VERSION:
            raise StaleWeightsError(
                f"{self.client.url} has weights {at_server!r}, not {self.version!r} of this run: "
                "another run has sent its own, and needs a server of its own"
            )
        # Other processes do not know of it, and sample on.
        if processes.size() > 1 or not self.sends_again:
            raise StaleWeightsError(f"{self.client.url} was started again: go on from the last checkpoint")
        self.version = self._send(self._weights[0])

    # -- sampling -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        policy: Policy,
        prompt_UP: Tensor,
        prompt_mask_UP: Tensor,
        source_B: Tensor,
        uniform_BT: Tensor | None,
        *,
        max_new_tokens: int,
        end_ids: Sequence[int],
        stopped: Callable[[list[list[int]]], list[bool]] | None = None,
        dialogues: Dialogues | None = None,
    ) -> Completions:
        """Sample one completion for each row from the full softmax; arguments and result as of `sampler.generate`.

        A stop string is looked for behind the end: the server samples up to the budget or an end token.

        Raises:
            ServerError: the server refuses, is gone, or has other weights.
        """
        if dialogues is not None:
            raise ValueError("conversations are not sampled by a server: replies come between the tokens")
        prompts = [ids[mask].tolist() for ids, mask in zip(prompt_UP.cpu(), prompt_mask_UP.cpu().bool(), strict=True)]
        seeds = [None] * len(source_B) if uniform_BT is None else row_seeds(uniform_BT)
        requests = [
            self._request(policy, prompts[source], max_new_tokens, end_ids, seed)
            for source, seed in zip(source_B.tolist(), seeds, strict=True)
        ]
        ids, logps = zip(*(_tokens_of(choice) for choice in self._answers(requests)), strict=True)
        if (highest := max(map(max, ids))) >= policy.vocab_size:
            raise ServerError(f"{self.client.url} sampled token {highest} of {policy.vocab_size}")
        limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "end_ids": end_ids, "stopped": stopped}
        try:
            completions = sampled_elsewhere(ids, logps, **limits)
        except ValueError as error:
            raise ServerError(f"{self.client.url}: {error}") from error
        return completions.to(policy.device)

    def _request(
        self, policy: Policy, prompt: list[int], max_new_tokens: int, end_ids: Sequence[int], seed: int | None
    ) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_new_tokens,
            # What is not named is taken from the model's generation_config.
            "temperature": 0.0 if seed is None else policy.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            # The environment says what ends a completion, and not the model.
            "ignore_eos": True,
            "stop_token_ids": list(end_ids),
            "logprobs": 0,  # of the token that was taken, and no alternatives
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        if seed is not None:
            request["seed"] = seed
        if policy.rows > policy.vocab_size:  # rows beyond the tokenizer get no probability, as in Policy.logits
            request["logit_bias"] = {str(token): -100 for token in range(policy.vocab_size, policy.rows)}
        return request

    def _answers(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A completion of each request, all by the weights of the last sync; what got no answer is asked again."""
        answers: list[dict[str, Any] | None] = [None] * len(requests)
        for number in range(TRIES):
            if number:
                time.sleep(min(0.1 * 4**number, 30.0))
            self._require_weights()
            version, missing = self.version, [row for row, answer in enumerate(answers) if answer is None]
            fresh = self.client.complete([requests[row] for row in missing])
            # A server that was started again meanwhile has answered by its first weights: those answers do not count.
            self._require_weights()
            if self.version == version:
                for row, answer in zip(missing, fresh, strict=True):
                    answers[row] = answer
            whole = [answer for answer in answers if answer is not None]
            if len(whole) == len(requests):
                return whole
        lost = sum(answer is None for answer in answers)
        raise Unreachable(f"{self.client.url}: {lost} of {len(requests)} completions got no answer in {TRIES} tries")


def row_seeds(uniform_BT: Tensor) -> list[int]:
    """A seed for each row, of the bits of its first two random numbers: a function of the global row, as they are."""
    bits_B2 = (uniform_BT[:, :2].double() * 2**24).long().tolist()
    return [sum(bits << (24 * place) for place, bits in enumerate(row)) for row in bits_B2]


def _tokens_of(choice: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities of a completion.

    Raises:
        ServerError: the server does not give them.
    """
    ids, logprobs = choice.get("token_ids"), choice.get("logprobs") or {}
    logps = logprobs.get("token_logprobs")
    if not ids or not all(isinstance(token, int) for token in ids):
        raise ServerError(
            f"the server gives no token ids (return_token_ids), but {sorted(choice)}: is it vLLM >= 0.29?"
        )
    if not logps or len(logps) != len(ids) or any(logp is None for logp in logps):
        raise ServerError(f"the server gives {len(ids)} tokens, but no log-probability of each")
    return ids, logps


def _check_config(url: str, config: dict[str, Any], backend: str | None, places: int) -> None:
    """Hold that a server was started as rollouts need it.

    Raises:
        ServerError: naming the flag.
    """
    model = config["model_config"]
    if model.get("logprobs_mode") != "processed_logprobs":
        raise ServerError(
            f"{url} has --logprobs-mode {model.get('logprobs_mode')}, whose log-probabilities are at temperature 1: "
            "start it with --logprobs-mode processed_logprobs"
        )
    transfer = (config.get("weight_transfer_config") or {}).get("backend")
    if backend is not None and transfer != backend:
        raise ServerError(
            f"{url} takes weights by {transfer!r}, not {backend!r}: start it with --weight-transfer-config "
            f'\'{{"backend": "{backend}"}}\', or choose another vllm_transfer'
        )
    if model["max_model_len"] < places:
        raise ServerError(
            f"{url} has room for {model['max_model_len']} tokens (--max-model-len), and prompts and completions of "
            f"this environment have up to {places}"
        )


# -- rollouts of a training run ---------------------------------------------------------------------------------------


class Trained(Protocol):
    """An agent, as its rollouts see it."""

    @property
    def env(self) -> TextVectorEnv: ...
    @property
    def policy(self) -> Policy: ...
    @property
    def generator(self) -> torch.Generator: ...
    @property
    def num_updates(self) -> int: ...


class ServedRollouts:
    """Rollouts of a training run by a server: by the newest weights or, `ahead`, by those before the last update.

    Ahead (one step off-policy; Noukhovitch et al. 2024, arXiv:2410.18252) the next rollout is sampled while the update
    runs. Prompts and random numbers come in the same order as otherwise, and scores, log-probabilities and values are
    computed when the update is over, so that the importance weights are those of the newest policy to the sampler.
    """

    def __init__(self, sampler: VLLMSampler, ahead: bool = False) -> None:
        self.sampler, self.ahead = sampler, ahead
        self.streams: tuple[Any, Tensor] | None = None
        """Where prompts and random numbers stood before the next rollout was drawn; None: none is drawn."""
        self._next: Collection | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollouts")

    def collect(self, agent: Trained, kl_coef: float) -> Rollout:
        """A rollout of the agent; ahead, the next one is begun."""
        if self._next is not None:
            self._next.finish()  # before the server gets other weights
        self.sampler.sends_again = True
        self.sampler.sync(agent.policy, agent.num_updates)
        current = self._next or self._drawn(agent)
        current.finish()
        self.forget()
        if self.ahead:
            self.streams = (agent.env.streams(), agent.generator.get_state())
            self.sampler.sends_again = False
            self._next = self._drawn(agent).begin(self._pool)
        return current.rollout(kl_coef)

    def _drawn(self, agent: Trained) -> Collection:
        agent.policy.try_out(agent.env.max_prompt_tokens, agent.env.max_new_tokens)
        return Collection(agent.env, agent.policy, generator=agent.generator, sample=self.sampler.generate)

    def forget(self) -> None:
        """Begin with no rollout that was drawn ahead."""
        self._next = self.streams = None

    def close(self, agent: Trained) -> None:
        """Give back what was drawn ahead: who trains on draws it again."""
        if self.streams is not None:
            agent.env.restore_streams(self.streams[0])
            agent.generator.set_state(self.streams[1])
        self.forget()
        self._pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def connected(
    agent: Trained,
    folder: Path,
    *,
    url: str | None,
    python: str | None,
    arguments: str,
    transfer: TransferName,
    ahead: bool,
) -> Iterator[ServedRollouts]:
    """Rollouts by the server at a url, or by one that is started for them and ends with the block.

    Args:
        folder: of the run.
        python, arguments: of the server, see vllm_process.started.

    Raises:
        ValueError: the policy or the environment has no rollouts by a server.
        ServerError: no server answers, or it cannot do what rollouts need.
    """
    policy, mdp = agent.policy, agent.env
    if transfer != "disk" and policy.device.type != "cuda":
        raise ValueError(
            f"vllm_transfer={transfer!r} needs the policy on a GPU, and it is on {policy.device}: take 'disk'"
        )
    policy.require_one_text("be sampled by a vLLM server")
    if mdp.turns is not None:
        raise ValueError(f"{type(mdp.task).__name__} is a conversation, whose replies a vLLM server cannot give")
    with contextlib.ExitStack() as stack:
        if python is not None:
            server = vllm_process.started(
                python,
                policy,
                mdp.tokenizer,
                folder,
                places=mdp.max_prompt_tokens + mdp.max_new_tokens,
                transfer=transfer,
                arguments=arguments,
            )
            url = processes.from_first(lambda: stack.enter_context(server))
        assert url is not None
        client = Client(url)
        stack.callback(client.close)
        sampler = VLLMSampler(client, weight_transfer.make(transfer, folder))
        sampler.check(policy, mdp, agent.num_updates)
        rollouts = ServedRollouts(sampler, ahead)
        stack.callback(rollouts.close, agent)
        yield rollouts
