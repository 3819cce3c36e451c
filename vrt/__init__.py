"""Training, evaluation and checkpointing of VRT, the Video Restoration Transformer."""
