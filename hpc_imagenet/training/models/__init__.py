"""Build backbones, load pretrained weights, average weights, optimizers."""
