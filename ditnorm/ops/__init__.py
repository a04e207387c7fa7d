"""The ops in plain PyTorch: the specification of each, its checks and its gradients."""
