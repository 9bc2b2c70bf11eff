"""Rewards: what a specification means, what is checked in a result, and each built-in reward."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from textrl_gym import registry
from textrl_gym.data.encoding import Chat, codec
from textrl_gym.data.prompts import encode_prompt
from textrl_gym.rewards import RewardFunction, load_reward
from textrl_gym.rewards.conversational import with_messages
from textrl_gym.rewards.reward_model import Bundled, RewardModel, make, sequence_batches

PROMPTS, TEXTS = ["p", "p", "q"], ["x", "x y", "x y z"]


def count_words(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[int]:
    return [len(text.split()) for text in completions]


NOT_CALLABLE = 3


# -- what a specification means ---------------------------------------------------------------------------------------


def test_every_file_is_a_named_reward() -> None:
    assert {"exact_match", "length", "regex", "reward_model", "rouge", "tldr_gold"} <= set(registry.names("rewards"))
    needs_more = {"regex": "regex:x", "format": "format:x"}  # no pattern, no reward
    for name in registry.names("rewards"):
        # These need a model or a function: they have tests of their own.
        if name not in ("reward_model", "ensemble", "judge", "conversational", "knowledge_margin"):
            assert load_reward(needs_more.get(name, name)).name.startswith(name)


def test_a_callable_and_its_path() -> None:
    function = load_reward(count_words)
    score = function(PROMPTS, TEXTS, anything=[1, 2, 3])
    assert score.tolist() == [1, 2, 3]
    assert score.dtype == torch.float32
    assert function.name == "count_words"
    assert load_reward(function) is function
    assert load_reward("rouge_score.tokenize:tokenize").name == "rouge_score.tokenize:tokenize"


def test_trl_functions_work_as_they_are_written() -> None:
    def no_prompts(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(c)) for c in completions]

    def column_first(completions: list[str], answer: list[str]) -> list[float]:
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    class Scorer:
        def __call__(self, prompts: list[str], completions: list[str], **kwargs: Any) -> np.ndarray:
            return np.ones(len(prompts), dtype=np.float64)

    assert load_reward(no_prompts)(PROMPTS, TEXTS, answer=TEXTS).tolist() == [1, 3, 5]
    assert load_reward(column_first)(PROMPTS, TEXTS, answer=["x", "", "x y z"], other=PROMPTS).tolist() == [1, 0, 1]
    assert load_reward(lambda p, c: [len(text) for text in c])(PROMPTS, TEXTS, answer=TEXTS).tolist() == [1, 3, 5]
    assert load_reward(Scorer())(PROMPTS, TEXTS).tolist() == [1, 1, 1]
    assert load_reward(lambda p, c: [torch.tensor(1.0), True, 2])(PROMPTS, TEXTS).tolist() == [1, 1, 2]


def test_a_mixture_is_a_weighted_sum_with_its_parts_at_hand() -> None:
    mixture = load_reward({"length": -0.5, "regex:y": 2.0})
    # words 1, 2, 3 and y in rows 1 and 2: -0.5 + 0, -1 + 2, -1.5 + 2
    assert mixture(PROMPTS, TEXTS).tolist() == [-0.5, 1.0, 0.5]
    components = mixture.score(PROMPTS, TEXTS, {}).components
    assert {name: score_B.tolist() for name, score_B in components.items()} == {
        "length": [1, 2, 3],
        "regex:y": [0, 1, 1],
    }
    assert mixture.name == "-0.5*length +2*regex:y"


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("lenght", "unknown reward 'lenght'; allowed: .*exact_match, format, .*length.*package.module:name"),
        ("runs/rm", "unknown reward 'runs/rm': there is no such folder in /.*; allowed: "),
        ("lenght:3", "unknown reward 'lenght:3'.*no module 'lenght'.*allowed: .*length"),
        ("rouge_score.tokenize:nothing", "has no 'nothing'.*allowed: .*length"),
        ("math:pi", "reward 'math:pi' is 3.14.*not a callable"),
        ("length:3", "reward 'length' takes no argument, given '3'"),
        (3, "unknown reward 3; allowed"),
        (None, "unknown reward None; allowed"),
        ({}, "a mixture of rewards must name at least one"),
        ({"length": math.nan}, "weight of reward 'length' must be a finite number, not nan"),
        ({"length": "1"}, "weight of reward 'length' must be a finite number, not '1'"),
        ({"lenght": 1.0}, "unknown reward 'lenght'"),
        ("regex", "needs a pattern: regex:PATTERN"),
        ("regex:(", r"'\(' is no regular expression"),
        ("rouge:bleu", "unknown kind of rouge 'bleu'; allowed: rouge1 to rouge9, rougeL, rougeLsum"),
        ("reward_model", "task NoneType has no reward model of its own"),
        ("reward_model:./nothing", "there is no folder './nothing'"),
    ],
)
def test_a_wrong_specification_is_named(spec: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        load_reward(spec)


# -- what is checked --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([1.0, math.nan, 0.0], r"reward 'mine' gave nan for row 1, completion 'x y': every row needs a finite number"),
        (torch.tensor([0.0, 0.0, -math.inf]), r"reward 'mine' gave -inf for row 2, completion 'x y z'"),
        ([1e39, 0.0, 0.0], r"reward 'mine' gave 1e\+39 for row 0.*finite"),  # finite as a double only
        ([0.0, 0.0, "1"], r"reward 'mine' gave '1' for row 2"),
        ([0.0, [1.0], 0.0], r"reward 'mine' gave \[1.0\] for row 1"),
        ([1.0, 2.0], r"reward 'mine' gave 2 values for 3 completions"),
        (torch.zeros(4), r"reward 'mine' gave 4 values for 3 completions"),
        (torch.zeros(3, 1), r"reward 'mine' gave a tensor of shape \[3, 1\], not \[3\]"),
        (1.0, r"reward 'mine' gave 1.0, not a list or tensor of 3 numbers"),
        (None, r"reward 'mine' gave None, not a list or tensor of 3 numbers"),
        ("abc", r"reward 'mine' gave 'abc', not a list"),
        ({"a": 1, "b": 2, "c": 3}, "reward 'mine/a' gave 1, not a list"),
    ],
)
def test_a_wrong_result_names_the_reward_and_the_row(values: Any, named: str) -> None:
    def mine(prompts: list[str], completions: list[str], **columns: list[Any]) -> Any:
        return values

    with pytest.raises(ValueError, match=named):
        load_reward(mine)(PROMPTS, TEXTS)


def test_a_mapping_of_parts_adds_up_and_each_is_told() -> None:
    def style(prompts: list[str], completions: list[str], **columns: Any) -> dict[str, list[float | None]]:
        return {"short": [-float(len(text)) for text in completions], "polite": [1.0, None, None]}

    scores = load_reward(style).score(["p"] * 3, ["a", "bb", "ccc"], {})
    assert scores.total_B.tolist() == [0.0, -2.0, -3.0]  # -1 + 1, -2, -3
    assert list(scores.components) == ["style", "style/short", "style/polite"]
    assert scores.components["style/short"].tolist() == [-1.0, -2.0, -3.0]
    for values, words in (
        ({}, "empty mapping"),
        ({"": [1.0] * 3}, "reward 'style' gave a part called '': its name must be a text"),
        ({1: [1.0] * 3}, "reward 'style' gave a part called 1: its name must be a text"),
        ({"a": [1.0]}, "reward 'style/a' gave 1 values for 3 completions"),
        ({"a": [1.0, "x", 2.0]}, "reward 'style/a' gave 'x' for row 1"),
        ({"a": 1.0}, "reward 'style/a' gave 1.0, not a list"),
    ):
        bad: Any = values
        style = lambda prompts, completions, bad=bad, **columns: bad  # noqa: E731
        style.__name__ = "style"
        with pytest.raises(ValueError, match=words):
            load_reward(style)(["p"] * 3, ["a", "bb", "ccc"])


def test_a_wrong_part_of_a_mixture_is_named() -> None:
    def mine(prompts: list[str], completions: list[str]) -> list[float]:
        return [math.nan] * len(prompts)

    parts: dict[str, tuple[float, Any]] = {"length": (1.0, load_reward("length")), "mine": (1.0, mine)}
    with pytest.raises(ValueError, match="reward 'mine' gave nan for row 0"):
        RewardFunction("both", parts)(PROMPTS, TEXTS)


def test_an_exit_of_a_reward_is_its_error() -> None:
    def mine(completions: list[str], **columns: Any) -> list[float]:
        sys.exit("set MY_KEY first")

    with pytest.raises(RuntimeError, match="'mine' raised on row 0, completion 'x': SystemExit: set MY_KEY first"):
        load_reward(mine)(["p"], ["x"])


def test_an_exception_names_the_reward_and_the_row() -> None:
    def mine(completions: list[str], limit: list[int], **columns: list[Any]) -> list[float]:
        return [1 / (len(text) - 3) for text in completions]

    with pytest.raises(
        RuntimeError, match=r"reward 'mine' raised on row 1, completion 'x y': ZeroDivisionError: .*division"
    ) as caught:
        load_reward(mine)(PROMPTS, TEXTS, limit=[1, 2, 3])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)

    def all_at_once(prompts: list[str], completions: list[str]) -> list[float]:
        assert len(prompts) == 1, "one only"
        return [0.0]

    with pytest.raises(RuntimeError, match=r"'all_at_once' raised on the batch of 3, but on no row alone: .*one only"):
        load_reward(all_at_once)(PROMPTS, TEXTS)


def test_columns_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="reward 'length': answer has 2 items for 3 prompts"):
        load_reward("length")(PROMPTS, TEXTS, answer=["a", "b"])
    with pytest.raises(ValueError, match="completions has 2 items for 3 prompts"):
        load_reward("length")(PROMPTS, TEXTS[:2])


# -- the simple ones --------------------------------------------------------------------------------------------------


def test_length_counts_tokens_or_else_words() -> None:
    assert load_reward("length")(PROMPTS, TEXTS, completion_ids=[[1], [], [1, 2, 3, 0]]).tolist() == [1, 0, 4]
    assert load_reward("length")(PROMPTS, TEXTS).tolist() == [1, 2, 3]


def test_exact_match_ignores_white_space_around() -> None:
    assert load_reward("exact_match")(PROMPTS, TEXTS, completion=[" x\n", "x  y", "X y z"]).tolist() == [1, 0, 0]


def test_regex_searches() -> None:
    assert load_reward("regex:y")(PROMPTS, TEXTS).tolist() == [0, 1, 1]
    assert load_reward("regex:^x.y$")(PROMPTS, TEXTS).tolist() == [0, 1, 0]
    assert load_reward("regex:(?:x|:)$")(PROMPTS, TEXTS).tolist() == [1, 0, 0]  # a colon is part of the pattern


def test_rouge() -> None:
    # Reference "a b c d", completion "a c x": longest common subsequence a c. P = 2/3, R = 2/4, F = 4/7.
    # rouge2: no bigram in common. rouge1 of "b a": P = 1, R = 1/2, F = 2/3; ROUGE-L: P = 1/2, R = 1/4, F = 1/3.
    reference = [" a b c d", " a b c d"]
    texts = ["a c x", "b a"]

    def score(spec: str) -> list[float]:
        return load_reward(spec)(["p", "p"], texts, completion=reference).tolist()

    assert score("rouge") == pytest.approx([4 / 7, 1 / 3], abs=1e-6)
    assert score("rouge:rougeL") == score("rouge")
    assert score("rouge:rouge1") == pytest.approx([4 / 7, 2 / 3], abs=1e-6)
    assert score("rouge:rouge2") == [0, 0]


@pytest.mark.parametrize("name", ["rouge", "exact_match"])
def test_a_missing_reference_is_an_error(name: str) -> None:
    with pytest.raises(RuntimeError, match=rf"reward '{name}' raised.*column 'completion'; the rows have \['answer'\]"):
        load_reward(name)(PROMPTS, TEXTS, answer=TEXTS)


def test_rouge_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    missing = {"rouge_score"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name))
    with pytest.raises(ImportError, match="pip install rouge-score"):
        load_reward("rouge")


# -- reward models ----------------------------------------------------------------------------------------------------

EOS = 0
SIZES: dict[str, Any] = {"vocab_size": 257, "num_labels": 1, "pad_token_id": EOS}  # pad equals EOS, as is usual


def byte_tokenizer(order: int = 1, **kwargs: Any) -> PreTrainedTokenizerFast:
    """One token a byte; order -1 gives another tokenizer of the same size."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[::order]
    inner = Tokenizer(models.BPE(vocab={"<eos>": EOS} | {c: i for i, c in enumerate(letters, start=1)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", **kwargs)


def classifier(family: str, **changes: Any) -> Any:
    """A random tiny classifier, with a spread of scores that a wrong place or mask would change by far over 1e-5."""
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 64}
    sizes = {name: value for name, value in (SIZES | changes).items() if name not in shape}
    shape |= {name: value for name, value in changes.items() if name in shape}
    torch.manual_seed(0)
    if family == "gpt2":
        model: Any = GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **sizes))
    elif family == "llama":
        model = LlamaForSequenceClassification(LlamaConfig(**shape, **sizes))
    else:
        model = BertForSequenceClassification(BertConfig(**shape, **sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.mark.parametrize(
    ("family", "pad"), [("llama", EOS), ("llama", None), ("gpt2", EOS), ("gpt2", None), ("bert", EOS)]
)
def test_a_batch_of_unequal_lengths_scores_as_one_by_one(family: str, pad: int | None) -> None:
    model = classifier(family, pad_token_id=pad)
    reward = RewardModel(model, byte_tokenizer())
    generator = torch.Generator().manual_seed(1)
    # ends in EOS, is EOS, has EOS = pad inside: none may be taken for padding
    rows = [torch.randint(1, 257, (n,), generator=generator).tolist() for n in (30, 1, 64, 7, 7)]
    rows += [[5, 6, EOS], [EOS], [5, EOS, EOS, 9]]
    scores = reward.score_ids(rows)
    # The classifier's own forward on one row without padding reads its last place.
    model.config.pad_token_id = None if family != "bert" else EOS
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor([row])).logits[:, 0] for row in rows])
    torch.testing.assert_close(scores, alone, atol=1e-5, rtol=0)
    assert alone.std() > 0.1
    assert scores.dtype == torch.float32


@given(lengths=st.lists(st.integers(1, 40), max_size=20), limit=st.integers(1, 100))
def test_micro_batches_hold_every_row_once_within_the_budget(lengths: list[int], limit: int) -> None:
    sequences = [[1] * n for n in lengths]
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    batches = sequence_batches(sequences, order, limit)
    assert [row for batch in batches for row in batch] == order
    assert all(len(batch) == 1 or len(batch) * max(lengths[r] for r in batch) <= limit for batch in batches)
    joined = [len(batch) + 1 for batch in batches[:-1]]  # no batch could have taken the next row as well
    assert all(n * lengths[after[0]] > limit for n, after in zip(joined, batches[1:], strict=True))


def test_micro_batches_change_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = RewardModel(classifier("llama"), byte_tokenizer())
    rows = [[1 + (i * j) % 256 for j in range(1 + i * 7 % 40)] for i in range(20)]
    whole = reward.score_ids(rows)
    monkeypatch.setattr(sequence_batches, "__defaults__", (50,))
    torch.testing.assert_close(reward.score_ids(rows), whole, atol=1e-5, rtol=0)
    assert reward.score_ids([]).shape == (0,)


def test_a_saved_reward_model_is_loaded_from_its_folder(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    plain = RewardModel(classifier("llama"), tokenizer)
    RewardModel(plain.model, tokenizer, bias=0.5, scale=-2.0).save(tmp_path)
    assert json.loads((tmp_path / "reward_model.json").read_text()) == {"bias": 0.5, "scale": -2.0}
    ids = {"prompt_ids": [[9, 8], [9]], "completion_ids": [[7, EOS], [7, 6, 5]]}
    expected = (plain.score_ids([[9, 8, 7, EOS], [9, 7, 6, 5]]) - 0.5) * -2
    task = SimpleNamespace(reward_model_path=str(tmp_path), load_tokenizer=lambda: tokenizer)
    ways: list[tuple[Any, dict[str, Any]]] = [
        (str(tmp_path), {"tokenizer": tokenizer}),
        (f"reward_model:{tmp_path}", {"tokenizer": tokenizer}),
        (f"reward_model:{tmp_path}", {"task": task}),  # the environment has its task's tokenizer
        ("reward_model", {"task": task}),
        ({str(tmp_path): 1.0}, {"task": task}),
    ]
    for spec, given_ in ways:
        score = load_reward(spec, device="cpu", **given_)(["p", "q"], ["no", "text"], **ids)
        torch.testing.assert_close(score, expected, atol=1e-6, rtol=0)
    # A text from elsewhere is encoded and, as the model was trained, ended by EOS.
    alone = (plain.score_ids([[*tokenizer("pno")["input_ids"], EOS]]) - 0.5) * -2
    torch.testing.assert_close(load_reward(str(tmp_path))(["p"], ["no"]), alone, atol=1e-6, rtol=0)


def test_the_ids_are_scored_where_the_tokenizer_is_shared_and_else_the_text() -> None:
    model = classifier("llama")
    own, other = byte_tokenizer(), byte_tokenizer(order=-1)
    ids = {"prompt_ids": [own("ab")["input_ids"]], "completion_ids": [[*own("c")["input_ids"], EOS]]}
    foreign = {"prompt_ids": [other("ab")["input_ids"]], "completion_ids": [[*other("c")["input_ids"], EOS]]}
    text = own("abc")["input_ids"]

    def score(env_tokenizer: Any, columns: dict[str, Any], appends_eos: bool = True) -> float:
        reward = RewardModel(model, own, appends_eos=appends_eos, env_tokenizer=env_tokenizer)
        return reward(["ab"], ["c"], **columns).item()

    def of(sequence: list[int]) -> Any:
        return pytest.approx(RewardModel(model, own).score_ids([sequence]).item(), abs=1e-5)

    assert of(text) != of([*text, EOS]).expected
    assert score(own, ids) == of([*text, EOS])
    assert score(own, {}) == of([*text, EOS])  # texts from elsewhere are finished ones
    assert score(other, foreign) == of([*text, EOS])  # not the foreign ids
    assert score(None, foreign) == of([*text, EOS])
    cut_off = {**foreign, "completion_ids": [other("c")["input_ids"]]}
    assert score(other, cut_off) == of(text)  # the budget ran out: no EOS
    assert score(other, foreign, appends_eos=False) == of(text)  # another project's classifier: the plain text


def test_a_conversation_is_written_by_the_reward_models_own_template() -> None:
    own, other = byte_tokenizer(), byte_tokenizer(order=-1)
    own.chat_template = (
        "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    chat = Chat([{"role": "user", "content": "a<eos>"}])
    columns = {"completion_ids": [[*other("b")["input_ids"], EOS]], "chat": [chat]}
    cut_off = columns | {"completion_ids": [other("b")["input_ids"]]}
    asked = [*own("<u>a")["input_ids"], *codec(own).encode("<eos>"), EOS, *own("<a>b")["input_ids"]]
    plain = codec(own).encode("\n\nHuman: a<eos>\n\nAssistant: b")

    def score(columns: dict[str, Any], appends_eos: bool) -> float:
        reward = RewardModel(classifier("llama"), own, appends_eos=appends_eos, env_tokenizer=other)
        return reward(["what the policy reads"], ["b"], **columns).item()

    def of(sequence: list[int]) -> Any:
        return pytest.approx(RewardModel(classifier("llama"), own).score_ids([sequence]).item(), abs=1e-5)

    assert of(asked) != of([*asked, EOS]).expected
    assert score(columns, appends_eos=True) == of([*asked, EOS])
    assert score(cut_off, appends_eos=True) == of(asked)
    assert score(cut_off, appends_eos=False) == of([*asked, EOS])  # as TRL: the template ends every turn
    # Longer than 64 positions: the last turns are read.
    long = columns | {"chat": [Chat([{"role": "user", "content": "c" * 99}])]}
    with pytest.warns(UserWarning, match="the beginning of the conversation is left out"):
        assert score(long, appends_eos=True) == of(own("c" * 99 + "<eos><a>b<eos>")["input_ids"][-64:])
    own.chat_template = None
    assert score(columns, appends_eos=True) == of([*plain, EOS])
    # A column of the data that has the name is none.
    assert score(columns | {"chat": ["x"]}, appends_eos=False) == of(own("what the policy readsb")["input_ids"])


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="has one label, this LlamaForSequenceClassification has 2"):
        RewardModel(classifier("llama", num_labels=2), tokenizer)
    with pytest.raises(ValueError, match="tokenizer has ids up to 256 but the model's vocabulary has 100 rows"):
        RewardModel(classifier("llama", vocab_size=100), tokenizer)
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=257)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no whole sequence classifier: it has no weights for score\.weight"):
        load_reward(str(tmp_path))


@pytest.mark.parametrize("text", ['{"bias": 1}', '{"bias": 1, "scale": NaN}', '{"bias": 1, "scale": "2"}'])
def test_a_wrong_normalisation_is_refused(tmp_path: Path, text: str) -> None:
    RewardModel(classifier("llama"), byte_tokenizer()).save(tmp_path)
    (tmp_path / "reward_model.json").write_text(text)
    with pytest.raises(ValueError, match=r'reward_model\.json.* must hold \{"bias": number, "scale": number\}'):
        load_reward(str(tmp_path))


def test_a_sequence_out_of_range_is_an_error() -> None:
    reward = RewardModel(classifier("llama"), byte_tokenizer())
    for wrong in ([], [1] * 65):
        with pytest.raises(ValueError, match=f"row 1 has {len(wrong)} tokens; the reward model takes 1 to 64"):
            reward.score_ids([[1], wrong])
    assert RewardModel(classifier("llama"), byte_tokenizer(model_max_length=9)).score_ids([[1] * 9]).shape == (1,)
    with pytest.raises(ValueError, match="takes 1 to 9"):
        RewardModel(classifier("llama"), byte_tokenizer(model_max_length=9)).score_ids([[1] * 10])


def test_a_reward_model_in_bfloat16_scores_in_float32(tmp_path: Path) -> None:
    RewardModel(classifier("llama"), byte_tokenizer()).save(tmp_path)
    full = make(str(tmp_path), task=None, device="cpu", tokenizer=None)
    half = make(str(tmp_path), task=None, device="cpu", tokenizer=None, dtype=torch.bfloat16)
    assert isinstance(full, RewardModel) and isinstance(half, RewardModel)
    assert half.model.dtype == torch.bfloat16
    assert half.score_ids([[1, 2, 3]]).dtype == torch.float32
    # bfloat16 has 8 bits: a relative error of about 2^-8 an operation, on values of the order of 1 to 10
    torch.testing.assert_close(half.score_ids([[1, 2, 3]]), full.score_ids([[1, 2, 3]]), atol=0.3, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_reward_model_on_the_gpu_scores_as_on_the_cpu(tmp_path: Path) -> None:
    RewardModel(classifier("llama"), byte_tokenizer()).save(tmp_path)
    rows = [[1 + (i * j) % 256 for j in range(1 + i * 7 % 40)] for i in range(20)]
    places = [make(str(tmp_path), task=None, device=name, tokenizer=None) for name in ("cpu", "cuda")]
    cpu, gpu = (model.score_ids(rows) for model in places if isinstance(model, RewardModel))
    torch.testing.assert_close(cpu, gpu, atol=1e-3, rtol=0)


def test_a_tasks_own_reward_model_is_loaded_at_its_first_score(tmp_path: Path) -> None:
    plain = RewardModel(classifier("llama"), byte_tokenizer(), bias=0.5, scale=2.0, env_tokenizer=byte_tokenizer())
    plain.save(tmp_path)
    task = type("Own", (), {"reward_model_path": str(tmp_path)})()
    lazy = make(None, task=task, device="cpu", tokenizer=byte_tokenizer())
    assert isinstance(lazy, Bundled) and lazy._model is None
    ids: dict[str, Any] = {"prompt_ids": [[1, 2]], "completion_ids": [[3, 4]]}
    assert lazy(["a"], ["b"], **ids).tolist() == plain(["a"], ["b"], **ids).tolist()
    assert lazy.loaded is lazy.loaded


# -- texts that are longer than a reward model has positions ----------------------------------------------------------

POST = "TITLE: t\nPOST: " + "abcdefghij" * 12
END = "\n\nTL;DR:"


def test_a_reward_model_reads_the_prompt_that_the_policy_read() -> None:
    """The policy's tokens are its own: 40 of the prompt's, less of the body and all of the suffix."""
    model, own, policys = classifier("llama", max_position_embeddings=200), byte_tokenizer(), byte_tokenizer(order=-1)
    reward = RewardModel(model, own, env_tokenizer=policys, keep_suffix=END)
    cut = encode_prompt(POST + END, policys, 40, END)
    read = POST[: 40 - len(END)] + END  # a byte a token
    given = {"prompt_ids": [cut], "completion_ids": [policys(" ok")["input_ids"]]}
    expected = reward.score_ids([own(read + " ok")["input_ids"]])
    torch.testing.assert_close(reward([POST + END], [" ok"], **given), expected, atol=1e-5, rtol=0)
    # A prompt that the policy read whole is itself.
    whole = {**given, "prompt_ids": [policys(POST + END)["input_ids"]]}
    expected = reward.score_ids([own(POST + END + " ok")["input_ids"]])
    torch.testing.assert_close(reward([POST + END], [" ok"], **whole), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_prompt_beyond_a_reward_models_positions_loses_the_end_of_its_body(family: str, shares: bool) -> None:
    model, own = classifier(family), byte_tokenizer()  # of 64 positions
    policys = own if shares else byte_tokenizer(order=-1)
    reward = RewardModel(model, own, env_tokenizer=policys, keep_suffix=END)
    given = {"prompt_ids": [policys(POST + END)["input_ids"]], "completion_ids": [policys(" ok")["input_ids"]]}
    with pytest.warns(UserWarning, match=r"takes texts of at most 64 tokens, and a prompt .* has 146: the end of"):
        found = reward([POST + END], [" ok"], **given)
    kept = POST[: 64 - len(END + " ok")] + END + " ok"
    torch.testing.assert_close(found, reward.score_ids([own(kept)["input_ids"]]), atol=1e-5, rtol=0)
    reward([POST + END], [" ok"], **given)  # it is said once
    with pytest.raises(ValueError, match="the reward model takes 1 to 64"):  # a completion is never cut
        reward(["p"], ["a" * 80], prompt_ids=[policys("p")["input_ids"]], completion_ids=[[1] * 80])


def test_a_reward_model_that_is_scaled_by_the_length_reads_a_text_at_a_time() -> None:
    scaled = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 4.0}}
    reward = RewardModel(classifier("llama", max_position_embeddings=16, **scaled), byte_tokenizer())
    reward.limit = 64  # as a tokenizer's model_max_length and a larger stated length may say
    reward.model.config.pad_token_id = None
    rows = [list(range(1, 9)), list(range(1, 31)), list(range(5, 15))]
    with torch.no_grad():
        alone = torch.cat([reward.model(input_ids=torch.tensor([row])).logits[:, 0] for row in rows])
    with pytest.warns(UserWarning, match="rewards are computed a text at a time: .* is no policy on texts of"):
        found = reward.score_ids(rows, [4, 4, 4])
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)


def test_a_classifier_of_others_needs_no_eos(tmp_path: Path) -> None:
    own = byte_tokenizer()
    own.eos_token = None
    RewardModel(classifier("bert"), own).save(tmp_path)
    (tmp_path / "reward_model.json").unlink()
    assert load_reward(str(tmp_path), tokenizer=byte_tokenizer())(["p"], ["text"]).shape == (1,)
    (tmp_path / "reward_model.json").write_text('{"bias": 0.0, "scale": 1.0}')
    with pytest.raises(ValueError, match="has no EOS token, which the reward model was trained to read"):
        load_reward(str(tmp_path), tokenizer=byte_tokenizer())


# -- functions that read messages -------------------------------------------------------------------------------------


def polite(
    completions: list[list[dict[str, str]]], prompts: list[list[dict[str, str]]], tone: list[str]
) -> list[float]:
    """As TRL's documentation writes a reward for conversational data."""
    contents = [completion[0]["content"] for completion in completions]
    assert [turn["role"] for prompt in prompts for turn in prompt][-1] == "user"
    return [float(want in text) + len(prompt) for want, text, prompt in zip(tone, contents, prompts, strict=True)]


def test_a_reward_for_conversational_data_reads_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "my_messages", sys.modules[__name__])
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]
    columns: dict[str, list[Any]] = {"tone": ["please", "please"], "chat": [chat, None]}
    for spec in ("conversational:my_messages:polite", with_messages(polite)):
        # 1 for the word, and the number of messages: two in the first prompt; the second is a text, one user's turn.
        assert load_reward(spec)(["x", "y"], ["Yes, please.", "No."], **columns).tolist() == pytest.approx([3.0, 1.0])
    assert load_reward(with_messages(polite)).name == "polite"


def test_a_reward_for_conversational_data_reads_all_turns() -> None:
    turns = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    function = with_messages(lambda prompts, completions: [len(messages) for messages in completions])
    assert load_reward(function)(["x"], ["a"], turns=[turns]).tolist() == pytest.approx([2.0])


@pytest.mark.parametrize(
    ("spec", "words"), [("conversational", "needs a function"), ("conversational:math:pi", "not a callable")]
)
def test_what_is_no_reward_for_conversational_data(spec: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_reward(spec)
