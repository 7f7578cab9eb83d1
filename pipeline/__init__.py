"""Decant: offline distillation of language models through a verified logit cache."""
