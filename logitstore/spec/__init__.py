"""What a store is, in documents: header, plan, commit, index, signals, errors. Imports nothing
heavy."""
