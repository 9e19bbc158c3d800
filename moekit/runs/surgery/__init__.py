"""Surgery on the runs of recipes: what `moekit.surgery` does to state dicts, from run folder to run folder."""
