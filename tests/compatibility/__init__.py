"""ditnorm among the other things that people do to pipelines: features x families x orders, as
tests and as docs/compatibility.md.
"""
