"""Tiny pipelines that draw handwritten digits: the data, the VAE with weights set by hand, the
pipelines of each family.
"""
