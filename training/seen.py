"""Where the hand and the cup of each colour are, as generated videos say it. No torch, no simulator."""

PLACES = "truth.coloured"  # feature [K * 3]: x, y, z in m, world, of what NAMES lists
NAMES = ("hand", "red", "blue", "green", "yellow")
ABSENT = -1.0  # z of what is not there
