"""Models as modules: a causal LM that returns log-probs, and a scalar head on its backbone.

Shape legend: B sequences, T tokens of the longest one, R response positions, V vocabulary, D hidden size.
Rows are padded on the right. Under a causal mask a token never sees what comes after it, so right padding needs no
attention mask and position ids follow the tokens by themselves. Rows that hold several sequences come with position
ids that start anew at each, from which transformers makes a mask that keeps the sequences apart (`check_packing`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from rayrlhf.config.model import FromScratch
from rayrlhf.errors import ModelError
from rayrlhf.models.attention import rows_for
from rayrlhf.models.folder import check_weights
from rayrlhf.models.logprobs import token_logprobs
from rayrlhf.models.sharding import empty_model, reads_weights

# The classes of models are imported where one is built: that takes seconds, and a driver builds none.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "PolicyModel",
    "ScalarModel",
    "checkpoint_activations",
    "context_length",
    "from_scratch",
    "has_residual_dropout",
    "load_policy",
    "load_scalar",
    "new_scalar",
    "read_config",
    "zero_scalar",
]

# Where a reward model keeps what makes its scores comparable: (raw - bias) / scale.
NORMALISATION_KEY = "rayrlhf_reward_normalisation"


class PolicyModel(nn.Module):
    """A causal LM whose forward pass gives log-probs of the tokens that follow."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        temperature: float = 1.0,
        position_ids: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Log-probs of chosen tokens given what precedes them in their sequence.

        Args:
            tokens: int64 [B, T], right-padded.
            positions: int64 [N], flat indices into [B, T] of the tokens asked for; none may be a sequence's first.
            temperature: logits are divided by it.
            position_ids: int64 [B, T], from 0 in each sequence; None where each row holds one.
            targets: int64 [N, K], asked for instead of the tokens that stand at the positions.

        Returns:
            float32 [N], or [N, K]: log softmax(logits / temperature) at those tokens.
        """
        hidden = _hidden(self.lm, tokens, position_ids)
        # The token at position p is predicted by the hidden state at p - 1.
        chosen = hidden.reshape(-1, hidden.shape[-1])[positions - 1]
        logits = self.lm.get_output_embeddings()(chosen)
        if targets is not None:
            logprobs: Tensor = (logits.float() / temperature).log_softmax(-1).gather(1, targets)
            return logprobs
        return token_logprobs(logits, tokens.reshape(-1)[positions], temperature)


class ScalarModel(nn.Module):
    """A backbone with a head of one output: the reward model and the value model."""

    def __init__(self, classifier: PreTrainedModel) -> None:
        super().__init__()
        self.classifier = classifier
        head = getattr(classifier, "score", None)
        if not isinstance(head, nn.Linear) or head.out_features != 1:
            raise ModelError(
                f"{type(classifier).__name__} has no linear head called `score` with one output",
                "reward and value models need a Hugging Face sequence-classification model with num_labels=1",
            )
        bias, scale = getattr(classifier.config, NORMALISATION_KEY, (0.0, 1.0))
        self.bias, self.scale = float(bias), float(scale)

    def forward(self, tokens: Tensor, positions: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """float32 [N]: the normalised head output at flat positions [N]; arguments as `PolicyModel.forward`."""
        hidden = _hidden(self.classifier, tokens, position_ids)
        raw: Tensor = self.classifier.score(hidden.reshape(-1, hidden.shape[-1])[positions]).squeeze(-1).float()
        return (raw - self.bias) / self.scale

    def normalise(self, bias: float, scale: float) -> None:
        """From now on a raw output x counts as (x - bias) / scale; kept in the model's own config.json."""
        self.bias, self.scale = bias, scale
        setattr(self.classifier.config, NORMALISATION_KEY, (bias, scale))


def checkpoint_activations(module: nn.Module) -> None:
    """In training keep only the inputs of each layer, and compute the rest again in the backward pass.

    Raises:
        ModelError: the model's architecture cannot.
    """
    from transformers import PreTrainedModel

    for model in module.children():
        if isinstance(model, PreTrainedModel):
            if not model.supports_gradient_checkpointing:
                raise ModelError(
                    f"a {model.config.model_type} model does not support activation checkpointing",
                    "set deepspeed.activation_checkpointing=false",
                )
            model.gradient_checkpointing_enable({"use_reentrant": False})


def _hidden(model: PreTrainedModel, tokens: Tensor, position_ids: Tensor | None) -> Tensor:
    """The backbone's last hidden states: [B, T, D], or [1, B * T, D] where its attention takes a single row."""
    tokens, position_ids = rows_for(model, tokens, position_ids)
    # Left out rather than None: some architectures have no such argument.
    given = {} if position_ids is None else {"position_ids": position_ids}
    output: Tensor = model.base_model(input_ids=tokens, use_cache=False, **given).last_hidden_state
    return output


def from_scratch(spec: FromScratch, vocab_size: int, eos: int, pad: int, seed: int) -> PolicyModel:
    """A randomly initialised causal LM of the given shape."""
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "eos_token_id": eos,
        "bos_token_id": eos,
        "pad_token_id": pad,
        "tie_word_embeddings": spec.tie_embeddings,
        "initializer_range": spec.initializer_range,
    }
    if spec.architecture == "gpt2":
        config = AutoConfig.for_model(
            "gpt2",
            n_embd=spec.hidden_size,
            n_layer=spec.layers,
            n_head=spec.heads,
            n_inner=spec.intermediate_size,
            n_positions=spec.context,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **common,
        )
    else:
        config = AutoConfig.for_model(
            "llama",
            hidden_size=spec.hidden_size,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            num_key_value_heads=spec.kv_heads or spec.heads,
            intermediate_size=spec.intermediate_size or math.ceil(spec.hidden_size * 8 / 3 / 32) * 32,
            max_position_embeddings=spec.context,
            **common,
        )
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return PolicyModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def read_config(path: str, trust_remote_code: bool) -> PretrainedConfig:
    """The model's config.json alone; ModelError when there is no such model."""
    if not Path(path).exists() and ("/" not in path or path.startswith((".", "/"))):
        raise ModelError(
            f"{path}: no such model folder", "give a folder with config.json or a Hugging Face name org/name"
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a config.json with the wrong types makes of transformers
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelError(
            f"{path}: cannot read the model's config: {reason}",
            "take a model of an architecture that transformers knows; model.trust_remote_code runs a model's own code",
        ) from None
    kernel = getattr(config, "_attn_implementation", None)
    if kernel and "/" in str(kernel) and not trust_remote_code:
        raise ModelError(
            f"{path}: its config.json asks for attention code from the hub, {kernel}",
            "take attn_implementation out of it, or set model.trust_remote_code",
        )
    return config


def context_length(config: PretrainedConfig) -> int | None:
    """The longest sequence the model holds, when its config says."""
    for key in ("max_position_embeddings", "n_positions"):
        if (value := getattr(config, key, None)) is not None:
            return int(value)
    return None


def has_residual_dropout(config: PretrainedConfig) -> bool:
    return hasattr(config, "resid_pdrop")


def load_policy(
    path: str, trust_remote_code: bool, residual_dropout: float = 0.0, *, zero_stage: int = 0
) -> PolicyModel:
    """A causal LM in float32 (the engine casts); dropout everywhere 0 but where `residual_dropout` asks for it.

    Args:
        zero_stage: of the engine that gets the model. Under 3 all ranks but the first come away with empty parameters.
    """
    from transformers import AutoModelForCausalLM

    config = _without_dropout(read_config(path, trust_remote_code))
    if residual_dropout:
        if not has_residual_dropout(config):
            raise ModelError(f"{path}: a {config.model_type} model has no residual dropout", "set sft.dropout=0")
        config.resid_pdrop = residual_dropout
    return PolicyModel(_load(AutoModelForCausalLM, path, config, trust_remote_code, zero_stage)[0])


def load_scalar(path: str, trust_remote_code: bool, *, zero_stage: int = 0) -> ScalarModel:
    """A reward or value model with its head, in float32; `zero_stage` as of `load_policy`."""
    config = _without_dropout(read_config(path, trust_remote_code))
    classifier, missing = _load_classifier(path, config, trust_remote_code, zero_stage)
    if heads := sorted(key for key in missing if key.startswith("score")):
        raise ModelError(f"{path}: the model has no trained reward head ({', '.join(heads)} missing)")
    return ScalarModel(classifier)


def new_scalar(path: str, trust_remote_code: bool, seed: int, *, zero_stage: int = 0) -> ScalarModel:
    """The backbone of `path` under a fresh head with weights from N(0, 1 / (D + 1)) (Stiennon et al. 2020).

    `zero_stage` as of `load_policy`.
    """
    torch.manual_seed(seed)
    model = _with_head(path, trust_remote_code, zero_stage)
    head: nn.Linear = model.classifier.score
    nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    return model


def zero_scalar(path: str, trust_remote_code: bool, *, zero_stage: int = 0) -> ScalarModel:
    """The backbone of `path` under a head of zeros: a value model that expects nothing until it has learned.

    `zero_stage` as of `load_policy`.
    """
    model = _with_head(path, trust_remote_code, zero_stage)
    nn.init.zeros_(model.classifier.score.weight)
    return model


def _with_head(path: str, trust_remote_code: bool, zero_stage: int) -> ScalarModel:
    config = _without_dropout(read_config(path, trust_remote_code))
    config.num_labels = 1
    classifier, _ = _load_classifier(path, config, trust_remote_code, zero_stage)
    model = ScalarModel(classifier)
    model.normalise(0.0, 1.0)  # a model to be trained counts as it is
    return model


def _load_classifier(
    path: str, config: PretrainedConfig, trust_remote_code: bool, zero_stage: int
) -> tuple[Any, list[str]]:
    from transformers import AutoModelForSequenceClassification

    return _load(AutoModelForSequenceClassification, path, config, trust_remote_code, zero_stage)


def _load(
    kind: Any, path: str, config: PretrainedConfig, trust_remote_code: bool, zero_stage: int
) -> tuple[Any, list[str]]:
    """The model, and which of its parameters the file lacks."""
    check_weights(path)
    if not reads_weights(zero_stage):
        return empty_model(kind, config, trust_remote_code), []
    model, info = kind.from_pretrained(
        path,
        config=config,
        dtype=torch.float32,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,  # a hub's pickled weights are not even fetched
        output_loading_info=True,
    )
    return model, list(info["missing_keys"])


def _without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Dropout would make two passes over the same tokens differ, and the PPO ratio with them."""
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout", "dropout"):
        if isinstance(getattr(config, key, None), float):
            setattr(config, key, 0.0)
    return config
