"""The VRT network. Imports nothing else of the project."""
