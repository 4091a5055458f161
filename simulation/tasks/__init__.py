"""Tasks in simulation: what a seed puts where (`trial`) and what counts as done (`score`)."""
