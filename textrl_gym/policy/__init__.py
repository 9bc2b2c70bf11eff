"""A language model as a token policy: logits, values, decoding, and its frozen reference.

- `policy`: Policy: log-probabilities, values and actions of a model
- `architectures`: what a policy asks of a backbone, and which one a model gets
- `backbone`: a decoder's body on prompts and completions, each prompt computed once
- `seq2seq`: an encoder-decoder on them
- `trial`: which ways of running a model give its own numbers
- `prefix_attention`: attention over a prompt that a group of completions shares
- `attention_kernels`: the same by PyTorch's fused kernels, in training passes
- `compiling`: torch.compile of passes and of the decode step
- `decoders`: cached decoding, a token at a time
- `step_cache`: cached decoding of observations that grow by a token (Stable-Baselines3)
- `top_p_policy`: a policy on the top-p tokens of an older copy (NLPO)
- `quantile_policy`: a policy that a token in front of the prompt tells how good to be (Quark)
"""

from __future__ import annotations

from textrl_gym.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "Policy": "policy",
        "Response": "policy",
        "Backbone": "architectures",
        "Trunk": "backbone",
        "Seq2SeqTrunk": "seq2seq",
        "Decoder": "decoders",
        "StepCache": "step_cache",
        "MaskedPolicy": "top_p_policy",
        "QuantilePolicy": "quantile_policy",
    },
)
