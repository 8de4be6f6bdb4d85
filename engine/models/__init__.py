"""What a model is, without any trainer or server: its sizes, its tensors and their files. It builds no module."""
