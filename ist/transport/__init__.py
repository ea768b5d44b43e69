"""A subnet as messages: their layouts, their coding in few bits, and the code that writes and reads them."""
