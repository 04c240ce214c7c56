"""Lightning callbacks and what they share with `PeftModule`."""
