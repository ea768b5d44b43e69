"""The network of a run in the formats of other libraries: transformers and torch.distributed.checkpoint."""
