"""What each operator does to labels of neurons."""
