"""Models of no zoo: a GPT and a U-Net as people write them, two of Hugging Face's.

Those of Hugging Face need the extra ``test-hf``; see ``conftest.py``.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator

from stnify import STN, Dropout, Hyperparameter, WeightDecay, stnify
from stnify.linearize import perturbed_forward
from stnify.objective import Objective
from stnify.perturb import Perturbation
from stnify.rows import RowLayout, batch_size, first_dimensions
from stnify.step import validation_step
from stnify.tunable import evaluating

# A decoder, as nanoGPT has it ---------------------------------------------------------------------


class CausalAttention(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.resid_dropout = nn.Dropout(dropout)
        self.heads, self.dropout = heads, dropout

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (s.view(B, T, self.heads, C // self.heads).transpose(1, 2) for s in (q, k, v))
        dropout = self.dropout if self.training else 0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C)))


class DecoderBlock(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), CausalAttention(width, heads, dropout)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Ties its head to its embedding; returns the loss too if it is given targets."""

    def __init__(self, dropout=0.0, vocabulary=13, block_size=8, width=16, depth=2):
        super().__init__()
        self.block_size = block_size
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, width),
                "wpe": nn.Embedding(block_size, width),
                "drop": nn.Dropout(dropout),
                "h": nn.ModuleList(DecoderBlock(width, 2, dropout) for _ in range(depth)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        nn.init.normal_(self.lm_head.weight, std=0.1)

    def forward(self, idx, targets=None):
        _, t = idx.size()
        assert t <= self.block_size, f"a sequence of {t} is longer than {self.block_size}"
        positions = torch.arange(0, t, dtype=torch.long, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        flat = logits.view(-1, logits.size(-1))
        return logits, F.cross_entropy(flat, targets.view(-1), ignore_index=-1)


def sequences(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Words that are followed by the word two further on."""
    starts = torch.arange(count)[:, None] * 5
    words = (starts + 2 * torch.arange(size + 1)) % 13
    return words[:, :-1].contiguous(), words[:, 1:].contiguous()


# A U-Net ------------------------------------------------------------------------------------------


class TwoConvolutions(nn.Sequential):
    def __init__(self, inputs, outputs):
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.GroupNorm(2, outputs),
            nn.SiLU(inplace=True),
        )


class UNet(nn.Module):
    """Pads what it brings up to the size of what it has kept, so that odd sizes fit."""

    def __init__(self, dropout=0.0, widths=(4, 8, 16)):
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.stem = TwoConvolutions(3, widths[0])
        self.down = nn.ModuleList(TwoConvolutions(*pair) for pair in pairs)
        self.drop = nn.Dropout2d(dropout)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in reversed(pairs))
        self.merge = nn.ModuleList(TwoConvolutions(2 * a, a) for a, _ in reversed(pairs))
        self.head = nn.Conv2d(widths[0], 2, 1)

    def forward(self, images):
        kept = [self.stem(images)]
        for block in self.down:
            kept.append(block(F.max_pool2d(kept[-1], 2)))
        x = self.drop(kept.pop())
        for up, merge in zip(self.up, self.merge, strict=True):
            x, skip = up(x), kept.pop()
            missing = skip.size(3) - x.size(3), skip.size(2) - x.size(2)
            x = merge(torch.cat([skip, F.pad(x, [0, missing[0], 0, missing[1]])], dim=1))
        return self.head(x)


def pictures(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Noise whose bright pixels are to be found."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, 3, size, size, generator=generator)
    return images, (images.sum(1) > 0).long()


# Hugging Face -------------------------------------------------------------------------------------


def vision_transformer(dropout: float = 0.0) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        num_labels=3,
        hidden_dropout_prob=dropout,
    )
    return ViTForImageClassification(config)


def labelled_pictures(count: int, size: int) -> dict[str, Tensor]:
    """Noise that is classified by its brightest channel."""
    images, _ = pictures(count, size)
    labels = torch.arange(count) % 3
    images[torch.arange(count), labels] += 1.0
    return {"pixel_values": images, "labels": labels}


def bert(dropout: float = 0.0) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=13,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        num_labels=3,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def labelled_sequences(count: int, size: int) -> dict[str, Tensor]:
    """Sequences of different lengths that are classified by their first word."""
    words, _ = sequences(count, size)
    kept = torch.arange(size) < size - torch.arange(count)[:, None] % 3
    labels = words[:, 0] % 3
    return {"input_ids": words, "attention_mask": kept.long(), "labels": labels}


# What is tried on all of them ---------------------------------------------------------------------


@dataclass(frozen=True)
class Outside:
    """A model and what it is trained on.

    Attributes:
        build: Builds it with a rate of dropout.
        data: ``(examples, size) -> batch``, a tuple or dict of tensors.
        sizes: Lengths or resolutions it takes; the last is trained on.
        call: ``(model, batch) -> predictions``, one row for each example.
        loss: ``(model, batch) -> scalar``.
        hparams: What is tuned.
        learning_rate: Of Adam.
        left: Parameters of two or more dimensions that do not respond.
        shared: Layers that see no single example.
    """

    build: Callable[[float], nn.Module]
    data: Callable[[int, int], Any]
    sizes: tuple[int, ...]
    call: Callable[[nn.Module, Any], Tensor]
    loss: Callable[[Any, Any], Tensor]
    hparams: list[Any]
    learning_rate: float
    left: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()


def hugging_face(
    build: Any, data: Any, sizes: tuple[int, ...], uncalled: tuple[str, ...] = (), **options: Any
) -> Any:
    outside = Outside(
        build,
        data,
        sizes,
        call=lambda model, batch: model(**batch).logits,
        loss=lambda model, batch: model(**batch).loss,
        # BERT's attention reads the rate of a dropout that it does not call.
        hparams=[Dropout(init=0.05, exclude=uncalled), WeightDecay(init=1e-4)],
        learning_rate=3e-3,
        **options,
    )
    return pytest.param(outside, id=build.__name__, marks=pytest.mark.hf)


def segmentation_loss(model: Any, batch: Any) -> Tensor:
    """Cross-entropy, and in training a tuned share of label smoothing."""
    logits = model(batch[0])
    loss = F.cross_entropy(logits, batch[1])
    if not model.training:
        return loss
    smoothing = model.hyperparameters["smoothing"].mean()
    return (1 - smoothing) * loss - smoothing * logits.log_softmax(1).mean()


MODELS = [
    pytest.param(
        Outside(
            GPT,
            sequences,
            sizes=(5, 8),
            call=lambda model, batch: model(*batch)[0],
            loss=lambda model, batch: model(*batch)[1],
            hparams=[Dropout(init=0.05), WeightDecay(init=1e-4)],
            learning_rate=1e-2,
            shared=frozenset({"transformer.wpe"}),
        ),
        id="gpt",
    ),
    pytest.param(
        Outside(
            UNet,
            pictures,
            sizes=(11, 8),
            call=lambda model, batch: model(batch[0]),
            loss=segmentation_loss,
            hparams=[
                Dropout(init=0.05),
                WeightDecay(init=1e-4),
                Hyperparameter("smoothing", 0.05, (0.0, 0.5)),
            ],
            learning_rate=1e-2,
        ),
        id="unet",
    ),
    hugging_face(
        vision_transformer,
        labelled_pictures,
        (16,),
        left=frozenset({"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}),
    ),
    hugging_face(
        bert,
        labelled_sequences,
        (5, 8),
        uncalled=("**.attention.self.dropout",),
        shared=frozenset({"bert.embeddings.position_embeddings"}),
    ),
]


@pytest.fixture(params=MODELS, name="outside")
def _outside(request) -> Outside:
    return request.param


def build(outside: Outside, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return outside.build(dropout)


def verified(outside: Outside, model: nn.Module, size: int) -> STN:
    """Convert with nothing that is drawn, and measure rows."""
    batch = outside.data(4, size)
    if isinstance(batch, tuple) and outside.build is UNet:
        batch = batch[:1]
    return stnify(model, outside.hparams, example_inputs=batch, seed=0)


def test_eval_mode_graph_and_export_are_the_original(outside):
    model, twin = build(outside).eval(), build(outside).eval()
    stn = verified(outside, model, outside.sizes[0])
    for size in outside.sizes:
        for count in (2, 3):
            batch = outside.data(count, size)
            expected = outside.call(twin, batch)
            for found in (stn.model, stn.model._stnify.graph, stn.export()):
                assert torch.equal(outside.call(found, batch), expected)
    with torch.no_grad():  # negative control
        next(iter(model.parameters())).add_(1.0)
    assert not torch.equal(outside.call(stn.model._stnify.graph, batch), expected)


def test_training_is_the_originals_with_its_gradients(outside):
    model, twin = build(outside).train(), build(outside).train()
    stn = stnify(model, [WeightDecay()], seed=0)
    for count in (2, 3):
        batch = outside.data(count, outside.sizes[0])
        found, expected = outside.call(stn.model, batch), outside.call(twin, batch)
        assert torch.equal(found, expected)
        found.square().mean().backward()
        expected.square().mean().backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        assert other.grad is None or torch.equal(parameter.grad, other.grad), name
    for (name, buffer), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    with torch.no_grad():  # negative control
        for parameter in twin.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    assert not torch.equal(outside.call(stn.model, batch), outside.call(twin, batch))


def test_every_matrix_responds(outside):
    model = build(outside)
    plan = stnify(model, outside.hparams).plan
    matrices = {n for n, p in model.named_parameters() if p.ndim >= 2}
    responding = {site.weight for site in plan.weights if site.weight_responds}
    assert matrices - responding == outside.left


def test_each_example_has_its_own_perturbation(outside):
    model, size = build(outside).eval(), outside.sizes[-1]
    stn = verified(outside, model, size)
    shared = {site.name for site in stn.plan.weights if site.layout.startswith("shared")}
    assert shared == outside.shared
    with torch.no_grad():
        for layer in stn.model.hyper_layers.values():
            if layer.layout in (RowLayout.SINGLE, RowLayout.BATCH):
                for parameter in layer.parameters():
                    parameter.normal_(0, 0.3)
    batch = outside.data(3, size)
    before = torch.randn(3, len(outside.hparams))
    after = before.clone()
    after[1] += 1.0
    first, second = (perturbed(stn, outside, batch, given) for given in (before, after))
    assert torch.equal(first[[0, 2]], second[[0, 2]])
    assert not torch.allclose(first[1], second[1], atol=1e-4)


@torch.no_grad()
def perturbed(stn: STN, outside: Outside, batch: Any, response_input: Tensor) -> Tensor:
    perturbation = Perturbation(response_input, None)

    def chosen(graph, args, kwargs):
        return perturbed_forward(graph, args, kwargs, perturbation)

    with evaluating(stn.model), stn.model._stnify.running(chosen, None):
        return outside.call(stn.model, batch)


def test_it_trains_and_tunes_in_a_real_loop(outside):
    model, size = build(outside, dropout=0.05), outside.sizes[-1]
    examples = outside.data(24, size)
    train, valid = (Rows(examples, rows) for rows in (range(16), range(16, 24)))
    stn = stnify(
        model,
        outside.hparams,
        optimizer=torch.optim.Adam(model.parameters(), outside.learning_rate),
        forward_loss=outside.loss,
        train_loader=DataLoader(train, batch_size=8),
        valid_loader=DataLoader(valid, batch_size=8),
        warmup_steps=4,
        train_steps=1,
        seed=0,
    )
    start = stn.values()
    model, optimizer, loader = stn
    losses = []
    for _ in range(10):
        for batch in loader:
            optimizer.zero_grad()
            loss = outside.loss(model, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert stn.counters.skipped == stn.counters.skipped_responses == 0
    assert all(stn.values()[name] != value for name, value in start.items())
    batch = outside.data(6, size)
    found = validation_step(stn.model, batch, Objective(forward_loss=outside.loss))
    for name in ("unconstrained", "raw_scale"):
        assert found.is_finite
        assert (found.gradients[name] != 0).all()


class Rows(torch.utils.data.Dataset):
    """Some rows of a tuple or dict of tensors."""

    def __init__(self, tensors: Any, rows: range) -> None:
        self.tensors, self.rows = tensors, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        row = self.rows[index]
        if isinstance(self.tensors, dict):
            return {name: tensor[row] for name, tensor in self.tensors.items()}
        return tuple(tensor[row] for tensor in self.tensors)


# Lists: of pictures, an entry for each example, or of inputs --------------------------------------

SIZES = [(40, 48), (56, 40), (48, 48)]
PICTURES = [torch.rand(3, *size) for size in SIZES]
BOXES = torch.tensor([[4.0, 5.0, 20.0, 22.0], [8.0, 8.0, 30.0, 31.0]])
TARGETS = [{"boxes": BOXES[:n], "labels": torch.tensor([1, 2])[:n]} for n in (1, 2, 1)]
COUNTED = {
    "pictures": (PICTURES, 3),
    "two pictures": (PICTURES[:2], 2),
    "one picture": (PICTURES[:1], 1),
    "pictures of one size": ([torch.rand(3, 8, 8)] * 5, 5),
    "grey pictures, labelled": (([torch.rand(1, 8, 8)] * 2, torch.zeros(2)), 2),
    "pictures and targets": ((PICTURES[:2], TARGETS[:2]), 2),
    "two inputs": ([torch.rand(8, 5), torch.rand(8, 7)], 8),
    "two sequences": ([torch.rand(8, 5, 2), torch.rand(8, 7, 2)], 8),
    "two sequences of four, labelled": (([torch.rand(4, 5, 2)] * 2, torch.zeros(4)), 4),
    "a tuple is inputs": (tuple(PICTURES[:2]), 3),
    "two batches of pictures": ([torch.rand(4, 3, 8, 8), torch.rand(4, 3, 4, 4)], 4),
    "nothing": ([], 0),
}
"""Inputs, and how many examples they hold."""


@pytest.mark.parametrize(("inputs", "examples"), COUNTED.values(), ids=COUNTED)
def test_lists_of_pictures_count_their_entries_and_lists_of_inputs_do_not(inputs, examples):
    assert batch_size(inputs) == examples
    assert batch_size((inputs, {"other": None})) == examples


def test_sequences_that_look_like_pictures_are_counted_either_way():
    assert set(first_dimensions([torch.rand(4, 5, 2), torch.rand(4, 7, 2)])) == {2, 4}


class SmallBackbone(nn.Sequential):
    out_channels = 8

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=4, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.ReLU(),
        )


def faster_rcnn():
    return detection.FasterRCNN(
        SmallBackbone(),
        num_classes=3,
        min_size=48,
        max_size=64,
        rpn_anchor_generator=AnchorGenerator(((8, 16),), ((1.0,),)),
        rpn_pre_nms_top_n_train=20,
        rpn_post_nms_top_n_train=10,
        box_batch_size_per_image=8,
    )


def retinanet():
    return detection.RetinaNet(
        SmallBackbone(),
        num_classes=3,
        min_size=48,
        max_size=64,
        anchor_generator=AnchorGenerator(((8,),), ((1.0,),)),
    )


def detection_loss(model, batch):
    return sum(model(*batch).values())


DETECTIONS = [
    *((faster_rcnn, {"roi_heads"}, count, given) for count in (2, 3) for given in (True, False)),
    (retinanet, set(), 3, True),
]
"""Each with what sees proposals of all pictures, which are not of one number for each."""


@pytest.mark.parametrize(("build", "shared", "count", "with_targets"), DETECTIONS)
def test_detectors_perturb_each_picture_by_itself(build, shared, count, with_targets):
    torch.manual_seed(0)
    model, batch = build(), (PICTURES[:count], TARGETS[:count])
    stn = stnify(
        model,
        [WeightDecay()],
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
        forward_loss=detection_loss,
        method="centered",
        example_inputs=batch if with_targets else (batch[0],),
    )
    layouts = {site.name: site.layout for site in stn.plan.weights}
    found = {place.split(".")[0] for place, layout in layouts.items() if layout != "batch"}
    assert found == shared
    assert layouts
    assert stn.step(batch) > 0
    assert stn.counters.skipped_responses == 0


class Twins(nn.Module):
    """Takes a list of two sequences."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, both):
        one, other = (self.inner(each).mean(1) for each in both)
        return self.outer(one - other)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 8])
def test_lists_of_inputs_are_perturbed_by_example(batch):
    torch.manual_seed(0)
    model = Twins()
    stn = stnify(
        model,
        [WeightDecay()],
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=F.cross_entropy,
        example_inputs=([torch.randn(8, 7, 6), torch.randn(8, 9, 6)],),
    )
    assert [site.layout for site in stn.plan.weights] == ["batch", "batch"]
    sequences = [torch.randn(batch, 7, 6), torch.randn(batch, 9, 6)]
    stn.step((sequences, torch.zeros(batch, dtype=torch.long)))
    assert stn.counters.skipped_responses == 0
