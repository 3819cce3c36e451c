"""Prefect flows: when, where, retries, cancellation. Nothing imports this package."""
