"""Autograd functions, each beside its plain-PyTorch reference; need torch alone."""
