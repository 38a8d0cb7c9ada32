"""Checkpoints on disk: the demo weights, tiny ones for tests, manifests and known answers.

Nothing here imports torch or transformers at module level; only the functions that make a checkpoint do.
"""
