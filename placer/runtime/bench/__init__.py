"""Measuring plans in the runtime, beside what the cost model says of the same tokens."""
