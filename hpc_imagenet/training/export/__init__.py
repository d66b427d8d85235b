"""Export of trained networks: to files that torchvision, timm and onnxruntime load without this package."""
