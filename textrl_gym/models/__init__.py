"""Language models and tokenizers: everything below a policy.

- `loading`: tokenizers and models by name, from a folder, the Hub or a package
- `weights`: which files of a model's folder are read
- `fingerprint`: hashes of weights, and where a model is that a folder names
- `adapters`: saved LoRA adapters, and what they stand on
- `lora`: LoRA adapters and frozen layers, saved and loaded
- `tokenizer`: training a byte-level BPE tokenizer
- `tiny`: tiny tokenizers and models made in code
- `onednn`: linear layers by oneDNN
- `positions`: how long texts may be, and the lengths at which a model changes
- `flops`: counting floating-point operations
- `memory`: what a run holds in memory, before anything is loaded
- `packing`: several completions of a prompt in one pass
"""

from __future__ import annotations

from textrl_gym.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "load_tokenizer": "loading",
        "load_model": "loading",
        "load_classifier": "loading",
        "resolve_device": "loading",
        "add_lora": "lora",
        "freeze_lower": "lora",
        "train_tokenizer": "tokenizer",
        "symbol_tokenizer": "tiny",
        "llama": "tiny",
        "gpt2": "tiny",
        "pack": "packing",
    },
)
