"""The ``lightning-peft`` command; the only place that knows Hydra."""
