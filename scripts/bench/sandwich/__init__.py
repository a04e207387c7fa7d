"""What ``bench_sandwich.py`` measures: norm sites of diffusers' RMSNorm over the whole width."""
