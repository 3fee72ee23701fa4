"""The command line's longer commands, one function each; `cli` has the parser and the short ones."""
