"""The fast driver of the MDP: complete episodes, all rows at once.

- `collect`: collect(env, policy) -> Rollout
- `sampler`: cached sampling of completions
- `dialogues`: conversations while they are sampled
- `text_actions`: an environment whose action is a whole turn, as text
- `recording`: episodes of a policy or an agent as trajectories
- `scoring`: log-probabilities, entropy, KL and reward of a rollout
- `batching`: rows of a rollout in micro-batches of a token budget
- `phases`: phases of training, for timers and counters that listen
- `vllm`: rollouts by a vLLM server, with the sampler's arguments
- `weight_transfer`: ways of the policy's weights to that server
- `vllm_client`: its HTTP interface
- `vllm_process`: a server that is started for a run
"""

from __future__ import annotations

from textrl_gym.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "rollout_of": "collect",
        "complete": "collect",
        "generate": "sampler",
        "Completions": "sampler",
        "TextActions": "text_actions",
        "rollout_logprobs": "scoring",
        "token_entropy": "scoring",
        "rescore": "scoring",
        "micro_batches": "batching",
    },
)
