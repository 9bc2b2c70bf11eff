"""How much GPU memory GRPO or PPO needs, by the size of the model: python examples/memory_table.py

Nothing is loaded or downloaded: the sizes are those of published models, counted by textrl_gym.models.memory. With
--model the table is about a model of your own (a folder, or a Hub id).
"""

import argparse
import dataclasses

from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from textrl_gym.models.memory import Work, at_its_fullest, estimate

GIB = 2**30
# Width, layers, heads, key-value heads, width of the feed-forward layers, vocabulary.
SHAPES = {
    "SmolLM2-135M": (576, 30, 9, 3, 1536, 49152, True),
    "Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "Qwen2.5-1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "Qwen2.5-3B": (2048, 36, 16, 2, 11008, 151936, True),
    "Llama-3.1-8B": (4096, 32, 32, 8, 14336, 128256, False),
}
"""Of published models, as their config.json says."""


def config_of(name: str) -> PretrainedConfig:
    """A model's config by its shape."""
    width, layers, heads, kv_heads, feed_forward, vocab, tied = SHAPES[name]
    return LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=feed_forward,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )


def rows(configs: dict[str, PretrainedConfig], work: Work) -> list[str]:
    """The table in Markdown."""
    lines = ["| model | trained | weights, reference, optimizer | cache | backward | most at once | card |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, config in configs.items():
        for rank in (0, 16):
            parts = estimate(config, dataclasses.replace(work, lora_rank=rank))
            resident = sum(parts[key] for key in ("weights", "reference", "optimizer", "cast weights"))
            backward = parts["gradients"] + parts["activations"]
            most = at_its_fullest(parts)
            cells = (resident, parts["cache"], backward, most)
            trained = f"LoRA of rank {rank}" if rank else "all"
            numbers = " | ".join(f"{value / GIB:.1f}" for value in cells)
            lines.append(f"| {name} | {trained} | {numbers} | {card(most)} |")
    return lines


def card(bytes_needed: int) -> str:
    """The smallest usual card that holds so much, with a tenth left for workspaces."""
    return next((f"{size} GB" for size in (24, 48, 80, 141) if bytes_needed < 0.9 * size * 1e9), "several")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="a folder or a Hub id, in place of published shapes")
    for field in dataclasses.fields(Work):
        if field.name not in ("lora_rank", "separate_value_model", "dtype"):
            parser.add_argument("--" + field.name.replace("_", "-"), type=int, default=field.default)
    args = vars(parser.parse_args())
    model = args.pop("model")
    configs = {model: AutoConfig.from_pretrained(model)} if model else {name: config_of(name) for name in SHAPES}
    print("\n".join(rows(configs, Work(**args))))


if __name__ == "__main__":
    main()
