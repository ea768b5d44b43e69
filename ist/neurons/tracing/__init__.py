"""Records of a network's run on an example: operators, labels, calls, random draws, values read."""
