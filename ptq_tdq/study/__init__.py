"""Studies: a matrix of methods, schemes, presets and seeds, run cell by cell into JSON lines, and their table."""
