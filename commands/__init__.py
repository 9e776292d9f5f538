"""The subcommands of `lowrank`: each file parses, checks, calls the library and prints. No maths here."""
