"""Tuned dropout of attention weights: PyTorch's attention module and its function."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from stnify import AttentionDropout, DeclarationError, EmbeddingDropout, stnify, testing
from stnify.rows import RowLayout

RATE = 0.4


class Reader(nn.Module):
    """Two attentions, one inside an encoder layer, one with time first."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, words):
        hidden = self.encoder(self.embedding(words)).transpose(0, 1)
        attended, _ = self.attention(hidden, hidden, hidden, need_weights=False)
        return self.head((hidden + attended).mean(0))


def words(batch=4):
    return torch.randint(11, (batch, 7), generator=torch.Generator().manual_seed(0))


def converted(model, rate):
    return stnify(model, [AttentionDropout(init=rate)], seed=0).model.train()


def test_it_takes_over_modules_wherever_they_are_called():
    plan = stnify(Reader(), [AttentionDropout(per_layer=True)]).plan
    names = [site.name for site in plan.noises]
    assert names == ["encoder.self_attn", "attention"]
    assert [c.name for c in plan.columns] == [f"attention_dropout.{name}" for name in names]


def test_the_modules_own_rate_is_the_start():
    model = Reader()
    model.attention.dropout, model.encoder.self_attn.dropout = 0.3, 0.1
    stn = stnify(model, [AttentionDropout()])
    assert stn.values()["attention_dropout"] == pytest.approx(0.2, rel=1e-6)  # the mean of both


def test_attention_weights_are_dropped_at_the_rate_and_scaled(monkeypatch):
    model = nn.Sequential(Attending(8, 2), nn.Linear(8, 5))
    tuned, inputs = converted(model, RATE), torch.randn(64, 6, 8)
    seen = []
    monkeypatch.setattr(torch.Tensor, "__matmul__", recording(seen, torch.Tensor.__matmul__))
    tuned(inputs)
    weights = next(left for left in seen if left.shape == (64, 2, 6, 6))
    dropped = (weights == 0).sum().item()
    count = weights.numel()
    # Five standard deviations of the binomial distribution.
    assert abs(dropped - RATE * count) < 5 * (RATE * (1 - RATE) * count) ** 0.5


def recording(seen, operator):
    def record(left, right):
        seen.append(left.detach())
        return operator(left, right)

    return record


class Attending(nn.Module):
    """Attention to oneself."""

    def __init__(self, width, heads):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, inputs):
        return self.attention(inputs, inputs, inputs, need_weights=False)[0]


def test_at_a_rate_near_nought_it_is_the_plain_attention():
    model = Reader().double()
    plain = copy.deepcopy(model)(words())
    # A weight is dropped with probability 1e-9, and the kernels round differently.
    assert torch.allclose(converted(model, 1e-9)(words()), plain, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(converted(model, RATE)(words()), plain, rtol=1e-2)


def test_eval_mode_is_the_original():
    model = Reader()
    tuned = converted(model, RATE).eval()
    assert torch.equal(tuned(words()), copy.deepcopy(model).eval()(words()))


@pytest.mark.parametrize(
    "assertion",
    [
        testing.assert_identity,
        testing.assert_rows_independent,
        testing.assert_tangent_matches_differences,
        testing.assert_gradients_separated,
        testing.assert_state_roundtrip,
        testing.assert_export_exact,
    ],
)
def test_the_converted_model_keeps_its_promises(assertion):
    assertion(Reader(), words(), [AttentionDropout(init=RATE)])


def test_rows_of_attention_weights_are_measured():
    stn = stnify(Reader(), [AttentionDropout()], example_inputs=words())
    assert {noise.layout for noise in stn.model._stnify.noises.values()} == {RowLayout.SINGLE}
    assert {layer.layout for layer in stn.model._stnify.hyper_layers.values()} == {
        RowLayout.SINGLE,
        RowLayout.SECOND,
    }


def test_functions_are_taken_over_too():
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=2)
    stn = stnify(model, [AttentionDropout(init=RATE)])
    assert [site.place for site in stn.plan.noises] == ["replace", "replace"]
    images = torch.randn(2, 3, 16, 16)
    stn.model.train()
    assert not torch.equal(stn.model(images), stn.model(images))
    assert torch.equal(stn.model.eval()(images), stn.model(images))


def test_a_model_without_attention_is_refused():
    with pytest.raises(DeclarationError, match=r"existing modules \(MultiheadAttention\)"):
        stnify(nn.Linear(3, 2), [AttentionDropout()])


@pytest.mark.parametrize("kind", [AttentionDropout, EmbeddingDropout])
@pytest.mark.parametrize("place", [{"after": "head"}, {"at": "input"}])
def test_what_needs_more_than_a_tensor_cannot_be_inserted(kind, place):
    with pytest.raises(DeclarationError, match="takes over what the model has, and cannot be ins"):
        kind(**place)


def test_the_slow_way_agrees_with_a_mask_that_is_given():
    """With every draw the same, the attention is that of masked probabilities, head by head."""
    model = nn.Sequential(Attending(8, 2), nn.Linear(8, 5)).double()
    tuned, inputs = converted(copy.deepcopy(model), RATE), torch.randn(3, 6, 8).double()
    before = tuned._stnify.stream.state_dict()
    found = tuned(inputs)
    with torch.random.fork_rng():
        torch.set_rng_state(before["cpu"])
        kept = (torch.rand(3, 2, 6, 6) < 1 - RATE).double() / (1 - RATE)
    attention = model[0].attention
    sides = F.linear(inputs, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    query, key, value = (side.unflatten(2, (2, 4)).transpose(1, 2) for side in sides)
    weights = (query @ key.mT / 2).softmax(-1)
    mixed = (kept * weights) @ value
    expected = model[1](attention.out_proj(mixed.transpose(1, 2).flatten(2)))
    # Only which draws stay is compared: rounding of the rate moves none of these few.
    assert torch.allclose(found, expected, rtol=1e-5)
    assert not torch.allclose(found, model(inputs), rtol=1e-2)
