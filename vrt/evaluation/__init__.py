"""How good is a network: restore whole clips, measure them against the truth, show the result."""
