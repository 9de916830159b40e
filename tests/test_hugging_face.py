"""Architectures of Hugging Face, made small: exact in eval and training, rows independent.

They need the extra ``test-hf``; see ``conftest.py``.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from stnify import STN, WeightDecay, stnify
from stnify.linearize import linearized_forward, perturbed_forward
from stnify.perturb import Perturbation
from stnify.rows import RowLayout

pytestmark = pytest.mark.hf

Inputs = dict[str, Tensor]

TRANSFORMER: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "dropout": 0.0,
    "use_cache": False,
    "decoder_start_token_id": 1,
}
PATCHES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 8,
}
SILENT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator)


def words(examples: int) -> Inputs:
    generator = torch.Generator().manual_seed(examples)
    return {
        "input_ids": torch.randint(3, 50, (examples, 7), generator=generator),
        "attention_mask": torch.ones(examples, 7, dtype=torch.long),
    }


def labelled_words(examples: int) -> Inputs:
    return {**words(examples), "labels": words(examples)["input_ids"]}


def pixels(size: int) -> Callable[[int], Inputs]:
    return lambda examples: {"pixel_values": normal(examples, 3, size, size)}


def frames(examples: int) -> Inputs:
    return {"pixel_values": normal(examples, 4, 3, 16, 16)}


def sound(examples: int) -> Inputs:
    return {"input_values": normal(examples, 200)}


ARCHITECTURES: dict[str, tuple[dict[str, Any], Callable[[int], Inputs]]] = {
    "LlamaForCausalLM": ({**TRANSFORMER, "use_cache": False}, words),
    "T5ForConditionalGeneration": (
        {
            "vocab_size": 50,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 2,
            "dropout_rate": 0.0,
            "use_cache": False,
            "decoder_start_token_id": 0,
        },
        labelled_words,
    ),
    "BartForConditionalGeneration": (ENCODER_DECODER, labelled_words),
    "RobertaForSequenceClassification": ({**TRANSFORMER, **SILENT}, words),
    "DebertaV2ForSequenceClassification": (
        {**TRANSFORMER, **SILENT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        words,
    ),
    "MambaForCausalLM": (
        {
            "vocab_size": 50,
            "hidden_size": 16,
            "state_size": 4,
            "num_hidden_layers": 2,
            "use_cache": False,
        },
        lambda examples: {"input_ids": words(examples)["input_ids"]},
    ),
    "ResNetForImageClassification": (
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        pixels(32),
    ),
    "SwinForImageClassification": (
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "window_size": 4,
            "drop_path_rate": 0.0,
        },
        pixels(32),
    ),
    "Dinov2ForImageClassification": (PATCHES, pixels(16)),
    "VideoMAEForVideoClassification": (
        {**PATCHES, **SILENT, "num_frames": 4, "tubelet_size": 2},
        frames,
    ),
    "TimesformerForVideoClassification": ({**PATCHES, **SILENT, "num_frames": 4}, frames),
    "Wav2Vec2ForSequenceClassification": (
        {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "conv_dim": [8, 8],
            "conv_stride": [2, 2],
            "conv_kernel": [3, 3],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "classifier_proj_size": 8,
            "mask_time_prob": 0.0,
            "layerdrop": 0.0,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "feat_proj_dropout": 0.0,
        },
        sound,
    ),
}
"""Class name to the arguments of its configuration, and inputs of so many examples."""

ROUNDED = {"LlamaForCausalLM", "T5ForConditionalGeneration", "MambaForCausalLM"}
"""Compute parts in single precision whatever their weights are."""


@pytest.fixture(params=ARCHITECTURES, name="name")
def _name(request) -> str:
    return request.param


def build(name: str) -> nn.Module:
    import transformers

    model = getattr(transformers, name)
    torch.manual_seed(0)
    return model(model.config_class(**ARCHITECTURES[name][0]))


def verified(name: str, model: nn.Module) -> STN:
    return stnify(model, [WeightDecay()], example_inputs=inputs(name, 3), seed=0)


def inputs(name: str, examples: int) -> Inputs:
    return ARCHITECTURES[name][1](examples)


def tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def same(found: Any, expected: Any) -> bool:
    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    return type(found) is type(expected) and all(torch.equal(*pair) for pair in pairs)


def loss_of(outputs: Any) -> Tensor:
    return sum(part.square().mean() for part in tensors(outputs) if part.requires_grad)


def open_gates(stn: STN) -> None:
    """Give every response of single examples a first-order effect."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in stn.model.hyper_layers.values():
            if layer.layout is not RowLayout.SHARED:
                for parameter in layer.parameters():
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def test_eval_and_training_are_the_original(name):
    model, twin = build(name), build(name)
    stn = verified(name, model)
    for training in (False, True):
        stn.model.train(training)
        twin.train(training)
        for examples in (2, 3):
            given = inputs(name, examples)
            expected = twin(**given)
            assert same(stn.model(**given), expected)
            assert same(stn.model._stnify.graph(**given), expected)
    loss_of(stn.model(**given)).backward()
    loss_of(twin(**given)).backward()
    for (key, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), key
        assert parameter.grad is None or torch.equal(parameter.grad, other.grad), key
    with torch.no_grad():  # negative control
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    assert not same(stn.model(**given), twin(**given))


def test_tangents_are_differences_and_rows_are_independent(name):
    stn = verified(name, build(name).eval())
    open_gates(stn)
    stn.model.double().eval()
    given = tree_map_only(
        Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs(name, 3)
    )
    epsilon = normal(3, 1).double()
    other = epsilon.clone()
    other[1] += 1.0

    @torch.no_grad()
    def run(forward: Any, response_input: Tensor) -> Tensor:
        perturbation = Perturbation(response_input, None)
        outputs = forward(stn.model._stnify.graph, (), given, perturbation)
        return outputs.logits

    # The larger step keeps the rounding of single precision out.
    step, tolerance = (1e-2, 1e-3) if name in ROUNDED else (1e-5, 1e-6)
    ahead, behind = (run(perturbed_forward, side * step * epsilon) for side in (1, -1))
    difference = (ahead - behind) / (2 * step)
    tangent = run(linearized_forward, epsilon) - run(perturbed_forward, 0 * epsilon)
    scale = difference.abs().max()
    assert scale > 1e-5
    assert (tangent - difference).abs().max() < tolerance * scale

    first, second = run(perturbed_forward, epsilon), run(perturbed_forward, other)
    assert torch.allclose(first[[0, 2]], second[[0, 2]], rtol=1e-9, atol=1e-12)
    assert (first[1] - second[1]).abs().max() > 1e-5
