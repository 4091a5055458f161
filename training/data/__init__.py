"""What training reads: one interface over datasets on disk, windows cut from their episodes, and the order in
which a run sees them. Sample n of a run is a function of (seed, n) alone.
"""
