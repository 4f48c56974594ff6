"""Distillation losses computed from the record alone: one module per paper."""
