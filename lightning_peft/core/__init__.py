"""How any ``nn.Module`` is adapted in place; needs torch alone."""
