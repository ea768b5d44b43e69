"""The configuration: all keys as frozen types, and the loader that reads a file into them. Does not import torch."""
