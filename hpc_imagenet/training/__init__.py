"""Training of one backbone with PyTorch Lightning. Only this package imports torch."""
