"""The command line: its parser, its flags, and the catalog of data sets, networks and methods."""
