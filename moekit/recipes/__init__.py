"""Recipes, one module per paper; `moekit.runs.Recipe` says what each holds."""
