"""The command line: one file a command; each imports what is heavy inside its function, so that --help is quick."""
