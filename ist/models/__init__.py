"""The shipped networks: plain `nn.Module`s that know nothing of the rest of the package.

`MODELS` maps short names, as used in a configuration's `model.name`, to import paths.
"""

MODELS = {
    "mlp": "ist.models.mlp:MLP",
    "preact_resnet": "ist.models.preact_resnet:PreActResNet",
    "decoder": "ist.models.decoder:Decoder",
    "wide": "ist.models.wide:WideClassifier",
}
