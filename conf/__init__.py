"""The Hydra config groups, shipped as ``lightning_peft.conf``."""
