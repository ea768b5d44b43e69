"""A subnet as messages: its layout, its coding in few bits, and both ends of the way."""
