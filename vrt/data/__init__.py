"""Clips: importing, preparing, storing, degrading and sampling them."""
