"""Many runs: comparisons of agents, win rates, speed.

- `compare`: every agent, seed and KL coefficient on the same prompts and budget
- `suite`: a comparison over several tasks
- `lessons`: a task's lesson: trials, and what the seeds say of them
- `sizes`: pretrained, supervised and RLHF models by size
- `reproduce`: one run again
- `launching`: starts the runs: on this machine, or as jobs of a cluster by submitit
- `worker`: one run of a comparison, in a process of its own
- `play`: people, and models behind an endpoint, on the prompts of an evaluation
- `progress`: how far the runs of a comparison are
- `results`: the finished runs of a comparison's folder
- `win_rates`: win rates of saved completions by a judge
- `bench`: the speed of training on this machine, by phase
"""

from __future__ import annotations

from textrl_gym.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "CompareConfig": "compare",
        "read_comparison": "results",
        "BenchConfig": "bench",
    },
)
