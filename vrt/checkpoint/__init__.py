"""Checkpoints that can't be lost: commit, publish, register, resume. Knows mappings of tensors, never VRT."""
