"""The face of epserve: command line, single-machine launcher, client."""
