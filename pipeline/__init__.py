"""One to Many: pretrain backbones once, adapt them to many targets, prove with numbers that the transfer paid."""

__version__ = "0.1.0"
