"""Saved LoRA adapters of peft: what they stand on, and their weights put into it.

An adapter's folder is data: its weights are safetensors, never a pickle, and its configuration is read by name.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from textrl_gym import files
from textrl_gym.extras import install
from textrl_gym.models import weights

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
DEPTH = 8
"""At most so many adapters stand on each other."""
ENDS = ("embed_tokens", "wte", "lm_head")
"""Names of input and output embeddings."""
TWICE = frozenset({"modules_to_save", "original_module", "base_layer"})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of transformers' future that peft's own code sets off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def is_adapter(folder: str | Path) -> bool:
    """Whether an adapter is saved there."""
    return (Path(folder) / CONFIG_FILE).is_file()


def stated_base(folder: Path) -> str | None:
    """What a saved adapter says that it stands on, a folder or a Hub id; None where it says nothing."""
    name = files.read_json(folder / CONFIG_FILE).get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def read_config(folder: Path) -> LoraConfig:
    """The configuration of a saved LoRA.

    Raises:
        ImportError: the extra "peft" is not installed.
        ValueError: it is another kind of adapter, or one that is no change of a model's weights.
    """
    file = folder / CONFIG_FILE
    fields = files.read_json(file)
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"the adapter in {str(folder)!r} is of the kind {kind!r}; allowed: LORA")
    # Megatron's: peft imports a module by a name in this file. The other is switched on by tokens of the text.
    unknown = [name for name in ("megatron_config", "alora_invocation_tokens") if fields.get(name)]
    if unknown:
        raise ValueError(f"the adapter in {str(folder)!r} has {unknown[0]!r} set, which is not supported here")
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError(f"{str(folder)!r} is a LoRA adapter and needs peft: {install('peft')}") from error
    try:
        return cast("LoraConfig", LoraConfig.from_pretrained(str(folder)))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{str(file)!r} is damaged: {type(error).__name__}: {error}") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter, on the CPU.

    Raises:
        ValueError: they are missing, damaged, or a pickle.
    """
    weights.weight_files(folder)
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise ValueError(f"{str(folder)!r} has an {CONFIG_FILE} but no {WEIGHTS_FILE}")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error}") from error


def attach(base: nn.Module, folder: Path, trained: bool = True) -> PeftModel:
    """Put a saved adapter on its base, to go on training; the base is frozen.

    Args:
        trained: with its weights; False: as it was before its training, when it changed nothing.

    Raises:
        ValueError: the adapter does not fit the base.
    """
    config = read_config(folder)
    config.inference_mode = False
    config.base_model_name_or_path = None  # peft warns where it is called otherwise; whether it fits is checked below
    from peft import get_peft_model

    # A fork: what is drawn for the adapter's first weights is overwritten.
    with torch.random.fork_rng(devices=[]), quiet():
        try:
            model = cast("PeftModel", get_peft_model(cast("PreTrainedModel", base), config))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"the adapter in {str(folder)!r} does not fit {type(base).__name__}: {error}") from error
    if trained:
        set_weights_(model, folder)
    return model


def set_weights_(model: nn.Module, folder: Path) -> None:
    """Put the weights of a saved adapter into a model that has one of the same shape.

    Raises:
        ValueError: naming the first tensor that is missing, left over or of another shape.
    """
    from peft import set_peft_model_state_dict

    words = f"the adapter in {str(folder)!r} does not fit its base model"
    try:
        result: Any = set_peft_model_state_dict(model, read_weights(folder))
    except (RuntimeError, KeyError) as error:  # of another shape, or a module that it trained is not there
        lines = str(error).strip().splitlines()
        raise ValueError(f"{words}: {lines[min(1, len(lines) - 1)].strip()}") from error
    own = [name for name, p in model.named_parameters() if p.requires_grad]
    # peft saves embeddings that it trained whole twice, the second time under the names of its own modules.
    missing, over = (
        sorted(set(result.missing_keys) & set(own)),
        sorted(name for name in result.unexpected_keys if not TWICE & set(name.split("."))),
    )
    if missing or over:
        reason = f"it has no weights for {missing[0]}" if missing else f"the base has no place for {over[0]}"
        raise ValueError(f"{words}: {reason}")


def merged(base: nn.Module, folder: Path) -> nn.Module:
    """The base with a saved adapter added to its weights: a plain model, as if it had been trained whole."""
    _fit_rows(base, folder)
    _untie(base, folder)
    model: Any = attach(base, folder)
    try:
        with quiet():
            whole: nn.Module = model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # NaN
        raise ValueError(f"the adapter in {str(folder)!r} cannot be merged: {error}") from error
    return whole.requires_grad_(True)


def _fit_rows(base: nn.Module, folder: Path) -> None:
    """Give the base's embeddings as many rows as the adapter's, which was trained with tokens of its own."""
    own = read_weights(folder)
    rows = {len(w) for name, w in own.items() if name.endswith(tuple(f".{end}.weight" for end in ENDS))}
    model: Any = base
    if len(rows) == 1 and rows != {model.get_input_embeddings().weight.shape[0]}:
        model.resize_token_embeddings(rows.pop(), mean_resizing=False)


def _untie(base: nn.Module, folder: Path) -> None:
    """Part input and output embeddings that are one tensor where the adapter changes one of them only."""
    model: Any = base
    head = model.get_output_embeddings()
    if head is None or head.weight is not model.get_input_embeddings().weight:
        return
    if any(f".{end}." in name for name in read_weights(folder) for end in ENDS):
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
