"""Tiny models of every family of causal LMs that transformers has, and what a policy of one does beside the truth.

python tests/model_families.py writes the table of docs/models.md anew (a minute).

Shape legend: U prompts, P prompt positions, B rows, T response positions, L positions, V vocabulary.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from textrl_gym.core import Rollout
from textrl_gym.policy.policy import Policy
from textrl_gym.policy.step_cache import StepCache
from textrl_gym.policy.trial import Ways
from textrl_gym.rollouts.sampler import generate

V = 37
MOST = 20_000_000
"""Parameters of the largest model that is made."""
WINDOW = 8
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("attention_hidden_size", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "hidden_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("ffn_hidden_size",), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads",), 4),
    **dict.fromkeys(("num_key_value_heads", "num_key_value_groups", "num_attention_groups"), 2),
    **dict.fromkeys(("head_dim", "head_size", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("moe_ffn_hidden_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("n_shared_experts", "zero_expert_num", "n_groups", "mamba_n_groups", "num_hidden_groups"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads", "rotary_dim", "laurel_rank"), 4),
    **dict.fromkeys(("qk_rope_head_dim", "time_step_rank"), 4),
    **dict.fromkeys(("linear_num_key_heads", "n_group", "altup_num_inputs"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), V),
    "topk_group": 1,
    "num_kv_shared_layers": 0,
    "d_inner": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
WINDOWS = ("sliding_window", "attention_window", "window_size", "attention_chunk_size", "attention_window_size")
MLA: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 4, "first_k_dense_replace": 1}
HYBRID: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
TEXT: dict[str, Any] = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size_per_layer_input": V}
TEXT |= {"hidden_size_per_layer_input": 8, "max_position_embeddings": 128, "pad_token_id": 1}
VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"), MLA),
    **dict.fromkeys(("longcat_flash", "minicpm3", "youtu"), MLA),
    "deepseek_v2": {**MLA, "num_experts_per_tok": 2},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text"), HYBRID),
    "bailing_hybrid": MLA | HYBRID,
    "dots3_note_text": {"num_key_value_heads": 4},
    **{family: {"text_config": TEXT, "vision_config": VISION} for family in ("gemma3", "gemma4", "gemma4_unified")},
    "fuyu": {"text_config": TEXT | {"model_type": "persimmon"}},
    "git": {"vision_config": VISION},
    "got_ocr2": {"text_config": TEXT | {"model_type": "qwen2"}, "vision_config": VISION | {"output_channels": 32}},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    **{family: {"layer_types": ["conv", "full_attention"]} for family in ("lfm2_moe", "lfm3")},
    "recurrent_gemma": {"block_types": ("recurrent", "attention")},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    **{family: {"head_dim": 8} for family in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_experts_per_tok": 2},
    "falcon": {"head_dim": None},
    "prophetnet": {"num_hidden_layers": None, "num_encoder_layers": 2, "num_decoder_layers": 2}
    | {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4},
    "reformer": {"axial_pos_shape": (8, 16), "axial_pos_embds_dim": (16, 16), "attention_head_size": 8},
    "xlnet": {"max_position_embeddings": None},
    "xlstm": {"v_head_dim": None, "embedding_dim": 32, "num_blocks": 2},
    "xmod": {"languages": ("en_XX",), "default_language": "en_XX"},
    "zamba": {"layer_types": None, "num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
}
"""Family -> what its sizes need beside those above; None: leave it out."""


def families() -> dict[str, str]:
    """Every family of causal LMs -> its class."""
    names: dict[str, Any] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return {family: names[family] if isinstance(names[family], str) else names[family][0] for family in sorted(names)}


def tiny_config(family: str, window: int | None = None, **changes: Any) -> Any:
    """A configuration of a few thousand parameters; window: of the attention that has one."""
    config_class: Any = CONFIG_MAPPING[family]
    usual = config_class()

    def has(name: str) -> bool:
        try:
            value = getattr(usual, name, None)
        except Exception:  # noqa: BLE001 - of its own for each layer: the one given is for all of them
            return True
        return value is not None and not isinstance(value, list | tuple | dict | str | bool)

    sizes = {name: size for name, size in SIZES.items() if has(name)}
    if hasattr(usual, "is_decoder") and not usual.is_encoder_decoder:
        sizes["is_decoder"] = True  # of encoders' kin: else they look ahead
    if window is not None:
        sizes |= {
            name: window for name in WINDOWS if hasattr(usual, name) and not isinstance(getattr(usual, name), list)
        }
        sizes |= {"use_sliding_window": True} if hasattr(usual, "use_sliding_window") else {}
        sizes |= {"max_window_layers": 1} if hasattr(usual, "max_window_layers") else {}
    wanted = sizes | CHANGES.get(family, {}) | changes
    return config_class(**{name: value for name, value in wanted.items() if value is not None})


def tiny_model(family: str, window: int | None = None, **changes: Any) -> Any:
    """A random model of a family, far from uniform.

    Raises:
        Exception: whatever the family raises where these sizes do not suit it.
    """
    config = tiny_config(family, window, **changes)
    model_class = getattr(transformers, families()[family])
    with torch.device("meta"):  # some sizes have names of their own
        parameters = sum(p.numel() for p in model_class(config).parameters())
    if parameters > MOST:
        raise ValueError(f"{parameters:,} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return model


@dataclass(frozen=True)
class Found:
    """How a policy of a model ran, and the largest differences to the model's own plain forward, in nats."""

    ways: Ways
    sampling: float
    training: float
    stepping: float

    @property
    def worst(self) -> float:
        return max(self.sampling, self.training, self.stepping)


@torch.no_grad()
def truth(model: Any, ids_L: Tensor) -> Tensor:
    """log-probabilities of the next token by the model's plain forward on the text alone, [V]."""
    return model(input_ids=ids_L[None]).logits[0, -1, :V].float().log_softmax(-1)


@torch.no_grad()
def compare(model: Any, lengths: tuple[int, ...] = (20, 5, 12), new: int = 8) -> Found:
    """Sample, train and step with a policy of the model, on prompts of unequal lengths, beside the truth.

    Raises:
        ValueError: the model is refused.
    """
    generator = torch.Generator().manual_seed(1)
    most, source_B = max(lengths), torch.tensor([0, 0, 1, 2, 2])
    mask_UP = torch.arange(most) >= most - torch.tensor(lengths)[:, None]
    prompt_UP = torch.randint(4, V, (len(lengths), most), generator=generator) * mask_UP
    policy = Policy(model, vocab_size=V)
    policy.try_out(most, new)
    uniform_BT = torch.rand((len(source_B), new), generator=generator)
    made = generate(policy, prompt_UP, mask_UP, source_B, uniform_BT, max_new_tokens=new, end_ids=(V,))
    rollout = _rollout(prompt_UP[source_B], mask_UP[source_B], made.token_BT, made.logp_BT, source_B)
    logp_BT = policy.logprobs(rollout)
    policy.steps = StepCache(policy.trunk)
    sampling = training = stepping = 0.0
    empty_BT = torch.zeros_like(made.token_BT)
    input_BL = torch.cat([rollout.prompt_BP, empty_BT], 1)
    mask_BL = torch.cat([rollout.prompt_mask_BP, empty_BT.bool()], 1)
    for t in range(new):
        step_BV = policy.next_logprobs(input_BL, mask_BL)
        for b in range(len(source_B)):
            expected_V = truth(model, input_BL[b][mask_BL[b]])
            token = made.token_BT[b, t]
            sampling = max(sampling, float((expected_V[token] - made.logp_BT[b, t]).abs()))
            training = max(training, float((expected_V[token] - logp_BT[b, t]).abs()))
            stepping = max(stepping, float((expected_V - step_BV[b]).abs().max()))
        input_BL[:, most + t], mask_BL[:, most + t] = made.token_BT[:, t], True
    return Found(policy.trunk.try_out(most + new), sampling, training, stepping)


def _rollout(prompt_BP: Tensor, mask_BP: Tensor, token_BT: Tensor, logp_BT: Tensor, group_B: Tensor) -> Rollout:
    rows, zeros_BT = len(token_BT), torch.zeros_like(logp_BT)
    return Rollout(
        prompt_BP=prompt_BP,
        prompt_mask_BP=mask_BP,
        token_BT=token_BT,
        mask_BT=torch.ones_like(token_BT, dtype=torch.bool),
        logp_BT=logp_BT,
        ref_logp_BT=zeros_BT,
        kl_BT=zeros_BT,
        value_BT=zeros_BT,
        score_B=torch.zeros(rows),
        reward_BT=zeros_BT,
        stop_B=torch.ones(rows, dtype=torch.long),
        group_B=group_B,
        prompts=[""] * rows,
        completions=[""] * rows,
    )


# -- the table of docs/models.md --------------------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- families: written by tests/model_families.py -->", "<!-- end of families -->"
ALLOWED = 1e-3
"""Nats that another order of the same sums may move the random models by; a fault moves them by 0.1 and more."""
RIGHT = "Right, and everything is used"
ROWS = (
    RIGHT,
    "Right; prompts are not shared among their completions",
    "Right; nor does a token go on from the cache",
    "Right; nor is there padding on the left, so that texts are computed by length",
    "Refused",
    "Not tried",
)


def judge(family: str) -> tuple[str, str]:
    """The row of the table that a family belongs to, and why.

    Raises:
        AssertionError: its numbers are wrong.
    """
    try:
        models = [tiny_model(family, window) for window in (None, WINDOW)]
        truth(models[0], torch.arange(4, 16))
    except Exception as error:  # noqa: BLE001 - whatever a family says of sizes that do not suit it
        return ROWS[5], type(error).__name__
    try:
        found = [compare(model) for model in models]
    except ValueError as error:
        return ROWS[4], str(error)
    for one in found:
        assert one.worst < ALLOWED, f"{family}: {one}"
    # The slowest way of the two, by what is left of it.
    ways = min((one.ways for one in found), key=lambda ways: (ways.shares, ways.caches, ways.pads))
    reasons = " ".join(ways.reasons)
    if not ways.pads:
        return ROWS[3], reasons
    return ROWS[2 if not ways.caches else 1 if not ways.shares else 0], reasons


def table(verdicts: dict[str, tuple[str, str]]) -> str:
    """The verdicts as the page shows them."""
    lines = [f"With transformers {transformers.__version__}:", "", "| | families (`model_type`) |", "|---|---|"]
    for row in ROWS:
        names = [f"`{family}`" for family, (of, _) in verdicts.items() if of == row]
        if names:
            lines.append(f"| {row} ({len(names)}) | {', '.join(names)} |")
    return "\n".join(lines)


def walk() -> dict[str, tuple[str, str]]:
    """The verdict on every family; of several of one class, the first that can be built."""
    verdicts: dict[str, tuple[str, str]] = {}
    of_class: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for family, name in families().items():
            verdicts[family] = judge(family)
            if verdicts[family][0] != ROWS[5]:
                of_class[name] = family
    # A configuration with pictures in it, say, whose class takes the one of its text.
    return {
        family: verdict
        for family, verdict in verdicts.items()
        if verdict[0] != ROWS[5] or families()[family] not in of_class
    }


def main() -> None:
    """Write the table into the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    verdicts = walk()
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(verdicts)}\n\n{END}{after}", encoding="utf-8")
    for family, (row, why) in verdicts.items():
        print(f"{family:28} {row}: {why[:150]}")


if __name__ == "__main__":
    main()
