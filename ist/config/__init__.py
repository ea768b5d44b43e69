"""The configuration: its keys as frozen types, and how a file becomes one. Imports no torch."""
