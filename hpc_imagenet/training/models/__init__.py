"""Models: backbones, pretrained weights, weight averaging (EMA), optimizers."""
