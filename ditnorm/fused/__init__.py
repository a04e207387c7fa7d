"""What model families share: fused modules and blocks, attention, adaLN, activations."""
