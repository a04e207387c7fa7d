"""What ``bench_activation.py`` measures: GELU and SwiGLU behind what stands beside them."""
