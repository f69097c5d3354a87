"""The networks of ``models.py``: name as on the command line, with the image size it is tried at.

Sizes are small where a network allows it: what is shown is that it works, not how fast.
"""

from __future__ import annotations

TORCHVISION = (
    "resnet18@3x64x64", "resnet34@3x64x64", "resnet50@3x64x64", "resnet101@3x64x64",
    "resnext50_32x4d@3x64x64", "wide_resnet50_2@3x64x64",
    "densenet121@3x64x64", "densenet169@3x64x64", "googlenet@3x64x64", 'inception_v3@3x128x128{"aux_logits":false}',
    "squeezenet1_0@3x64x64", "squeezenet1_1@3x64x64", "shufflenet_v2_x0_5@3x64x64",
    "shufflenet_v2_x1_0@3x64x64", "mobilenet_v2@3x64x64",
    "mobilenet_v3_small@3x64x64", "mobilenet_v3_large@3x64x64", "efficientnet_b0@3x64x64", "efficientnet_b1@3x64x64",
    "efficientnet_v2_s@3x64x64", "mnasnet0_5@3x64x64", "mnasnet1_0@3x64x64", "regnet_x_400mf@3x64x64",
    "regnet_y_400mf@3x64x64", "regnet_y_1_6gf@3x64x64", "convnext_tiny@3x64x64", 'vit_b_16@3x96x96{"image_size":96}',
    "swin_t@3x64x64", "swin_v2_t@3x64x64", "maxvit_t@3x224x224",
)
TIMM = (
    "resnet18@3x64x64", "resnet50d@3x64x64", "resnetv2_50@3x64x64", "seresnet50@3x64x64", "ecaresnet26t@3x64x64",
    "res2net50_26w_4s@3x64x64", "resnest14d@3x64x64", "skresnet18@3x64x64", "cspresnet50@3x64x64",
    "cspdarknet53@3x64x64", "darknet53@3x64x64", "dla34@3x64x64", "hrnet_w18_small@3x64x64", "selecsls42b@3x64x64",
    "ese_vovnet19b_dw@3x64x64", "rexnet_100@3x64x64", "ghostnet_100@3x64x64", "mixnet_s@3x64x64",
    "efficientnet_lite0@3x64x64", "tf_efficientnet_lite0@3x64x64", "tinynet_a@3x64x64", "fbnetc_100@3x64x64",
    "spnasnet_100@3x64x64", "semnasnet_100@3x64x64", "mobilenetv3_small_100@3x64x64", "mobilenetv4_conv_small@3x64x64",
    "mobileone_s0@3x64x64", "repvgg_a0@3x64x64", "lcnet_100@3x64x64", "hardcorenas_a@3x64x64", "dpn48b@3x64x64",
    "xception41@3x96x96", "nf_resnet50@3x64x64", "convnext_atto@3x64x64", "convnextv2_atto@3x64x64",
    'vit_tiny_patch16_224@3x96x96{"img_size":96}', 'vit_small_patch16_224@3x96x96{"img_size":96}',
    'deit_tiny_patch16_224@3x96x96{"img_size":96}', "swin_tiny_patch4_window7_224@3x224x224",
    'mixer_s32_224@3x96x96{"img_size":96}', 'resmlp_12_224@3x96x96{"img_size":96}', "poolformer_s12@3x64x64",
    "pvt_v2_b0@3x64x64", "levit_128s@3x224x224", "mobilevit_s@3x64x64", "edgenext_xx_small@3x64x64",
    "efficientformer_l1@3x224x224", 'cait_xxs24_224@3x96x96{"img_size":96}', "twins_svt_small@3x224x224",
    "xcit_nano_12_p16_224@3x96x96", 'convit_tiny@3x96x96{"img_size":96}', "crossvit_tiny_240@3x240x240",
    "fastvit_t8@3x64x64", "regnetx_002@3x64x64",
)
BUILT_IN = ("resnet20@3x32x32", "resnet50-cifar@3x32x32", "mobilenetv2-cifar@3x32x32", "vgg16@3x32x32")
# Their classifiers alone have 60 to 120 million weights to be masked.
LARGE = ("torchvision:alexnet@3x96x96", "torchvision:vgg11@3x64x64", "torchvision:vgg16_bn@3x64x64")
MODELS = (*BUILT_IN, *(f"torchvision:{name}" for name in TORCHVISION), *(f"timm:{name}" for name in TIMM), *LARGE)
