"""What a run costs, and who is told about every round: the terminal, TensorBoard, Prometheus."""
