"""Handle a user's `nn.Module`: copies, `torch.compile`, train and eval modes, refusals, and error locations."""
