"""Transferability scores, one family a file; `pipeline.transfer.scoring` computes them."""
