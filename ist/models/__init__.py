"""The shipped networks: plain `nn.Module`s that do not depend on the rest of the package.

`MODELS` maps the short names that a configuration may use in `model.name` to import paths.
"""

MODELS = {
    "mlp": "ist.models.mlp:MLP",
    "preact_resnet": "ist.models.preact_resnet:PreActResNet",
    "decoder": "ist.models.decoder:Decoder",
    "wide": "ist.models.wide:WideClassifier",
}
