"""Adapter files in and out, generic over what a method declares of its file form."""
