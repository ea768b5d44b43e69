"""Anybody's `nn.Module`: copied, uncompiled, its modes, what is refused, and what failed in it."""
