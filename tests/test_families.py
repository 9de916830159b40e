"""One small model of every family of timm and torchvision converts, exactly and wholly.

A family is a module file. The benchmark ``benchmarks/coverage.py`` examines every structure.
"""

import pytest
import timm
import torch
import torchvision
from torchvision.models.optical_flow import RAFT
from zoo import shorten

from benchmarks.examine import examine, judged
from benchmarks.structures import assembled, entry_points

RATES = {"drop_rate": 0.1, "drop_path_rate": 0.1}
RATE = {"drop_rate": 0.1}
CLASSES = {"num_classes": 5}
NARROW = {"embed_dim": 96, "num_heads": 2}
IMAGE = (3, 64, 64)
SMALL = (3, 32, 32)
VERSIONS = ("1.0.31", "0.29.2")
"""Of timm and torchvision, when the table was made."""

FAMILIES = {
    "timm beit": ("beit_base_patch16_224", {**RATES, **NARROW, "depth": 2, "img_size": 64}, IMAGE),
    "timm byoanet": ("botnet26t_256", {**RATES, "img_size": 64, "width_factor": 0.25}, IMAGE),
    "timm byobnet": ("test_byobnet", RATES, IMAGE),
    "timm cait": ("cait_xxs24_224", {**RATES, "depth": 2, "img_size": 64}, IMAGE),
    "timm coat": ("coat_lite_tiny", {**RATES, "img_size": 64}, IMAGE),
    "timm convit": ("convit_tiny", {**RATES, "img_size": 64}, IMAGE),
    "timm convmixer": ("convmixer_768_32", RATE, IMAGE),
    "timm convnext": ("test_convnext", RATES, IMAGE),
    "timm cpubone": ("cpubone_b0_bfrobust", RATES, IMAGE),
    "timm crossvit": (
        "crossvit_tiny_240",
        {
            **RATES,
            "depth": ([1, 1, 0], [1, 1, 0], [1, 1, 0]),
            "embed_dim": (48, 96),
            "img_size": 240,
        },
        (3, 240, 240),
    ),
    "timm csatv2": ("csatv2", {**RATES, "depths": (2, 2, 2, 2)}, IMAGE),
    "timm cspnet": ("cs3darknet_focus_s", RATES, IMAGE),
    "timm cspnext": ("cspnext_tiny", {**RATES, "depths": (2, 2, 2, 2)}, IMAGE),
    "timm davit": (
        "davit_tiny",
        {**RATES, "depths": (1, 1, 2, 1), "embed_dims": (24, 48, 96, 192)},
        IMAGE,
    ),
    "timm deepseek_vit": (
        "deepseek_vit_412m",
        {**RATES, "depth": 2, "img_size": 112, "embed_dim": 64, "num_heads": 2},
        (3, 112, 112),
    ),
    "timm deit": ("deit3_small_patch16_224", {**RATES, "depth": 2, "img_size": 64}, IMAGE),
    "timm densenet": ("densenet121", {**RATE, "block_config": (2, 3, 4, 5)}, IMAGE),
    "timm dla": ("dla46_c", RATE, IMAGE),
    "timm dpn": ("dpn48b", RATE, SMALL),
    "timm edgenext": ("edgenext_xx_small", {**RATES, "depths": (2, 2, 2, 2)}, IMAGE),
    "timm efficientformer": (
        "efficientformer_l1",
        {**RATES, "depths": (1, 1, 1, 2), "embed_dims": (24, 48, 96, 192), "img_size": 224},
        (3, 224, 224),
    ),
    "timm efficientformer_v2": (
        "efficientformerv2_s2",
        {**RATES, "depths": (1, 1, 1, 2), "embed_dims": (16, 32, 48, 96), "img_size": 64},
        IMAGE,
    ),
    "timm efficientnet": ("test_efficientnet", RATES, IMAGE),
    "timm efficientvim": ("efficientvim_m1", RATES, IMAGE),
    "timm efficientvit_mit": ("efficientvit_b0", {**RATE, "depths": (2, 2, 2, 2)}, IMAGE),
    "timm efficientvit_msra": (
        "efficientvit_m0",
        {**RATE, "depth": (1, 1, 1), "img_size": 64},
        IMAGE,
    ),
    "timm eva": ("eva02_base_patch14_224", {**RATES, **NARROW, "depth": 2, "img_size": 64}, IMAGE),
    "timm fasternet": ("fasternet_t2", {**RATES, "depths": (1, 2, 2, 2)}, IMAGE),
    "timm fastvit": (
        "fastvit_sa12",
        {**RATES, "layers": (1, 1, 1, 1), "embed_dims": (32, 64, 128, 256)},
        IMAGE,
    ),
    "timm focalnet": ("focalnet_tiny_srf", RATES, SMALL),
    "timm gcvit": ("gcvit_xxtiny", {**RATES, "embed_dim": 16, "img_size": 64}, IMAGE),
    "timm gemma4_vit": ("gemma4_vit_167m", {**RATES, **NARROW, "depth": 2, "img_size": 64}, IMAGE),
    "timm ghostnet": ("ghostnet_050", RATE, IMAGE),
    "timm hardcorenas": ("hardcorenas_b", RATES, IMAGE),
    "timm hgnet": ("hgnetv2_b0", RATES, IMAGE),
    "timm hiera": (
        "hiera_tiny_224",
        {**RATES, "embed_dim": 24, "stages": (1, 1, 2, 1), "img_size": 64},
        IMAGE,
    ),
    "timm hieradet_sam2": (
        "hieradet_small",
        {**RATES, "embed_dim": 16, "stages": (1, 1, 2, 1)},
        IMAGE,
    ),
    "timm hrnet": ("hrnet_w18_small", RATE, SMALL),
    "timm iformer": ("iformer_t", RATES, IMAGE),
    "timm inception_next": ("inception_next_atto", {**RATES, "depths": (2, 2, 2, 2)}, IMAGE),
    "timm inception_resnet_v2": ("inception_resnet_v2", RATE, (3, 75, 75)),
    "timm inception_v3": ("inception_v3", RATE, (3, 75, 75)),
    "timm inception_v4": ("inception_v4", RATE, (3, 75, 75)),
    "timm lcnetv2": ("lcnetv2_small", {**RATE, "depths": (2, 2, 2, 2)}, IMAGE),
    "timm levit": (
        "levit_128s",
        {**RATES, "depth": (2, 2, 2), "embed_dim": (32, 64, 96), "img_size": 64},
        IMAGE,
    ),
    "timm lowformer": ("lowformer_b0", RATES, IMAGE),
    "timm mambaout": ("test_mambaout", RATES, IMAGE),
    "timm maxxvit": ("test_maxvit", {**RATES, "img_size": 64}, IMAGE),
    "timm metaformer": ("caformer_s18", RATES, IMAGE),
    "timm mlp_mixer": ("gmixer_12_224", {**RATES, "img_size": 64}, IMAGE),
    "timm mobilenetv3": ("fbnetv3_b", RATES, IMAGE),
    "timm mobilenetv5": ("mobilenetv5_base", {**RATES, "channel_multiplier": 0.1}, IMAGE),
    "timm mobilevit": ("mobilevit_xxs", {**RATES, "img_size": 64}, IMAGE),
    "timm mvitv2": ("mvitv2_tiny", {**RATES, "img_size": 64}, IMAGE),
    "timm naflexvit": (
        "naflexvit_base_patch16_gap",
        {**RATES, **NARROW, "depth": 2, "img_size": 64},
        IMAGE,
    ),
    "timm nest": ("nest_tiny", {**RATES, "img_size": 64}, IMAGE),
    "timm nextvit": ("nextvit_small", RATES, SMALL),
    "timm nfnet": ("test_nfnet", RATES, IMAGE),
    "timm pit": ("pit_ti_224", {**RATES, "depth": (2, 2, 2), "img_size": 64}, IMAGE),
    "timm pvt_v2": ("pvt_v2_b0", {**RATES, "depths": (2, 2, 2, 2)}, SMALL),
    "timm qwen3_vit": ("qwen3_vit_88m", {**RATES, **NARROW, "depth": 2, "img_size": 64}, IMAGE),
    "timm rdnet": ("rdnet_tiny", {**RATES, "growth_rates": (16, 24, 32, 32, 32, 32, 48)}, SMALL),
    "timm regnet": ("regnety_002", RATES, SMALL),
    "timm repghost": ("repghostnet_050", RATE, IMAGE),
    "timm repvit": (
        "repvit_m0_9",
        {**RATE, "depth": (2, 2, 2, 2), "embed_dim": (16, 32, 64, 96), "img_size": 64},
        IMAGE,
    ),
    "timm res2net": ("res2next50", {**RATES, "layers": (2, 2, 2, 2)}, IMAGE),
    "timm resnest": ("resnest14d", RATES, SMALL),
    "timm resnet": ("test_resnet", RATES, IMAGE),
    "timm resnetv2": (
        "resnetv2_50",
        {**RATES, "layers": (1, 1, 1, 1), "width_factor": 0.25},
        IMAGE,
    ),
    "timm rexnet": ("rexnet_100", RATES, SMALL),
    "timm selecsls": ("selecsls42", RATE, SMALL),
    "timm senet": ("legacy_seresnet18", RATE, SMALL),
    "timm sequencer": (
        "sequencer2d_s",
        {**RATES, "layers": (2, 2, 2, 2), "embed_dims": (48, 96, 96, 96), "img_size": 64},
        IMAGE,
    ),
    "timm shvit": ("shvit_s1", {**RATE, "depth": (2, 2, 2)}, IMAGE),
    "timm sknet": ("skresnet18", RATES, IMAGE),
    "timm starnet": ("starnet_s050", {**RATES, "depths": (1, 1, 2, 1)}, IMAGE),
    "timm swiftformer": (
        "swiftformer_xs",
        {**RATES, "layers": (2, 2, 2, 2), "img_size": 64},
        IMAGE,
    ),
    "timm swin_transformer": (
        "swin_tiny_patch4_window7_224",
        {**RATES, "depths": (2, 2, 2, 2), "embed_dim": 24, "img_size": 64},
        IMAGE,
    ),
    "timm swin_transformer_v2": (
        "swinv2_tiny_window16_256",
        {**RATES, "depths": (2, 2, 2, 2), "embed_dim": 24, "img_size": 64, "window_size": 4},
        IMAGE,
    ),
    "timm swin_transformer_v2_cr": (
        "swinv2_cr_tiny_224",
        {**RATES, "depths": (2, 2, 2, 2), "embed_dim": 24, "img_size": 64},
        IMAGE,
    ),
    "timm tiny_vit": (
        "tiny_vit_5m_224",
        {
            **RATES,
            "depths": (2, 2, 2, 2),
            "embed_dims": (32, 64, 64, 96),
            "num_heads": (1, 2, 2, 3),
        },
        IMAGE,
    ),
    "timm tnt": ("tnt_s_patch16_224", {**RATES, "depth": 2, "img_size": 64}, IMAGE),
    "timm tresnet": ("tresnet_m", {**RATES, "layers": (2, 2, 2, 2), "width_factor": 0.25}, IMAGE),
    "timm twins": (
        "twins_pcpvt_small",
        {**RATES, "depths": (2, 2, 2, 2), "embed_dims": (32, 64, 160, 128), "img_size": 64},
        IMAGE,
    ),
    "timm vgg": ("vgg11", {**RATE, "mlp_ratio": 0.02}, SMALL),
    "timm visformer": ("visformer_tiny", {**RATES, "depth": (2, 2, 2), "img_size": 64}, IMAGE),
    "timm vision_transformer": ("test_vit", {**RATES, "img_size": 64}, IMAGE),
    "timm vision_transformer_hybrid": (
        "vit_base_mci_224",
        {**RATES, "depth": 2, "img_size": 64},
        IMAGE,
    ),
    "timm vision_transformer_relpos": ("test_vit_relpos", {**RATES, "img_size": 64}, IMAGE),
    "timm vision_transformer_sam": (
        "samvit_base_patch16",
        {**RATES, **NARROW, "depth": 2, "img_size": 64},
        IMAGE,
    ),
    "timm vitamin": ("vitamin_small_224", {**RATES, "depth": 2, "img_size": 64}, IMAGE),
    "timm volo": ("volo_d1_224", {**RATES, "img_size": 64}, IMAGE),
    "timm vovnet": ("ese_vovnet19b_slim_dw", RATES, SMALL),
    "timm xception": ("legacy_xception", RATE, SMALL),
    "timm xception_aligned": ("xception41", RATES, SMALL),
    "timm xcit": ("xcit_tiny_12_p8_224", {**RATES, "depth": 2, "img_size": 64}, IMAGE),
    "torchvision convnext": ("convnext_tiny", CLASSES, SMALL),
    "torchvision detection.faster_rcnn": (
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        {**CLASSES, "box_detections_per_img": 3, "min_size": 64, "max_size": 64},
        IMAGE,
    ),
    "torchvision efficientnet": ("efficientnet_b0", CLASSES, IMAGE),
    "torchvision googlenet": ("googlenet", CLASSES, SMALL),
    "torchvision mnasnet": ("mnasnet0_5", CLASSES, IMAGE),
    "torchvision mobilenetv2": ("mobilenet_v2", CLASSES, IMAGE),
    "torchvision mobilenetv3": ("mobilenet_v3_small", CLASSES, IMAGE),
    "torchvision optical_flow.raft": ("raft_small", {}, (3, 128, 128)),
    "torchvision resnet": ("resnet18", CLASSES, IMAGE),
    "torchvision segmentation.deeplabv3": ("deeplabv3_mobilenet_v3_large", CLASSES, IMAGE),
    "torchvision segmentation.lraspp": ("lraspp_mobilenet_v3_large", CLASSES, IMAGE),
    "torchvision shufflenetv2": ("shufflenet_v2_x0_5", CLASSES, IMAGE),
    "torchvision squeezenet": ("squeezenet1_1", CLASSES, IMAGE),
    "torchvision video.resnet": ("mc3_18", CLASSES, (3, 4, 32, 32)),
    "torchvision swin_transformer": ("swin_t", CLASSES, SMALL),
    "torchvision vision_transformer": ("vit_b_16", {**CLASSES, "image_size": 64}, IMAGE),
}
"""Family to name, options, and shape of one input."""

LEFT_TO_THE_BENCHMARK = {
    "torchvision alexnet": "61 million parameters, of the structure of vgg",
    "timm nasnet": "1,500 modules whatever its options",
    "timm pnasnet": "86 million parameters and 1,600 sites whatever its options",
    "torchvision densenet": "of the structure of timm's",
    "torchvision detection.fcos": "the backbone of faster_rcnn, and heads as in retinanet",
    "torchvision detection.retinanet": "tests/test_outside.py has one with a small backbone",
    "torchvision inception": "of the structure of timm's",
    "torchvision quantization.googlenet": "torchvision googlenet with other additions",
    "torchvision quantization.mobilenetv2": "torchvision mobilenetv2 with other additions",
    "torchvision quantization.mobilenetv3": "torchvision mobilenetv3 with other additions",
    "torchvision quantization.resnet": "torchvision resnet with other additions",
    "torchvision quantization.shufflenetv2": "torchvision shufflenetv2 with other additions",
    "torchvision regnet": "of the structure of timm's",
    "torchvision segmentation.fcn": "deeplabv3 with a simpler head",
    "torchvision detection.keypoint_rcnn": "key points are found box by box, for minutes",
    "torchvision detection.mask_rcnn": "masks are pasted box by box, for minutes",
    "torchvision detection.ssd": "pictures are always made 300 pixels wide",
    "torchvision detection.ssdlite": "pictures are always made 320 pixels wide",
    "torchvision quantization.inception": "the model of torchvision inception",
    "torchvision vgg": "133 million parameters; timm's own is here",
    "torchvision maxvit": "pictures of 224 pixels; timm's own is here",
    "torchvision video.mvit": "16 frames of 224 pixels",
    "torchvision video.s3d": "14 frames of 224 pixels",
    "torchvision video.swin_transformer": "takes minutes",
}
"""Families whose smallest models take too long here or repeat a structure, with the reason."""


@pytest.mark.filterwarnings("ignore")  # of timm and torchvision about themselves
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_every_family_converts_exactly(family, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(RAFT.forward, "__defaults__", (1,))  # updates of the flow, instead of 12
    library, file = family.split()
    name, options, shape = FAMILIES[family]
    kind = file.partition(".")[0] if "." in file else "image"
    built = assembled(library, kind, name, options, shape)
    shorten(built.model)
    *_, (_, row) = examine(built)
    assert judged(row) == {"status": "fine", "reason": ""}
    assert row["share"] == 1.0, row["uncovered"]
    assert row["moved"] > 0


def test_the_table_has_every_family():
    if (timm.__version__, torchvision.__version__.partition("+")[0]) != VERSIONS:
        pytest.skip(f"the table is for timm and torchvision {VERSIONS}")
    families = {f"{library} {family}" for library, family, _, _ in entry_points()}
    assert not FAMILIES.keys() & LEFT_TO_THE_BENCHMARK.keys()
    assert families == FAMILIES.keys() | LEFT_TO_THE_BENCHMARK.keys()
