"""What is recorded while a network runs on an example: operators, labels, calls, random draws, values read."""
