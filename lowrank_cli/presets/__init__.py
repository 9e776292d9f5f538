"""Recipes of the papers as YAML files; `--preset NAME` takes one."""
