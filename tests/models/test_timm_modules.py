"""A small model of each module of timm: it plans, converts, and equals ``num_classes=0``.

All of them take a quarter of an hour, so only a few are tested unless ``IMAGEVEC_TEST_TIMM=1``.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from imagevec import OptionError
from imagevec.images.preprocess import resize_and_crop
from imagevec.models.registry import find_source
from tests.helpers.images import cosine, photo
from tests.helpers.pipeline import pixels_of, plan_and_engine, preprocess

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.models

# The model with the fewest parameters times pixels.
SMALLEST = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1",
    "byobnet": "test_byobnet",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "test_convnext",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "eva02_tiny_patch14_224",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "hieradet_small",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "maxxvit": "test_coatnet",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "test_nfnet",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}
REFUSED = {"deepseek_vit": "crop_mode"}  # border
QUICK = ("byobnet", "coat", "levit", "vision_transformer")
TESTED = SMALLEST if os.environ.get("IMAGEVEC_TEST_TIMM") else QUICK
IMAGES = [photo(300, 400, seed=1), photo(400, 300, seed=2), photo(90, 120, seed=3)]


def test_every_module_is_listed() -> None:
    if timm.__version__ != "1.0.31":
        pytest.skip("the list is of timm 1.0.31")
    assert sorted(SMALLEST) == timm.list_modules()


@pytest.mark.parametrize("module", TESTED)
def test_vectors_are_those_of_no_classes(module: str) -> None:
    name = SMALLEST[module]
    source = find_source(f"timm/{name}")
    if module in REFUSED:
        with pytest.raises(OptionError, match=REFUSED[module]):
            plan_and_engine(model=source.name, weights="random", engine="auto")
        return
    preprocessing = source.preprocessing(None)
    model = source.module(preprocessing, None).eval()
    headless = timm.create_model(name, num_classes=0).eval()
    headless.load_state_dict(model.state_dict(), strict=False)
    with torch.inference_mode():
        inputs = torch.stack([preprocess(pixels_of(image), preprocessing) for image in IMAGES])
        expected = headless(inputs).numpy()
    pixels = np.stack([resize_and_crop(pixels_of(image), preprocessing) for image in IMAGES])
    for engine in ("torch", "openvino"):
        plan, run = plan_and_engine(model=source.name, weights="random", engine=engine)
        assert plan.spec.num_features == expected.shape[1]
        for count in (1, 3):
            for vector, truth in zip(run(pixels[:count]), expected, strict=False):
                assert cosine(vector, truth) >= 0.9999
