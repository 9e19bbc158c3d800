"""The command lines of recipes and of surgery."""
