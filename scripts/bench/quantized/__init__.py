"""What ``bench_quantize.py`` measures: the quantising ops."""
