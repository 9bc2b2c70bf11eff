"""LoRA and frozen layers: which parameters of a model are trained (Hu et al. 2021, arXiv:2106.09685, by peft).

A reference that is the initial policy costs no copy of what is not trained: under a new LoRA it is the same model with
the adapter switched off, beside one that was trained before it is a copy of the adapter, and frozen layers are held
once for both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from textrl_gym.extras import install
from textrl_gym.models import adapters, loading

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ModelT = TypeVar("ModelT", bound=nn.Module)

BASE = "base"
"""Folder in a checkpoint with the model that a LoRA stands on, where it cannot be loaded again by name."""


def is_lora(model: nn.Module) -> bool:
    """Whether the model is peft's, with an adapter that can be switched off."""
    return hasattr(model, "disable_adapter") and hasattr(model, "get_base_model")


def bare(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, its adapter's layers inside."""
    return cast("PreTrainedModel", cast("PeftModel", model).get_base_model() if is_lora(model) else model)


def add_lora(model: nn.Module, rank: int, alpha: int, seed: int) -> PeftModel:
    """A LoRA on every linear layer but the head; it changes nothing until it is trained. The model is frozen.

    Args:
        rank: of the two factors of a layer's change, B A.
        alpha: the change is scaled by alpha / rank.
        seed: of A; B is 0.

    Raises:
        ImportError: the extra "peft" is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(f"lora_rank={rank} needs peft: {install('peft')}") from error
    # A fork: the same adapter for the same seed, and nothing drawn from the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules="all-linear",
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # as GPT-2's layers are
            task_type=_task_type(model),
        )
        with adapters.quiet():
            return cast("PeftModel", get_peft_model(cast("PreTrainedModel", model), config))


def _task_type(model: nn.Module) -> str | None:
    """Which of peft's classes wraps a model."""
    # Those for language models want what generates; a classifier has no such thing.
    if not hasattr(model, "prepare_inputs_for_generation"):
        return None
    return "SEQ_2_SEQ_LM" if cast("PreTrainedModel", model).config.is_encoder_decoder else "CAUSAL_LM"


def freeze_lower(model: ModelT, layers: int) -> ModelT:
    """Freeze the embeddings and the first so many layers, in place; an output head tied to the embeddings with them.

    Raises:
        ValueError: the model has no more layers than that, or is an encoder-decoder.
    """
    decoder = cast("PreTrainedModel", model)
    if decoder.config.is_encoder_decoder:
        raise ValueError(
            f"frozen_layers={layers}: {type(model).__name__} is an encoder-decoder, with lower layers of two kinds; "
            "leave frozen_layers out, or train a LoRA (lora_rank)"
        )
    depth = decoder.config.get_text_config().num_hidden_layers
    if layers >= depth:
        raise ValueError(f"frozen_layers={layers} leaves nothing to train: the model has {depth} layers")
    for child in decoder.base_model.children():  # embeddings come before the layers, the last norm after
        if isinstance(child, nn.ModuleList) and len(child) == depth:
            child[:layers].requires_grad_(False)
            return model
        child.requires_grad_(False)
    raise ValueError(f"frozen_layers={layers}: no list of layers is found in {type(model).__name__}")


def frozen_copy(model: ModelT) -> ModelT:
    """A frozen copy of the model; what the model does not train is held once for both."""
    # deepcopy takes what its memo has for a copy: frozen parameters are shared and not doubled.
    shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False)


def save(model: nn.Module, folder: Path, base: bool) -> None:
    """Write a model; of one with a LoRA the adapter only and, where asked for, the model under it in folder/../base."""
    if not is_lora(model):
        cast("PreTrainedModel", model).save_pretrained(folder)
        return
    adapted = cast("PeftModel", model)
    config: Any = adapted.active_peft_config
    config.base_model_name_or_path = None  # a path of this machine: the checkpoint says what to load
    adapted.save_pretrained(str(folder))
    if base:
        weights = {
            name.replace(".base_layer.", "."): value
            for name, value in bare(model).state_dict().items()
            if ".lora_" not in name
        }
        bare(model).save_pretrained(folder.parent / BASE, state_dict=weights)


@torch.no_grad()
def whole_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Each weight of a model under the name that its checkpoint has it by; a LoRA's change is added to what it changes.

    Nothing is changed in place, as merging and taking out again would leave rounding in the base.
    """
    changes = {}
    for name, module in bare(model).named_modules():
        if is_lora(model) and hasattr(module, "get_delta_weight"):
            changes[name] = [module.get_delta_weight(adapter) for adapter in cast("Any", module).active_adapters]
    for name, weight in bare(model).named_parameters():  # a tied head is there once
        layer = name.rpartition(".base_layer.")[0]
        if ".lora_" in name:
            continue
        own: torch.Tensor = weight.detach()
        if layer in changes and name.endswith(".weight"):
            own = sum(changes[layer], own)
        yield name.replace(".base_layer.", "."), own


def changes_nothing(model: nn.Module) -> bool:
    """Whether a model's adapter is as it was made, so that switching it off is the model itself."""
    # Of the two factors of a layer's change one starts at 0: B, or of an embedding A.
    zero = [p for name, p in model.named_parameters() if ".lora_B." in name or ".lora_embedding_A." in name]
    others = [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    return not others and not any(bool(p.detach().any()) for p in zero)


def load(base: nn.Module, folder: Path, trained: bool = True) -> PeftModel:
    """The model with the adapter that `save` wrote, to go on training.

    Args:
        trained: with its weights; False: as it was when its training began.
    """
    model = adapters.attach(base, folder, trained)
    loading.check_finite(model, folder)
    return model


def restore_(model: nn.Module, folder: Path, loaded: Callable[[], nn.Module]) -> None:
    """Put saved weights into a model of the same kind: an adapter's from the folder, else those of `loaded()`."""
    if not is_lora(model):
        model.load_state_dict(loaded().state_dict())
        return
    load_weights_(model, folder)


def load_weights_(model: ModelT, folder: Path) -> ModelT:
    """Put the weights of the adapter that `save` wrote into a model with one; returns the model."""
    adapters.set_weights_(model, folder)
    loading.check_finite(model, folder)
    return model
