"""Data sets, and how any of them is dealt to workers as shards and batches."""
