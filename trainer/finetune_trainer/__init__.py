"""Trains what a recipe says, under torchrun, with DeepSpeed. Knows nothing of Kubernetes."""
