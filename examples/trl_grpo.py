"""TRL's GRPOTrainer on a text environment of one turn.

pip install '.[trl]'
python examples/trl_grpo.py
"""

import sys
import tempfile
from typing import Any

from trl import GRPOConfig, GRPOTrainer

from textrl_gym.integrations.trl import prompts, reward_function
from textrl_gym.mdp.text_env import vector_env


def main(env_id: str = "CopyText-v0", *, steps: int = 40) -> tuple[float, float]:
    env = vector_env(env_id, num_envs=1)
    with tempfile.TemporaryDirectory() as folder:
        # With a KL penalty TRL loads the reference anew, by the model's name.
        model: Any = env.task.load_model()
        model.save_pretrained(f"{folder}/model")
        settings = GRPOConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=env.max_new_tokens,
            learning_rate=3e-3,
            beta=env.task.kl_coef,  # in TRL the KL penalty is in the loss
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            f"{folder}/model",
            reward_function(env),
            args=settings,
            train_dataset=prompts(env),
            processing_class=env.tokenizer,
        )
        trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(f"score {rewards[0]:.3f} at first, {rewards[-1]:.3f} after {steps} steps")
    return rewards[0], rewards[-1]


if __name__ == "__main__":
    main(*sys.argv[1:2])
