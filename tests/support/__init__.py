"""What several tests share: tiny models, random calls of the ops, the expressions that they must
equal, and what to check.
"""
