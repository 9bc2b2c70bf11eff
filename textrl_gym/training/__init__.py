"""Training: the agents' base class, the loop around its updates, and a run's files.

- `config`: settings that every agent has
- `agent`: Agent: the base of every algorithm
- `loop`: collect, update, adapt the KL coefficient, log, evaluate, save
- `logs`: what is logged of updates and evaluations, and where
- `callbacks`: callbacks that see evaluations; the monitor of reward hacking
- `checkpoint`: saving an agent to a folder, and loading it
- `dependencies`: what a run stands on beside its checkpoint, known by hash
- `run_folder`: a run's files: one writer and one reader; who may train in it
- `distributed`: weights, gradients and moments sharded over processes (FSDP2)
- `minibatch`: the rows of one optimizer step, the parts of them that fit in memory, and the optimizer
- `preference_pairs`: pairs of completions and the losses on them (DPO and relatives)
- `guided_decoding`: decoding with a trained critic
"""

from __future__ import annotations

from textrl_gym.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "AgentConfig": "config",
        "Agent": "agent",
        "TrainOptions": "loop",
        "EvaluationCallback": "callbacks",
        "RewardHackingMonitor": "callbacks",
    },
)
