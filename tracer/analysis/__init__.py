"""Signals of logits and attention as formulas on NumPy arrays (docs/signals.md)."""
