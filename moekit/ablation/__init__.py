"""Ablations: declarative tables of arms and paired seeds, their runs, and verdicts on claims by a written rule."""
