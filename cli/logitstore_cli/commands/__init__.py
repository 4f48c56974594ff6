"""One module per command; each defines `command`. `logitstore_cli.main.COMMANDS` lists them."""
