"""Other programs that are told of a run while it goes on: TensorBoard, Weights & Biases, MLflow, or one of the user's."""
