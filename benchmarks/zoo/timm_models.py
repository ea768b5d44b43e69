"""Networks of timm, with fewer and narrower layers if their builders have such arguments.

A few have a fixed size (inception, mixnet, ghostnet, lcnet, tinynet, mobilenets, ...): for these, the smallest in timm.
"""

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.zoo.entry import Entry, images, seeded
from benchmarks.zoo.torchvision_stand_in import import_timm

CLASSES = 7


def _steady(network: nn.Module) -> nn.Module:
    """Switch off all modules that drop units, weights or branches at random."""
    drop_path = importlib.import_module("timm.layers").DropPath
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, drop_path):
            module.drop_prob = 0.0
    return network


def _named(family: str, name: str, size: int, **arguments: Any) -> Entry:
    """Build a network of timm by name, with some of its arguments replaced."""

    def build() -> nn.Module:
        return _steady(import_timm().create_model(name, pretrained=False, num_classes=CLASSES, **arguments))

    return Entry(seeded(build), images(size), "timm", family)


def _made(family: str, module: str, size: int, make: Callable[[Any], nn.Module]) -> Entry:
    """Build a network from the classes of one of timm's modules, if the named networks have a fixed size."""

    def build() -> nn.Module:
        import_timm()
        return _steady(make(importlib.import_module(f"timm.models.{module}")))

    return Entry(seeded(build), images(size), "timm", family)


def _resnet(name: str, **arguments: Any) -> Entry:
    sizes = {"layers": (2, 1, 1, 1), "channels": (16, 24, 32, 40), "stem_width": 12}
    return _named("cnn", name, 32, **(sizes | arguments))


def _cnn(name: str, size: int = 64, **arguments: Any) -> Entry:
    return _named("cnn", name, size, **arguments)


def _column(name: str) -> Entry:
    """A transformer whose blocks are all alike."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 6, "mlp_ratio": 1.5}
    return _named("vision transformer", name, 32, **sizes)


def _vit(name: str, **arguments: Any) -> Entry:
    """A transformer in stages, for images of its `img_size`, of 64 x 64 if it takes any size."""
    return _named("vision transformer", name, arguments.get("img_size", 64), **arguments)


def _xception(name: str) -> Entry:
    blocks = [
        {"in_chs": 64, "out_chs": 24, "stride": 2},
        {"in_chs": 24, "out_chs": 36, "stride": 2},
        {"in_chs": 36, "out_chs": 36, "stride": 1},
        {"in_chs": 36, "out_chs": (36, 40, 44), "stride": 2},
        {"in_chs": 44, "out_chs": (48, 48, 56), "stride": 1, "no_skip": True, "start_with_relu": False},
    ]
    return _cnn(name, block_cfg=blocks)


def _hrnet(module: Any) -> nn.Module:
    def stage(blocks: tuple[int, ...], channels: tuple[int, ...], block: str = "BASIC") -> dict[str, Any]:
        sizes = {"num_modules": 1, "num_branches": len(blocks), "num_blocks": blocks, "num_channels": channels}
        return sizes | {"block_type": block, "fuse_method": "SUM"}

    config = {
        "stem_width": 20,
        "stage1": stage((1,), (8,), "BOTTLENECK"),
        "stage2": stage((1, 1), (12, 20)),
        "stage3": stage((1, 1, 1), (12, 20, 28)),
        "stage4": stage((1, 1, 1, 1), (12, 20, 28, 36)),
    }
    network: nn.Module = module.HighResolutionNet(config, num_classes=CLASSES)
    return network


def _cspresnet(module: Any) -> nn.Module:
    stem = module.CspStemCfg(out_chs=20, kernel_size=3, stride=2)
    stages = module.CspStagesCfg(depth=(1, 2), out_chs=(24, 40), expand_ratio=2.0, bottle_ratio=0.5, cross_linear=True)
    network: nn.Module = module.CspNet(module.CspModelCfg(stem, stages), num_classes=CLASSES)
    return network


def _bit(module: Any) -> nn.Module:
    def norm(channels: int, **arguments: Any) -> nn.Module:
        made: nn.Module = module.GroupNormAct(channels, **(arguments | {"num_groups": 4}))
        return made

    sizes = {"layers": [1, 2, 1, 1], "channels": (48, 64, 80, 96), "stem_chs": 20, "stem_type": "fixed"}
    network: nn.Module = module.ResNetV2(**sizes, norm_layer=norm, num_classes=CLASSES)
    return network


def _vgg(module: Any) -> nn.Module:
    sizes = [12, "M", 20, "M", 28, 28, "M"]
    network: nn.Module = module.VGG(sizes, mlp_ratio=0.02, norm_layer=nn.BatchNorm2d, num_classes=CLASSES)
    return network


def _mixer(kind: str, ratio: float | tuple[float, float], **layers: str) -> Entry:
    """An MLP-mixer of one of the kinds that share timm's class for them."""

    def make(module: Any) -> nn.Module:
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 40, "num_blocks": 2, "mlp_ratio": ratio}
        chosen = {argument: getattr(module, name) for argument, name in layers.items()}
        network: nn.Module = module.MlpMixer(CLASSES, block_layer=getattr(module, kind), **chosen, **sizes)
        return network

    return _made("mixer", "mlp_mixer", 32, make)


def _metaformer(*mixers: str) -> Entry:
    """Four stages that mix positions in the ways named."""

    def make(module: Any) -> nn.Module:
        kinds = [getattr(module, mixer) for mixer in mixers]
        norms = [module.LayerNormNoBias if mixer == "Attention" else module.LayerNorm2dNoBias for mixer in mixers]
        sizes = {"depths": (1, 2, 1, 1), "dims": (16, 24, 64, 96), "num_classes": CLASSES}
        network: nn.Module = module.MetaFormer(token_mixers=kinds, norm_layers=norms, **sizes)
        return network

    return _made("mixer", "metaformer", 64, make)


def _crossvit(module: Any) -> nn.Module:
    sizes = {"img_size": 64, "img_scale": (1.0, 0.75), "patch_size": (8, 16), "embed_dim": (24, 40)}
    shape = {"depth": ((1, 2, 1),), "num_heads": (3, 5), "mlp_ratio": (2.0, 2.5, 1.0)}
    network: nn.Module = module.CrossVit(**sizes, **shape, num_classes=CLASSES)
    return network


def _volo(module: Any) -> nn.Module:
    sizes = {"img_size": 64, "stem_hidden_dim": 12, "embed_dims": [32, 48, 48, 48], "num_heads": [2, 3, 3, 3]}
    network: nn.Module = module.VOLO([1, 1, 2, 1], **sizes, use_aux_head=False, num_classes=CLASSES)
    return network


def _made_vit(module: str, kind: str, size: int = 64, with_size: bool = True, **arguments: Any) -> Entry:
    """A transformer in stages from its class."""

    def make(library: Any) -> nn.Module:
        resolution = {"img_size": size} if with_size else {}
        network: nn.Module = getattr(library, kind)(**resolution, **arguments, num_classes=CLASSES)
        return network

    return _made("vision transformer", module, size, make)


STAGES: dict[str, Any] = {"depths": (1, 2, 1, 1), "embed_dims": (16, 24, 40, 48)}
WINDOWS: dict[str, Any] = {"patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (3, 4)}
CONVNEXT: dict[str, Any] = {"depths": (1, 2, 1, 1), "dims": (16, 24, 36, 44)}
NORM_FREE: dict[str, Any] = {"depths": (1, 2, 1, 1), "channels": (32, 48, 64, 80), "stem_chs": 24}
REGNET: dict[str, Any] = {"depth": 5, "w0": 16, "wa": 10.0, "wm": 1.5, "group_size": 8, "stem_width": 12}

CONVOLUTIONAL = {
    "resnet_basic": _resnet("resnet18"),
    "resnet_bottleneck": _resnet("resnet50"),
    "resnet_d": _resnet("resnet26d"),
    "resnext": _resnet("resnext50_32x4d", cardinality=4, base_width=12),
    "seresnet": _resnet("seresnet50"),
    "ecaresnet": _resnet("ecaresnet26t"),
    "wide_resnet": _resnet("wide_resnet50_2"),
    "skresnet": _resnet("skresnet18"),
    "resnest": _resnet("resnest14d"),
    "res2net": _resnet("res2net50_26w_4s"),
    "resnetv2_bn": _cnn("resnetv2_50", 32, layers=(1, 2, 1, 1), channels=(48, 64, 80, 96), stem_chs=20),
    "bit": _made("cnn", "resnetv2", 32, _bit),
    "densenet": _cnn("densenet121", growth_rate=8, block_config=(2, 3, 2, 2)),
    "vgg_bn": _made("cnn", "vgg", 64, _vgg),
    "inception_v3": _cnn("inception_v3", 96),
    "xception": _xception("xception41"),
    "mobilenetv1": _made(
        "cnn", "efficientnet", 64, lambda m: m._gen_mobilenet_v1("mobilenetv1_100", 0.35, num_classes=CLASSES)
    ),
    "mobilenetv2": _cnn("mobilenetv2_035"),
    "mobilenetv3": _cnn("mobilenetv3_small_050"),
    "mobilenetv4": _cnn("mobilenetv4_conv_small_035"),
    "mnasnet": _cnn("mnasnet_small"),
    "efficientnet": _made(
        "cnn", "efficientnet", 64, lambda m: m._gen_efficientnet("efficientnet_b0", 0.25, 0.5, num_classes=CLASSES)
    ),
    "efficientnetv2": _made(
        "cnn",
        "efficientnet",
        64,
        lambda m: m._gen_efficientnetv2_s("efficientnetv2_rw_t", 0.25, 0.3, num_classes=CLASSES),
    ),
    "mixnet": _cnn("mixnet_s"),
    "lcnet": _cnn("lcnet_035"),
    "tinynet": _cnn("tinynet_e"),
    "ghostnet": _cnn("ghostnet_050", drop_rate=0.0),
    "rexnet": _cnn("rexnet_100", width_mult=0.5, depth_mult=0.5, drop_rate=0.0),
    "regnetx": _cnn("regnetx_002", **REGNET),
    "regnety": _cnn("regnety_002", **REGNET),
    "repvgg": _cnn("repvgg_a0", width_factor=0.25),
    "mobileone": _cnn("mobileone_s0"),
    "hrnet": _made("cnn", "hrnet", 64, _hrnet),
    "dpn": _cnn("dpn48b", k_sec=(1, 2, 1, 1)),
    "dla": _cnn("dla46_c", channels=(8, 12, 20, 24, 28, 36)),
    "cspresnet": _made("cnn", "cspnet", 32, _cspresnet),
    "cspdarknet": _cnn("cs3darknet_s"),
    "vovnet": _cnn("ese_vovnet19b_slim"),
    "nf_resnet": _cnn("nf_resnet26", **NORM_FREE),
    "nf_regnet": _cnn("nf_regnet_b0", **NORM_FREE),
    "hgnet": _cnn("hgnetv2_b0"),
    "starnet": _cnn("starnet_s050", depths=[1, 2, 1, 1]),
    "fasternet": _cnn("fasternet_t0", depths=(1, 2, 1, 1), embed_dim=20),
    "repvit": _cnn("repvit_m0_9", depth=(1, 2, 1, 1), embed_dim=(24, 32, 40, 48)),
    "convnext": _cnn("convnext_atto", **CONVNEXT),
    "convnextv2": _cnn("convnextv2_atto", **CONVNEXT),
    "inception_next": _cnn("inception_next_atto", depths=(1, 2, 1, 1), dims=(24, 32, 40, 48)),
    "lambda_resnet": _cnn("lambda_resnet26t", width_factor=0.25),
    "botnet": _cnn("botnet26t_256", img_size=64, width_factor=0.25),
    "halonet": _cnn("halonet26t", 256, width_factor=0.25),
}

MIXING = {
    "convmixer": _made("mixer", "convmixer", 32, lambda m: m.ConvMixer(36, 3, 5, 4, num_classes=CLASSES)),
    "mixer": _mixer("MixerBlock", (0.5, 3.0)),
    "resmlp": _mixer("ResBlock", 3.0, norm_layer="Affine"),
    "gmlp": _mixer("SpatialGatingBlock", 3.0, mlp_layer="GatedMlp"),
    "poolformer": _metaformer("Pooling", "Pooling", "Pooling", "Pooling"),
    "convformer": _metaformer("SepConv", "SepConv", "SepConv", "SepConv"),
    "caformer": _metaformer("SepConv", "SepConv", "Attention", "Attention"),
    "sequencer": _made_vit(
        "sequencer",
        "Sequencer2d",
        layers=(1, 1),
        patch_sizes=(8, 2),
        embed_dims=(24, 40),
        hidden_sizes=(8, 12),
        mlp_ratios=(2.0, 3.0),
    ),
}

ATTENTION = {
    "vit": _column("vit_tiny_patch16_224"),
    "deit_distilled": _column("deit_tiny_distilled_patch16_224"),
    "beit": _column("beit_base_patch16_224"),
    "eva02": _column("eva02_tiny_patch14_224"),
    "cait": _column("cait_xxs24_224"),
    "xcit": _column("xcit_nano_12_p8_224"),
    "swin": _vit("swin_tiny_patch4_window7_224", img_size=32, **WINDOWS),
    "swinv2": _vit("swinv2_tiny_window8_256", img_size=32, **WINDOWS),
    "coatnet": _vit("coatnet_pico_rw_224", img_size=64, depths=(1, 1, 2, 1), embed_dim=(32, 64, 96, 128)),
    "maxvit": _vit("maxvit_rmlp_pico_rw_256", img_size=64, depths=(1, 1, 1, 1), embed_dim=(32, 64, 96, 128)),
    "coat": _vit("coat_lite_tiny", img_size=64, embed_dims=(16, 32, 40, 48), serial_depths=(1, 1, 1, 1)),
    "levit": _vit("levit_128s", img_size=64, embed_dim=(32, 40, 48), depth=(1, 2, 1), num_heads=(2, 3, 4), key_dim=8),
    "pvtv2": _vit("pvt_v2_b0", **STAGES, num_heads=(1, 2, 5, 6)),
    "twins": _vit("twins_svt_small", img_size=64, **STAGES, num_heads=(1, 2, 5, 6)),
    "crossvit": _made("vision transformer", "crossvit", 64, _crossvit),
    "edgenext": _vit("edgenext_xx_small"),
    "fastvit": _vit("fastvit_t8", layers=(1, 1, 2, 1), embed_dims=(12, 24, 48, 96)),
    # Its attention has 7 x 7 positions for every image size.
    "efficientformer": _vit("efficientformer_l1", img_size=224, depths=(1, 1, 1, 2), embed_dims=(16, 24, 36, 44)),
    "efficientformerv2": _vit("efficientformerv2_s0", img_size=64, depths=(1, 1, 2, 2), embed_dims=(16, 24, 36, 44)),
    "mobilevitv2": _vit("mobilevitv2_050"),
    "nest": _made_vit("nest", "Nest", 32, patch_size=2, embed_dims=(24, 32, 40), num_heads=(2, 4, 5), depths=(1, 2, 1)),
    "visformer": _vit("visformer_tiny", img_size=64, init_channels=8, embed_dim=48, depth=(1, 2, 1), num_heads=3),
    "tnt": _vit("tnt_s_patch16_224", img_size=32, embed_dim=48, inner_dim=16, depth=2, num_heads_outer=6),
    "mvitv2": _made(
        "vision transformer",
        "mvitv2",
        64,
        lambda m: m.MultiScaleVit(
            m.MultiScaleVitCfg(depths=(1, 1, 2, 1), embed_dim=24), img_size=(64, 64), num_classes=CLASSES
        ),
    ),
    "focalnet": _made_vit("focalnet", "FocalNet", with_size=False, embed_dim=16, depths=(1, 2, 1, 1)),
    "davit": _vit("davit_tiny", **STAGES, num_heads=(2, 3, 5, 6)),
    "gcvit": _made_vit(
        "gcvit", "GlobalContextVit", window_size=(4, 4, 2, 2), embed_dim=12, depths=(1, 1, 2, 1), num_heads=(2, 3, 4, 6)
    ),
    "volo": _made("vision transformer", "volo", 64, _volo),
    "pit": _made_vit("pit", "PoolingVisionTransformer", base_dims=(12, 12, 12), depth=(1, 2, 1), heads=(2, 4, 8)),
    "tiny_vit": _vit("tiny_vit_5m_224", **STAGES, num_heads=(1, 2, 5, 6)),
}

ENTRIES = CONVOLUTIONAL | MIXING | ATTENTION
