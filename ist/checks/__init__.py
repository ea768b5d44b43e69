"""Checks that refuse a network, loss, optimizer or data before the run starts, or stop a run that would be wrong."""
