"""Kinds of plan: one module per kind, each with its `PlanFormat` as FORMAT."""
