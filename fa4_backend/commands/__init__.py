"""The verbs of the `fa4` command, one file each; the file's function of the same name is the command."""
