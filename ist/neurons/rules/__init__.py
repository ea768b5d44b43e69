"""Rules: what each operator does to the labels of neurons."""
