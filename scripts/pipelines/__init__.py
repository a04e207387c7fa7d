"""Loading and running a pipeline of diffusers, and comparing what two runs of it made."""
