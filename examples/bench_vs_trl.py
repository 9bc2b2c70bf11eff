"""The same work on textrl-gym and on TRL, in turns, each turn in its own process: ratios with their spread.

    pip install torch==2.13.0 trl==1.16.0        # in another virtual environment; for PPO trl==1.12.0, the last with it
    python examples/bench_vs_trl.py grpo --trl-python ../trl/bin/python

Equal on both sides: a random Llama (width 256, 4 layers, 2,048 tokens), prompts and their lengths, completions of each,
new tokens, one epoch, one optimizer step, KL coefficient, temperature 1 and no top-k; float32, no gradient
checkpointing, no logging. For GRPO the reward is the length of the text; for PPO both sides score with a reward model
of the same shape. TRL's PPO always has a critic with a trunk of its own; ours, by default, is a head on the policy's
trunk, and with --separate-critic as TRL's. With --model both sides take a model from a folder, and with --device cuda
both run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("OMP_NUM_THREADS", str(min(8, len(os.sched_getaffinity(0)))))
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

KL_COEF = 0.04
WARMUP = 1  # iterations that are not measured


def peak_bytes(device: str) -> int:
    """Most memory so far: of the process on a CPU, allocated on a GPU. (TRL's side has no textrl-gym to ask.)"""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -- textrl-gym -------------------------------------------------------------------------------------------------------


def run_ours(args: argparse.Namespace) -> dict[str, float]:
    from textrl_gym.experiments import bench

    config = bench.BenchConfig(
        agent=args.agent,
        model=args.model,
        prompts=args.prompts,
        group=args.group,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        vocab_size=args.vocab_size,
        iterations=args.iterations,
        scoring=args.agent == "ppo",
        device=args.device,
        dtype=args.dtype,
        cuda_graphs=args.device == "cuda",
    )
    critic: dict[str, Any] = {"separate_value_model": True} if args.separate_critic else {}
    measured = bench.bench(config, **critic)["measured"]
    return {"tokens_per_second": measured["completion_tokens_per_second"], "peak_bytes": measured["peak_memory_bytes"]}


# -- TRL, in its own environment, which has no textrl-gym -------------------------------------------------------------


def make_parts(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Model, tokenizer and a data set of random prompts, as textrl_gym.experiments.bench makes them."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = args.model or random_model(args, tempfile.mkdtemp())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    ids = torch.randint(1, len(tokenizer), (4096, args.prompt_tokens)).tolist()
    rows = Dataset.from_dict({"prompt": [" ".join(f"t{i}" for i in row) for row in ids], "input_ids": ids})
    # From a folder: TRL loads the reference from where the model came from.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer, rows


def random_model(args: argparse.Namespace, folder: str) -> str:
    """Write the model and tokenizer that textrl_gym.experiments.bench makes; returns the folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocab = {"<eos>": 0} | {f"t{i}": i for i in range(1, args.vocab_size)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def grpo_trainer(args: argparse.Namespace, common: dict[str, Any], callback: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    def length(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    model, tokenizer, data = make_parts(args)
    return GRPOTrainer(
        model,
        reward_funcs=length,
        args=GRPOConfig(
            max_steps=WARMUP + args.iterations,
            num_generations=args.group,
            max_completion_length=args.new_tokens,
            beta=KL_COEF,
            temperature=1.0,
            **common,
        ),
        train_dataset=data.remove_columns("input_ids"),
        processing_class=tokenizer,
        callbacks=[callback],
    )


def ppo_trainer(args: argparse.Namespace, common: dict[str, Any], callback: Any) -> Any:
    from transformers import AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    model, tokenizer, data = make_parts(args)
    rows = args.prompts * args.group
    shape = type(model.config)(**(model.config.to_dict() | {"num_labels": 1}))
    reward_model, value_model = (AutoModelForSequenceClassification.from_config(shape) for _ in range(2))
    if args.group > 1:  # TRL's PPO knows no groups: each prompt is repeated
        data = data.select([i for i in range(len(data)) for _ in range(args.group)])
    return PPOTrainer(
        PPOConfig(
            total_episodes=(WARMUP + args.iterations) * rows,
            num_ppo_epochs=1,
            num_mini_batches=1,
            response_length=args.new_tokens,
            kl_coef=KL_COEF,
            temperature=1.0,
            num_sample_generations=0,
            local_rollout_forward_batch_size=rows,
            **common,
        ),
        tokenizer,
        model,
        None,
        reward_model,
        data.remove_columns("prompt"),
        value_model,
        eval_dataset=data.select(range(1)).remove_columns("prompt"),
        callbacks=[callback],
    )


def run_trl(args: argparse.Namespace) -> dict[str, float]:
    import torch
    from transformers import TrainerCallback

    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if args.device == "cuda":  # which works on while Python goes on
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    rows = args.prompts * args.group
    common: dict[str, Any] = {"output_dir": tempfile.mkdtemp(), "use_cpu": args.device == "cpu"}
    common |= {"per_device_train_batch_size": rows // args.accumulate, "gradient_accumulation_steps": args.accumulate}
    common |= {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False}
    common |= {"learning_rate": 1e-6, "logging_strategy": "no", "bf16": args.dtype == "bfloat16"}
    trainer = {"grpo": grpo_trainer, "ppo": ppo_trainer}[args.agent](args, common, Clock())
    before = peak_bytes(args.device)
    trainer.train()
    seconds = marks[-1] - marks[WARMUP - 1]
    # A random model ends one row in fifty early; the full budget is counted, in TRL's favour.
    return {
        "tokens_per_second": rows * args.new_tokens * args.iterations / seconds,
        "peak_bytes": peak_bytes(args.device) - before,
    }


# -- turns ------------------------------------------------------------------------------------------------------------


def measure(python: str, side: str, argv: list[str]) -> dict[str, float]:
    done = subprocess.run([python, __file__, *argv, "--side", side], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("agent", choices=["grpo", "ppo"])
    parser.add_argument("--trl-python", help="the Python of a virtual environment with TRL")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=350)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--model", help="a folder of transformers for both sides; without, a random Llama")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="by autocast")
    parser.add_argument("--accumulate", type=int, default=1, help="parts in which TRL computes its update")
    parser.add_argument("--separate-critic", action="store_true", help="our PPO's critic gets a trunk of its own too")
    parser.add_argument("--iterations", type=int, default=3, help="measured in each turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps({"ours": run_ours, "trl": run_trl}[args.side](args)))
        return
    if not args.trl_python:
        parser.error("--trl-python is needed: the Python of a virtual environment with TRL")
    turns: list[dict[str, dict[str, float]]] = []
    for turn in range(args.turns):
        pythons = {"ours": sys.executable, "trl": args.trl_python}
        turns.append({side: measure(python, side, sys.argv[1:]) for side, python in pythons.items()})
        line = "  ".join(
            f"{side} {found['tokens_per_second']:,.0f} tokens/s, {found['peak_bytes'] / 2**20:,.0f} MiB"
            for side, found in turns[-1].items()
        )
        print(f"turn {turn + 1}: {line}", flush=True)
    speed = [turn["ours"]["tokens_per_second"] / turn["trl"]["tokens_per_second"] for turn in turns]
    memory = [turn["ours"]["peak_bytes"] / turn["trl"]["peak_bytes"] for turn in turns]
    for name, ratios in (("completion tokens/s", speed), ("peak memory", memory)):
        middle = statistics.median(ratios)
        print(f"{name}: ours / TRL = {middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} turns)")


if __name__ == "__main__":
    main()
