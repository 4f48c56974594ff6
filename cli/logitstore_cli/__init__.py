"""The `logitstore` command: one module per command in `commands/`, loaded when it is used."""
